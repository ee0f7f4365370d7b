import dataclasses
from unittest import mock

import jax
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import DataConfig, Experiment, ParallelismConfig, TrainingConfig
from flax_transformer.monitoring.utilization import CHIPS
from flax_transformer.planning import plan as planning
from flax_transformer.planning.plan import Program, TooLarge, device_memory, find_devices, make_plan, plans

MODEL = TransformerConfig(
    source_vocab_size=64,
    target_vocab_size=64,
    d_model=16,
    num_heads=2,
    d_ff=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
EXPERIMENT = Experiment(
    model=MODEL,
    data=DataConfig(rows=32, source_slots=16, target_slots=24),
    training=TrainingConfig(parallelism=ParallelismConfig(layout="pmap")),
)


def changed(**training):
    return EXPERIMENT.changed({f"training.{name}": value for name, value in training.items()})


def collectives_of(plan):
    assert isinstance(plan.result, Program)
    return {each.kind: each.bytes for each in plan.result.collectives}


def test_pmap_reduces_the_gradient_and_the_sums_of_the_losses_and_nothing_else():
    plan = make_plan(EXPERIMENT, find_devices("cpu:8"), None, changes="")
    assert plan.fits and plan.devices == 8 and plan.rows == 32
    assert plan.gradient_bytes == 4 * planning.count_parameters(EXPERIMENT)
    # After XLA's optimisations three or four of the four scalar sums are left.
    ((kind, size),) = collectives_of(plan).items()
    assert kind == "all-reduce" and plan.gradient_bytes < size <= plan.gradient_bytes + 4 * 4


@pytest.mark.slow
def test_fsdp_divides_the_state_among_devices_and_gathers_parameters():
    sizes = {}
    for count in (1, 8):
        plan = make_plan(changed(**{"parallelism.layout": "fsdp"}), find_devices(f"cpu:{count}"), None, changes="")
        sizes[count] = plan.result.arguments
        assert ("all-gather" in collectives_of(plan)) == (count > 1)
    assert sizes[8] < sizes[1]


@pytest.mark.slow
def test_fsdp_gathers_kernels_even_if_they_are_larger_than_the_activations():
    few = dataclasses.replace(
        changed(**{"parallelism.layout": "fsdp"}),
        model=dataclasses.replace(MODEL, d_model=64, d_ff=256),
        data=DataConfig(rows=8, source_slots=8, target_slots=8),
    )
    sizes = collectives_of(make_plan(few, find_devices("cpu:8"), None, changes=""))
    kernels, embedding = 4 * (12 * 64 * 64 + 4 * 64 * 256), 4 * 64 * 64
    # The embedding is gathered for the look-up and again for the logits.
    assert sizes["all-gather"] == kernels + 2 * embedding


def test_work_inside_a_loop_is_counted_once_per_iteration():
    whole = make_plan(changed(**{"parallelism.layout": "fsdp"}), find_devices("cpu:2"), None, changes="")
    parts = make_plan(
        changed(**{"parallelism.layout": "fsdp", "parallelism.rows_per_device": 4}),
        find_devices("cpu:2"),
        None,
        changes="",
    )
    assert whole.micro_batches == 1 and parts.micro_batches == 4 and parts.rows == whole.rows
    assert parts.result.temporaries < whole.result.temporaries
    assert parts.result.flops is None
    # The parameters are gathered in each part, or once before them; their gradients are summed in each.
    assert collectives_of(parts)["all-gather"] >= collectives_of(whole)["all-gather"]
    assert collectives_of(parts)["all-reduce"] > 2 * collectives_of(whole)["all-reduce"]


@pytest.mark.slow
def test_remedies_are_added_until_the_step_fits():
    devices = find_devices("cpu:4")
    (whole,) = plans(EXPERIMENT, devices, None)
    assert whole.fits and not whole.changes
    first, *others = plans(EXPERIMENT, devices, whole.result.peak - 1)
    assert isinstance(first.result, TooLarge) and first.result.needed == whole.result.peak
    assert [plan.fits for plan in others] == [False] * (len(others) - 1) + [True]
    assert others[-1].result.peak < whole.result.peak


class Refused:
    """A lowered step that does not fit into memory when it is compiled."""

    def __init__(self, message):
        self.message = "RESOURCE_EXHAUSTED: Ran out of memory " + message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("on HBM, the total memory required for HLO temporaries (39.97G) exceeds available HBM (15.75G).", 39.97),
        ("in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G.", 24.5),
    ],
)
def test_remedies_are_tried_in_order_without_those_that_are_already_used(monkeypatch, message, needed):
    monkeypatch.setattr(planning, "_lower", lambda *arguments: Refused(message))
    devices = find_devices("cpu:4")
    found = list(plans(EXPERIMENT, devices, None))
    assert all(plan.result.needed == needed * 2**30 and plan.result.available == 15.75 * 2**30 for plan in found)
    # Eight rows a device: as many parts as the excess asks for, then twice as many, down to one row.
    first = [f"training.parallelism.rows_per_device={rows}" for rows in ((4, 2, 1) if needed < 2 * 15.75 else (2, 1))]
    others = ["training.parallelism.loss_chunks=8", "model.remat=True", "training.parallelism.layout=fsdp"]
    changes = [plan.changes for plan in found]
    assert changes[: len(first) + 1] == ["", *first]
    assert changes[len(first) + 1 :] == [", ".join([first[-1], *others[:count]]) for count in (1, 2, 3)]
    again = changed(**{"parallelism.rows_per_device": 1, "parallelism.loss_chunks": 4, "parallelism.layout": "fsdp"})
    assert [plan.changes for plan in plans(again, devices, None)] == ["", "model.remat=True"]


def test_rows_that_only_fill_up_the_batch_are_reported():
    odd = dataclasses.replace(EXPERIMENT, data=dataclasses.replace(EXPERIMENT.data, rows=29))
    plan = make_plan(odd, find_devices("cpu:8"), None, changes="")
    assert (plan.rows, plan.empty_rows) == (32, 3)


def test_memory_comes_from_a_present_device_or_from_the_specification(monkeypatch):
    here, silent, elsewhere = (mock.create_autospec(jax.Device, instance=True) for _ in range(3))
    for device, limit in ((here, 64e9), (silent, None), (elsewhere, 1.0)):
        device.device_kind = "NVIDIA H100 80GB HBM3"
        device.memory_stats.return_value = limit and {"bytes_limit": limit}
    monkeypatch.setattr(jax, "local_devices", lambda: [here, silent])
    assert device_memory(here) == 64e9
    assert device_memory(silent) == device_memory(elsewhere) == CHIPS[here.device_kind].memory
    assert device_memory(jax.devices("cpu")[0]) is None


def test_find_devices_returns_the_topology_asked_for():
    assert find_devices("here") == jax.devices() and len(find_devices("cpu:3")) == 3
    for topology in ("cpu:9", "cpu:", "cpu:x", "cpu:0"):
        with pytest.raises(ValueError, match="give cpu:N"):
            find_devices(topology)


def test_a_missing_tpu_compiler_is_named_and_an_installed_one_knows_slices():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'flax_transformer\[libtpu\]'"):
            find_devices("v5e:4x4")
        return
    assert len(find_devices("v5e:4x4")) == 16 and len(find_devices("v4:2x2x1")) == 4
    with pytest.raises(ValueError, match="v5e:3x7.*e.g. v5e:4x4"):
        find_devices("v5e:3x7")
