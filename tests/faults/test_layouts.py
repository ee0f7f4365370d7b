import numpy as np
import pytest

from tests.faults.conftest import SmallTraining

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    training = SmallTraining(tmp_path_factory.mktemp("unbroken"), {"training.steps": 18})
    training.finish(devices=8)
    return training


@pytest.mark.slow
def test_eight_devices_then_two_processes_then_one_device_continue_the_same_sequence(unbroken, small_training):
    moved = small_training("moved", training__steps=18, training__checkpoints__every=6)
    for steps, layout in ((6, {"devices": 8}), (12, {"devices": 4, "processes": 2}), (18, {"devices": 1})):
        moved.finish(flags=(f"--config.training.steps={steps}",), **layout)
        assert moved.steps()[-1] == steps
    assert {line["process"] for line in moved.lines()} == {0, 1}
    assert list(moved.sentences()) == list(range(1, 19))
    assert moved.sentences() == unbroken.sentences()


@pytest.mark.slow
def test_from_one_state_all_layouts_make_the_same_next_step_except_for_rounding(small_training):
    """Without dropout, since under pmap its bits depend on the number of devices."""
    changes = {"model__dropout_rate": 0.0, "training__checkpoints__every": 6}
    losses = {}
    for name, layout in (
        ("eight", {"devices": 8}),
        ("processes", {"devices": 4, "processes": 2}),
        ("one", {"devices": 1}),
    ):
        training = small_training(name, **changes)
        training.finish(devices=8, flags=("--config.training.steps=6",))
        training.finish(flags=("--config.training.steps=18",), **layout)
        losses[name] = training.losses()
        assert list(losses[name]) == list(range(1, 19))
    for name in ("processes", "one"):
        drift = [abs(losses[name][step] / losses["eight"][step] - 1) for step in range(1, 19)]
        print(f"{name}: relative difference of the loss at steps 7 to 18:", *(f"{value:.1e}" for value in drift[6:]))
        assert max(drift[:6]) == 0
        assert drift[6] < 1e-5
        assert max(drift) < 1e-2


HELD_OUT = (
    "--config.data.valid=locale_phrases:kn:en:valid?pairs=11&parts=1",
    "--config.data.test=locale_phrases:kn:en:test?pairs=13&parts=1",
    "--config.training.evaluation.every=18",
)


@pytest.mark.slow
def test_a_state_divided_between_two_processes_continues_on_any_layout(unbroken, small_training):
    # A rate that does not depend on the number of steps.
    changes = {
        "training__schedule__name": "inverse_sqrt",
        "training__checkpoints__every": 6,
        "model__dropout_rate": 0.0,
    }
    pmapped = small_training("pmapped", training__steps=18, **changes)
    (expected,) = pmapped.finish(devices=4, flags=HELD_OUT)
    parts = small_training("parts", training__steps=18, **changes)
    (first, _) = parts.finish(
        devices=2,
        processes=2,
        flags=("--config.training.steps=6", "--config.training.parallelism.layout=data=2,fsdp=2"),
    )
    assert "jit over a mesh of 2 data x 2 fsdp on 4 cpu devices of 2 processes" in first.stdout
    parts.finish(devices=4, flags=("--config.training.steps=12",))
    (last, _) = parts.finish(devices=2, processes=2, flags=("--config.training.parallelism.layout=fsdp", *HELD_OUT))
    # The parameters are gathered for translating, and divided again for scoring.
    for line in ("test corpus, ", "exact match: "):
        (ours,), (theirs,) = (
            [said for said in process.stdout.splitlines() if said.startswith(line)] for process in (last, expected)
        )
        assert ours.partition(", trained in")[0] == theirs.partition(", trained in")[0]
    assert parts.sentences() == unbroken.sentences()
    for step, loss in pmapped.losses().items():
        np.testing.assert_allclose(parts.losses()[step], loss, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_write_the_same_bits_as_one_process_with_eight_devices(unbroken, small_training):
    pair = small_training("pair", training__steps=18)
    ended = pair.finish(devices=4, processes=2)
    assert "pmap on 8 cpu devices of 2 processes" in ended[0].stdout
    # The other process prints nothing but lines on connecting, of which Gloo's may be torn.
    assert [line for line in ended[1].stdout.splitlines() if "connect" not in line and "Gloo" not in line] == []
    assert pair.sentences() == unbroken.sentences()
    for step, loss in unbroken.losses().items():
        np.testing.assert_allclose(pair.losses()[step], loss, rtol=1e-3)
