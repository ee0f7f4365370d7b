"""Trains without streams, with full ones, in other encodings and in a terminal that is closed: no work is lost."""

import contextlib
import os
import pty
import signal
import sys
import threading

import pytest

from flax_transformer.workdir import WorkDirectory
from tests.faults.conftest import LONG, ROOT
from tests.xla_flags import QUICK_COMPILING

pytestmark = pytest.mark.faults

TESTED = {
    "training__steps": 6,
    "training__checkpoints__every": 3,
    "training__evaluation__sentences": 0,
    "data__test": "locale_phrases:kn:en:test?pairs=11&parts=1",
}


@pytest.mark.slow
def test_a_training_without_output_trains_and_tests_and_does_not_corrupt_its_files(small_training):
    training = small_training(**TESTED)
    for times, shell in ((1, "<&- >&- 2>&-"), (2, ">/dev/full 2>/dev/full")):
        (ended,) = training.finish(shell=shell)
        assert ended.stdout == ended.stderr == ""
        assert [line["kind"] for line in WorkDirectory(training.workdir).read_metrics()].count("test") == times
    assert training.steps() == [3, 6]
    for file in training.workdir.iterdir():
        assert not file.is_file() or b"parameters, " not in file.read_bytes()


@pytest.mark.slow
def test_samples_that_the_terminal_cannot_show_are_escaped_and_the_scores_are_shown(small_training):
    training = small_training(**TESTED)
    for encoding in ("latin-1", "ascii:strict"):
        (ended,) = training.finish(environment={"PYTHONIOENCODING": encoding})
        assert "source  \\u0c" in ended.stdout and "test corpus, checkpoint 6, greedy search: BLEU" in ended.stdout
        assert "exact match: " in ended.stdout.splitlines()[-1]


def test_when_its_terminal_is_closed_a_training_stops_after_a_checkpoint_with_the_status_of_sighup(small_training):
    training = small_training(**LONG | {"training__steps": 100_000, "training__checkpoints__every": 100_000})
    settings = [f"--config.{name}={value}" for name, value in training._settings.items()]
    command = [sys.executable, str(ROOT / "tests/faults/observed_train.py"), "--config=configs/quickstart.py"]
    command += [f"--workdir={training.workdir}", *settings]
    environment = os.environ | {
        "OBSERVED": str(training.observed),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_COMPILING,
    }
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(command[0], command, environment)

    def read():
        with contextlib.suppress(OSError):
            while os.read(terminal, 1000):
                pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while not any(line["step"] >= 20 for line in training.lines()):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGHUP)  # the shell sends it as well as the terminal
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 128 + signal.SIGHUP
    assert training.steps()[-1] == list(training.losses())[-1] >= 20
