import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import LONG, differences, said

pytestmark = pytest.mark.faults

PAIR = {"devices": 2, "processes": 2}
# Translating so many takes a while, since a model that has learned little does not end its sentences.
EVALUATED = LONG | {
    "training__steps": 20,
    "training__checkpoints__every": 10,
    "training__evaluation__every": 10,
    "training__evaluation__sentences": 0,
    "data__valid": "locale_phrases:kn:en:valid?pairs=1200&parts=1",
}


def stopped_behind(ended, training, status, name):
    """The step after which a process stopped, which is in its only line, in the checkpoints and in the metrics."""
    # Some validation phrases have letters that so small a vocabulary lacks, which gives a warning.
    (line,) = (line for line in said(ended) if ": warning: " not in line)
    step = training.steps()[-1]
    assert line == f"train.py: {name}: stopped after the checkpoint of step {step}; the same command continues there"
    assert ended.returncode == status
    return step


def assert_equal(training, unbroken):
    assert differences(training.state(), unbroken.state()) == []
    assert training.losses() == unbroken.losses()
    assert training.sentences() == unbroken.sentences()


def test_sigterm_and_ctrl_c_stop_after_a_checkpoint_and_the_same_command_continues(unbroken_long, small_training):
    training, steps = small_training(**LONG), [0]
    for number, status, begun in ((signal.SIGTERM, 143, 30), (signal.SIGINT, 130, 60)):
        started = training.start()
        training.wait_for_step(begun, started)
        started[0].send_signal(number)
        (ended,) = training.wait(started)
        step = stopped_behind(ended, training, status, number.name)
        assert begun <= step < 96
        assert list(training.losses()) == list(range(1, step + 1))
        assert training.lines()[-1]["step"] == step
        steps.append(step)
    (ended,) = training.finish()
    assert f"steps {steps[-1]} to 96" in ended.stdout
    assert_equal(training, unbroken_long)


@pytest.mark.slow
def test_signals_of_schedulers_and_of_a_closed_terminal_stop_training_like_sigterm(unbroken_long, small_training):
    """SIGHUP comes twice, from the terminal and from the shell, and SIGXCPU every second."""
    training = small_training(**LONG)
    for numbers, begun in (([signal.SIGHUP] * 2, 20), ([signal.SIGXCPU] * 3, 40), ([signal.SIGUSR1], 60)):
        started = training.start()
        training.wait_for_step(begun, started)
        for number in numbers:
            started[0].send_signal(number)
        (ended,) = training.wait(started)
        assert begun <= stopped_behind(ended, training, 128 + number, number.name) < 96
    training.finish()
    assert_equal(training, unbroken_long)


def wait_until_noticed(process, number):
    """Waits until a process handles a signal itself, according to Linux."""
    while True:
        (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if int(caught, 16) >> (number - 1) & 1:
            return
        assert process.poll() is None
        time.sleep(0.01)


BEFORE = "train.py: {}: stopped before the first step; nothing is lost, and the same command starts again"


@pytest.mark.parametrize("moment", ["imports", pytest.param("compiling", marks=pytest.mark.slow)])
def test_two_processes_end_before_the_first_step_of_a_training_that_is_resumed(moment, small_training):
    training = small_training(**LONG | {"training__steps": 8})
    training.finish()
    started = training.start(**PAIR, flags=("--config.training.steps=100000",))
    wait_until_noticed(started[1], signal.SIGHUP)
    if moment == "compiling":
        while "parameters, " not in started[0].stdout.readline():
            assert started[0].poll() is None
    started[1].send_signal(signal.SIGHUP)
    ended = training.wait(started, seconds=60)
    assert [said(process) for process in ended] == [[BEFORE.format("SIGTERM")], [BEFORE.format("SIGHUP")]]
    assert [process.returncode for process in ended] == [143, 129]
    assert training.steps() == [8]


@pytest.mark.slow
def test_sigterm_during_an_evaluation_ends_it_and_the_next_run_evaluates_first(small_training):
    unbroken = small_training("unbroken", **EVALUATED)
    unbroken.finish()
    training = small_training(**EVALUATED)
    started = training.start()
    while 10 not in training.steps():
        assert started[0].poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    assert not (training.workdir / "scores.json").exists()
    begin = time.monotonic()
    started[0].send_signal(signal.SIGTERM)
    (ended,) = training.wait(started)
    print(f"ended {time.monotonic() - begin:.1f} s after the signal")
    assert time.monotonic() - begin < 10
    assert stopped_behind(ended, training, 143, "SIGTERM") == 10
    assert not (training.workdir / "scores.json").exists()
    training.finish()
    assert list(scores(training)) == ["10", "20"]
    assert scores(training) == scores(unbroken)
    assert_equal(training, unbroken)


def scores(training):
    return json.loads((training.workdir / "scores.json").read_text())


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_whichever_gets_the_signal(unbroken_long_pair, small_training):
    training = small_training(**LONG)
    for number, told, names, begun in (
        (signal.SIGTERM, 1, ("SIGTERM", "SIGTERM"), 30),
        (signal.SIGINT, 0, ("SIGINT", "SIGTERM"), 60),
    ):
        started = training.start(**PAIR)
        training.wait_for_step(begun, started)
        started[told].send_signal(number)
        ended = training.wait(started)
        for process, name in zip(ended, names, strict=True):
            step = stopped_behind(process, training, {"SIGTERM": 143, "SIGINT": 130}[name], name)
        assert begun <= step < 96
        assert list(training.losses()) == list(range(1, step + 1))
    training.finish(**PAIR)
    assert_equal(training, unbroken_long_pair)
