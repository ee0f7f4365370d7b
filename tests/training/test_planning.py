"""Takes experiments and slices that are not there and leaves a verdict: the plan tells what the training step takes."""

import dataclasses

import jax
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import DataConfig, Experiment, TrainingConfig
from flax_transformer.training import planning
from flax_transformer.training.planning import Module, Program, TooLarge, find_devices, make_plan, plans

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
    training=TrainingConfig(parallelism="pmap"),
)


def changed(**training):
    return dataclasses.replace(EXPERIMENT, training=dataclasses.replace(EXPERIMENT.training, **training))


def collectives_of(plan):
    assert isinstance(plan.result, Program)
    return {each.kind: each.bytes for each in plan.result.collectives}


def test_pmap_reduces_the_gradient_and_the_sums_of_the_losses_and_nothing_else():
    plan = make_plan(EXPERIMENT, find_devices("cpu:8"), None, changes="")
    assert plan.fits and plan.devices == 8 and plan.rows == 32
    assert plan.gradient_bytes == 4 * planning.count_parameters(EXPERIMENT)
    # Of the four sums, three or four scalars are still wanted after XLA has looked.
    ((kind, size),) = collectives_of(plan).items()
    assert kind == "all-reduce" and plan.gradient_bytes < size <= plan.gradient_bytes + 4 * 4


def test_over_fsdp_the_state_of_a_device_shrinks_with_the_devices_and_parameters_are_gathered():
    sizes = {}
    for count in (1, 2, 8):
        plan = make_plan(changed(parallelism="fsdp"), find_devices(f"cpu:{count}"), None, changes="")
        sizes[count] = plan.result.arguments
        assert ("all-gather" in collectives_of(plan)) == (count > 1)
    assert sizes[8] < sizes[2] < sizes[1]


def test_over_fsdp_kernels_are_gathered_even_where_they_are_larger_than_what_is_multiplied_by_them():
    few = dataclasses.replace(
        changed(parallelism="fsdp"),
        model=dataclasses.replace(MODEL, d_model=64, d_ff=256),
        data=DataConfig(rows=8, source_slots=8, target_slots=8),
    )
    sizes = collectives_of(make_plan(few, find_devices("cpu:8"), None, changes=""))
    kernels, embedding = 4 * (12 * 64 * 64 + 4 * 64 * 256), 4 * 64 * 64
    # The embedding is gathered where it is looked up, and again where logits are made of it.
    assert sizes["all-gather"] == kernels + 2 * embedding


def test_what_micro_batches_do_in_a_loop_is_counted_as_often_as_it_turns():
    whole = make_plan(changed(parallelism="fsdp"), find_devices("cpu:2"), None, changes="")
    parts = make_plan(changed(parallelism="fsdp", rows_per_device=4), find_devices("cpu:2"), None, changes="")
    assert whole.micro_batches == 1 and parts.micro_batches == 4 and parts.rows == whole.rows
    assert parts.result.temporaries < whole.result.temporaries
    assert parts.result.flops is None
    # The parameters are gathered in each part, or once before them.
    assert collectives_of(parts)["all-gather"] >= collectives_of(whole)["all-gather"]


def test_where_there_is_no_room_remedies_are_added_until_there_is():
    devices = find_devices("cpu:4")
    (whole,) = plans(EXPERIMENT, devices, None)
    assert whole.fits and not whole.changes
    first, *others = plans(EXPERIMENT, devices, whole.result.peak - 1)
    assert isinstance(first.result, TooLarge) and first.result.needed == whole.result.peak
    assert [plan.fits for plan in others] == [False] * (len(others) - 1) + [True]
    assert others[-1].result.peak < whole.result.peak


class Refused:
    """A lowered step that no compiler has room for."""

    def compile(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G."
        )


def test_the_remedies_come_in_turn_and_one_that_is_there_is_passed_over(monkeypatch):
    monkeypatch.setattr(planning, "_lower", lambda *arguments: Refused())
    devices = find_devices("cpu:4")
    found = list(plans(EXPERIMENT, devices, None))
    assert all(plan.result.needed == 24.5 * 2**30 and plan.result.available == 15.75 * 2**30 for plan in found)
    # Eight rows a device: four parts leave room for twice the excess.
    names = ["training.rows_per_device=2", "training.loss_chunks=8", "model.remat=True", "training.parallelism=fsdp"]
    assert [plan.changes for plan in found] == [", ".join(names[:count]) for count in range(5)]
    again = changed(rows_per_device=1, loss_chunks=4, parallelism="fsdp")
    assert [plan.changes for plan in plans(again, devices, None)] == ["", "model.remat=True"]


def test_a_loop_turns_as_often_as_its_condition_says_where_xla_does_not_tell():
    text = """HloModule step
%body (p: (s32[])) -> (s32[]) {
  %r = f32[5]{0} all-reduce(%x), channel_id=1, to_apply=%add, backend_config={"estimated_cycles":"10"}
  %r2 = f32[5]{0} all-reduce(%x), channel_id=1, to_apply=%add
}
%condition (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
}
%async (p: f32[5]) -> f32[9] {
  %g = (f32[5]{0}, bf16[9]{0}) all-gather-start(%x), channel_id=2
}
%async_end (p: f32[5]) -> f32[9] {
  %g = (f32[5]{0}, bf16[9]{0}) all-gather-start(%x), channel_id=2
}
ENTRY %main (p: f32[5]) -> f32[5] {
  %w = (s32[]) while(%t), condition=%condition, body=%body
  %f = f32[9] fusion(%p), kind=kCustom, calls=%async, backend_config={"estimated_cycles":"3"}
  %h = f32[9] fusion(%p), kind=kCustom, calls=%async_end
}
"""
    module = Module(text)
    assert module.has_loops and module.cycles(loops=True) == 73 and module.cycles(loops=False) == 13
    assert {(each.kind, each.count, each.bytes) for each in planning.read_collectives(module)} == {
        ("all-reduce", 14, 14 * 5 * 4),
        ("all-gather", 1, 9 * 2),
    }


def test_the_devices_are_those_asked_for():
    assert find_devices("here") == jax.devices() and len(find_devices("cpu:3")) == 3
    for topology in ("cpu:9", "cpu:", "cpu:x", "cpu:0"):
        with pytest.raises(ValueError, match="give cpu:N"):
            find_devices(topology)


def test_the_tpus_compiler_is_named_where_it_is_missing_and_knows_slices_where_it_is_there():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'flax_transformer\[libtpu\]'"):
            find_devices("v5e:4x4")
        return
    assert len(find_devices("v5e:4x4")) == 16 and len(find_devices("v4:2x2x1")) == 4
    with pytest.raises(ValueError, match="v5e:3x7.*e.g. v5e:4x4"):
        find_devices("v5e:3x7")
