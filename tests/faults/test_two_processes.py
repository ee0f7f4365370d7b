import shutil
import socket
import subprocess
import sys
import time

import pytest

from flax_transformer.workdir import WorkDirectory
from tests.faults.conftest import LONG, ROOT, differences, said

pytestmark = pytest.mark.faults

PAIR = {"devices": 2, "processes": 2}


def start_unlike(training, *flags):
    """Starts two processes of a training, the second one with its own options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (
        training.start(devices=2, flags=(f"--coordinator=127.0.0.1:{port}", "--num_processes=2", *more))[0]
        for more in (("--process_id=0",), ("--process_id=1", *flags))
    )
    return [first, second]


def ends_of(training, started, seconds=150):
    """Waits until both processes end by themselves; both must fail with a message."""
    begin = time.monotonic()
    ended = training.wait(started, seconds)
    print(f"both ended {time.monotonic() - begin:.1f} s after they were started")
    assert all(process.returncode not in (0, -9) for process in ended)
    return ended


@pytest.mark.slow
def test_when_a_process_is_killed_the_other_ends_and_both_continue_to_the_same_bits(unbroken_long_pair, small_training):
    """jax notices the death of process 1 after about 90 seconds, that of process 0 at once."""
    trainings = {victim: small_training(f"kill {victim}", **LONG) for victim in (1, 0)}
    survivors, killed_at = {}, {}
    for victim, training in trainings.items():
        started = training.start(**PAIR)
        training.wait_for_step(30, started)
        started[victim].kill()
        started[victim].communicate()
        killed_at[victim], survivors[victim] = time.monotonic(), started[1 - victim]
    for victim, training in reversed(trainings.items()):
        (survivor,) = training.wait([survivors[victim]], seconds=180)
        print(f"process {victim} killed, the other one ended {time.monotonic() - killed_at[victim]:.0f} s later")
        assert survivor.returncode not in (0, -9)
        assert "another task died" in survivor.stderr or "train.py: " in survivor.stderr
        training.finish(**PAIR)
        assert differences(training.state(), unbroken_long_pair.state()) == []
        assert training.losses() == unbroken_long_pair.losses()


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--config.data.train=files:none.kn,none.en", "cannot read none.kn (No such file or directory)"),
        ("--workdir={other}", "process 1 does not see the vocabulary that process 0 wrote"),
    ],
    ids=["corpus", "workdir"],
)
def test_an_error_in_one_process_ends_both_and_both_say_why(flag, reason, small_training, tmp_path):
    training = small_training(**LONG)
    started = start_unlike(training, flag.format(other=tmp_path / "other"))
    first, second = ends_of(training, started)
    assert [first.returncode, second.returncode] == [1, 1]
    (line,) = said(second)
    assert line.startswith("train.py: ") and reason in line
    (line,) = said(first)
    assert line.startswith("train.py: process 1 failed: ") and reason in line


def test_different_settings_in_one_process_end_both(small_training):
    training = small_training(**LONG)
    flag = "--config.data.train=locale_phrases:kn:en:train?pairs=601&parts=1"
    for process in ends_of(training, start_unlike(training, flag)):
        assert process.returncode == 1
        assert "process 1 has other settings than process 0 (data.train): give all the same" in process.stderr


@pytest.mark.slow
def test_a_second_training_in_a_work_directory_is_refused_also_with_two_processes(small_training):
    training = small_training(**LONG | {"training__steps": 100_000})
    (running,) = training.start()
    try:
        training.wait_for_step(2, [running])
        (alone,) = training.run()
        first, second = ends_of(training, training.start(**PAIR))
        for refused in (alone, first, second):
            assert refused.returncode == 1
            (line,) = said(refused)
            assert f"process {running.pid} on host" in line and "has been training there since" in line
        assert running.poll() is None
    finally:
        training.kill([running])


SCORED = {
    "training__steps": 10,
    "training__checkpoints__every": 5,
    "training__evaluation__every": 10,
    "training__optimizer__ema_decay": 0.9,
    "training__evaluation__sentences": 0,
    "model__dropout_rate": 0.0,
    "data__valid": "locale_phrases:kn:en:valid?pairs=31&parts=1",
    "data__test": "locale_phrases:kn:en:test?pairs=37&parts=1",
}


def scores_of(training, weights, **layout):
    """The scores of a finished training on both held-out corpora, from its last evaluation and test."""
    # Without its scores, the last step is evaluated again.
    (training.workdir / "scores.json").unlink(missing_ok=True)
    average = 2 if weights == "averaged" else 0
    flags = (f"--config.training.weights={weights}", f"--config.training.checkpoints.average_last={average}")
    training.finish(flags=flags, **layout)
    metrics = WorkDirectory(training.workdir).read_metrics()
    return [line for line in metrics if line["kind"] in ("valid", "test")][-2:]


@pytest.mark.slow
def test_two_processes_score_checkpoints_like_one_with_any_weights_and_the_result_translates(small_training):
    one, two = small_training("one", **SCORED), small_training("two", **SCORED)
    losses = set()
    for weights in ("trained", "ema", "averaged"):
        of_one = scores_of(one, weights, devices=4)
        if weights == "trained":
            shutil.copytree(one.workdir, two.workdir)
        of_two = scores_of(two, weights, **PAIR)
        assert [line["kind"] for line in of_two] == ["valid", "test"]
        for expected, found in zip(of_one, of_two, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            for name in ("step", "bleu", "chrf", "exact_match"):
                assert found[name] == pytest.approx(expected[name])
        losses.add(of_two[-1]["loss"])
    assert len(losses) == 3
    command = [sys.executable, "-m", "flax_transformer", "translate", f"--workdir={two.workdir}"]
    translated = subprocess.run(command, input="ಒಂದು\nಎರಡು\n", cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert translated.returncode == 0, translated.stderr
    assert len(translated.stdout.splitlines()) == 2
