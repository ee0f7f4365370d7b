import datetime
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from etils import epath

from flax_transformer.processes import lock
from flax_transformer.processes.lock import TrainingLock
from tests.fake_scheme import fake_bucket

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()

# Takes the lock, says so, and holds it until its input is closed.
HOLD = """
import sys
from etils import epath
from flax_transformer.processes.lock import TrainingLock

with TrainingLock(epath.Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start():
    """Starts another process that takes a folder's lock; all of them have ended when the test has."""
    processes = []

    def start(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_training_is_refused_until_the_first_has_ended_even_by_kill_9(start, tmp_path):
    path = tmp_path / "runs" / "first"
    first = start(path)
    assert first.stdout.readline() == "holds\n"
    kept = path / "config.json"
    kept.write_text("{}")

    second = start(path)
    _, error = second.communicate()
    last = error.splitlines()[-1]
    assert second.returncode == 1 and last.startswith(f"ValueError: {path}: process {first.pid} on host {HOST} has ")
    assert last.endswith(": wait until it ends or stop it, or give another --workdir")
    assert kept.read_text() == "{}" and json.loads((path / "training.lock").read_text())["process"] == first.pid

    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start(path)
    assert third.stdout.readline() == "holds\n"
    assert json.loads((path / "training.lock").read_text())["process"] == third.pid


def test_the_refusal_says_when_the_first_training_started(tmp_path):
    path = epath.Path(tmp_path)
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    message = rf"process {os.getpid()} on host {HOST} has been training there since (\S+): wait"
    with TrainingLock(path):
        with pytest.raises(ValueError, match=message) as caught, TrainingLock(path):
            pass
        entry = json.loads((tmp_path / "training.lock").read_text())
    assert "\n" not in str(caught.value)
    assert entry.keys() == {"host", "process", "since"} and entry["since"] in str(caught.value)
    since = datetime.datetime.fromisoformat(entry["since"])
    assert before <= since <= datetime.datetime.now(datetime.UTC) and since.utcoffset() == datetime.timedelta(0)


def test_a_released_lock_names_nobody_and_can_be_taken_again(start, tmp_path):
    taken = TrainingLock(epath.Path(tmp_path))
    for _ in range(2):
        with taken:
            assert (tmp_path / "training.lock").read_bytes()
        assert (tmp_path / "training.lock").read_bytes() == b""
    assert start(tmp_path).stdout.readline() == "holds\n"


def test_an_error_inside_releases_the_lock(tmp_path):
    path = epath.Path(tmp_path)
    with pytest.raises(KeyError), TrainingLock(path):
        raise KeyError
    with TrainingLock(path):
        pass


@pytest.mark.parametrize("text", [b"", b"{", b"3", b"\xff", b'{"host": "here"}'])
def test_a_lock_without_a_readable_name_is_respected_too(text, tmp_path):
    path = epath.Path(tmp_path)
    with TrainingLock(path):
        (tmp_path / "training.lock").write_bytes(text)
        with pytest.raises(ValueError, match="another process trains there: wait"), TrainingLock(path):
            pass


def test_a_child_that_outlives_the_training_does_not_keep_the_lock(tmp_path):
    path = epath.Path(tmp_path)
    with TrainingLock(path) as taken:
        # What fork does to an open file: one more name for it.
        forked = os.dup(taken._lock)
    with TrainingLock(path):
        os.close(forked)


@pytest.fixture
def bucket(tmp_path):
    """A work directory in a fake bucket, where the heartbeat replaces the lock."""
    with fake_bucket(tmp_path):
        yield epath.Path("gs://bucket/runs/first")


def beat_of(process, host, seconds_ago):
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    return json.dumps({"host": host, "process": process, "time": moment.isoformat()})


def enter(path):
    """Takes and releases the lock, and returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with TrainingLock(path):
            pass
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("seconds_ago", "shown"), [(-30, "0"), (42, "4[2-9]"), (290, "29[0-9]")])
def test_a_recent_heartbeat_of_another_process_is_a_warning(elsewhere, seconds_ago, shown, bucket):
    # Different hosts use the same process ids, and one host has many processes.
    process, host = (os.getpid(), "elsewhere") if elsewhere else (os.getpid() + 1, HOST)
    (bucket / "training.heartbeat").write_text(beat_of(process, host, seconds_ago))
    with pytest.warns(
        match=rf"^gs://bucket/runs/first: process {process} on host {host} seems to train there, it was seen {shown} "
        "seconds ago: stop one of the two, or give another --workdir; if it was pre-empted .* all is well$"
    ):
        with TrainingLock(bucket):
            pass


def test_old_and_own_heartbeats_are_no_warning(bucket):
    assert enter(bucket) == []
    for process, host, seconds_ago in ((1, "elsewhere", 301), (os.getpid(), HOST, 1)):
        (bucket / "training.heartbeat").write_text(beat_of(process, host, seconds_ago))
        assert enter(bucket) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"host": "elsewhere", "process"',
        "3",
        '{"host": "elsewhere", "process": 1, "time": "2999-01-01T00:00:00"}',  # no time zone
    ],
)
def test_a_damaged_heartbeat_is_ignored_and_replaced(text, bucket):
    (bucket / "training.heartbeat").write_text(text)
    assert enter(bucket) == [] and not (bucket / "training.heartbeat").exists()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 seconds"
        time.sleep(0.01)


def test_a_heartbeat_is_renewed_during_training_and_removed_at_its_end(bucket, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_INTERVAL", 0.05)
    file = bucket / "training.heartbeat"
    taken = TrainingLock(bucket)
    for _ in range(2):
        with taken:
            for _ in range(2):
                file.write_text(beat_of(1, "elsewhere", 400))
                wait_for(lambda: json.loads(file.read_text())["process"] == os.getpid())
            entry = json.loads(file.read_text())
            assert entry.keys() == {"host", "process", "time"} and entry["host"] == HOST
            written = datetime.datetime.fromisoformat(entry["time"])
            assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(seconds=30)
        assert not file.exists()


def test_another_trainings_heartbeat_is_not_removed(bucket):
    file = bucket / "training.heartbeat"
    with TrainingLock(bucket):
        file.write_text(beat_of(1, "elsewhere", 3))
    assert json.loads(file.read_text())["host"] == "elsewhere"


def test_a_heartbeat_that_cannot_be_written_does_not_end_training(bucket, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_INTERVAL", 0.05)
    failures = []

    def fail(self, data):
        failures.append(self.name)
        raise RuntimeError("the network is away")

    with monkeypatch.context() as away:
        away.setattr(type(bucket), "write_bytes", fail)
        with TrainingLock(bucket):
            wait_for(lambda: len(failures) > 2)
            away.undo()
            wait_for((bucket / "training.heartbeat").exists)
    assert set(failures) == {"training.heartbeat"}


def test_a_network_share_without_locks_gets_a_heartbeat(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = epath.Path(tmp_path)
    with TrainingLock(path):
        assert json.loads((path / "training.heartbeat").read_text())["process"] == os.getpid()
    assert not (path / "training.heartbeat").exists()


def test_another_error_of_the_lock_is_not_reported_as_a_training(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"), TrainingLock(epath.Path(tmp_path)):
        pass
