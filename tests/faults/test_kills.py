"""Kills trainings at random moments; continued, they must end with the same bits as a training that was never killed.

    KILLS=50 pytest -m faults tests/faults/test_kills.py -s

kills 50 trainings, and without the variable a few. SEED chooses other moments.
"""

import os
import random
import time

import pytest

from tests.faults.conftest import differences

pytestmark = pytest.mark.faults

RUNS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("SEED", "0"))
# A checkpoint after every second step, so that many kills happen while one is being written. Each epoch, of which there
# are three, has its own tokens.
OFTEN = {
    "training__checkpoints__every": 2,
    "training__steps": 40,
    "data__source_sampling": 0.1,
    "data__target_sampling": 0.1,
}


def kill_and_restart(training, rng, *, victims=(0,), **layout):
    """Runs a training to its end, killing it a few times at random; returns the steps at which it was killed."""
    killed_at = []
    for _ in range(rng.randint(1, 3)):
        begun = len(training.lines())
        started = training.start(**layout)
        # Usually during the steps and saves, sometimes while it starts.
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            # The first step is done when the second one starts.
            while len(training.lines()) <= begun + len(started) and started[0].poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 2.0))
        killed_at.append(training.lines()[-1]["step"] if training.lines() else 0)
        training.kill([started[victim] for victim in victims])
        training.wait(started)
    training.finish(**layout)
    return killed_at


@pytest.mark.parametrize("kind", ["one device", pytest.param("eight devices", marks=pytest.mark.slow)])
def test_a_training_that_is_killed_at_random_ends_with_the_bits_of_an_uninterrupted_one(kind, small_training):
    rng, layout = random.Random(f"{SEED} {kind}"), {"devices": {"one device": 1, "eight devices": 8}[kind]}
    unbroken = small_training("unbroken", **OFTEN)
    unbroken.finish(**layout)
    expected = unbroken.state()
    for run in range(RUNS if kind == "one device" else max(1, RUNS // 10)):
        training = small_training(f"killed {run}", **OFTEN)
        killed_at = kill_and_restart(training, rng, **layout)
        assert differences(training.state(), expected) == [], f"run {run}, killed at steps {killed_at}"
        assert training.losses() == unbroken.losses()
        assert training.sentences() == unbroken.sentences()
        assert not [path for path in (training.workdir / "checkpoints").iterdir() if not path.name.isdigit()]
        print(f"{kind}, run {run}: killed at steps {killed_at}, equal to the bit", flush=True)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_with_the_bits_of_an_uninterrupted_pair(small_training):
    rng, layout = random.Random(SEED), {"devices": 2, "processes": 2}
    unbroken = small_training("unbroken", **OFTEN)
    unbroken.finish(**layout)
    expected = unbroken.state()
    for run in range(max(1, RUNS // 10)):
        training = small_training(f"killed {run}", **OFTEN)
        killed_at = kill_and_restart(training, rng, victims=(run % 2,), **layout)
        assert differences(training.state(), expected) == [], f"run {run}, killed at steps {killed_at}"
        assert training.losses() == unbroken.losses()
        print(f"pair, run {run}: process {run % 2} killed at steps {killed_at}, equal to the bit", flush=True)
