"""Sends signals and checks what they do: a training stops as soon as nothing is lost, on all processes at one step."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from flax_transformer.processes.interruption import OVER, Interrupted, Interruption

ROOT = Path(__file__).parents[2]


def test_the_first_signal_is_handled_and_the_second_has_its_default_effect(monkeypatch):
    now = [100.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("flax_transformer.processes.interruption.time", clock)
    told = []
    # Not Python's default handler, because shells make background jobs ignore SIGINT.
    ours = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        before = signal.getsignal(signal.SIGINT)
        with Interruption() as interruption:
            assert interruption.check(1) is None
            signal.raise_signal(signal.SIGINT)
            assert interruption.check(2) is signal.SIGINT and not told
            signal.raise_signal(signal.SIGINT)
            assert not told  # so soon, it is the same request
            now[0] += 1.5
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, ours)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_repeated_scheduler_signals_do_not_make_the_next_sigterm_a_second_one(name):
    number = signal.Signals[name]
    before = [signal.getsignal(each) for each in (number, signal.SIGTERM)]
    with Interruption() as interruption:
        for _ in range(3):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.check(1) is number
    assert [signal.getsignal(each) for each in (number, signal.SIGTERM)] == before


def test_a_signal_that_was_ignored_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.check(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_works_in_a_thread_that_cannot_handle_signals():
    noticed = []

    def enter():
        with Interruption() as interruption:
            noticed.append(interruption.check(1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert noticed == [None]


def test_only_a_signal_stops_repeatable_work():
    with Interruption() as interruption:
        interruption.stop_after_checkpoint(4)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM: stopped .* step 5;"):
            interruption.stop_after_checkpoint(5)


# A program that is busy outside Python, where Python's handlers cannot run, except in the middle part.
PROGRAM = """
import hashlib, sys, time
from flax_transformer.processes.interruption import Interrupted, Interruption

def busy():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)

with Interruption("program") as interruption:
    where = sys.argv[1]
    interruption.expect_peers(where == "connecting")
    if where in ("before", "connecting"):
        print("ready", flush=True)
        busy()
    interruption.check(7)
    if where == "after":
        interruption.training_is_over()
    print("ready", flush=True)
    if where == "between":
        busy()
    if where == "step":
        while not (number := interruption.check(8)):
            time.sleep(0.01)
        sys.exit(Interrupted(8, number).exit_status)
    busy()
"""


@pytest.fixture(autouse=True)
def noticed():
    """Lets this process and those that it starts notice SIGHUP, also where nohup runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def program():
    """Starts the program, which is killed after the test if it has not ended."""
    with contextlib.ExitStack() as stack:

        def start(where):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, where],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            return process

        yield start


@pytest.mark.parametrize(("where", "when"), [("before", "before the first step"), ("after", "after the last step")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_program_with_nothing_to_save_ends_at_once_with_a_message(program, where, when, number):
    process = program(where)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert error.startswith(f"program: {number.name}: stopped {when}; nothing is lost") and error.count("\n") == 1
    assert process.returncode == 128 + number


def test_a_program_that_is_still_connecting_waits_for_the_others_unless_a_second_sigterm_comes(program):
    process = program("connecting")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "stopped at once" in process.communicate(timeout=60)[1] and process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_steps_is_returned_by_the_next_check(program, number):
    process = program("step")
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 128 + number


@pytest.mark.parametrize(
    ("numbers", "apart", "ends"),
    [
        ([signal.SIGTERM], 0.2, False),
        ([signal.SIGTERM, signal.SIGTERM], 0, False),  # make passes on what its children have received already
        ([signal.SIGTERM, signal.SIGTERM], 0.2, False),
        ([signal.SIGTERM, signal.SIGTERM], 1.5, True),
        ([signal.SIGINT, signal.SIGTERM], 1.5, True),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGXCPU, signal.SIGINT], 0.2, False),
    ],
    ids=lambda value: "-".join(number.name for number in value) if isinstance(value, list) else "",
)
def test_a_second_sigterm_or_ctrl_c_ends_a_program_that_has_something_to_save(program, numbers, apart, ends):
    process = program("between")
    for number in numbers:
        process.send_signal(number)
        time.sleep(apart)
    if ends:
        assert f"program: {numbers[-1].name}: stopped at once" in process.communicate(timeout=60)[1]
        assert process.returncode == 128 + numbers[-1]
    else:
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()
        assert process.communicate()[1] == ""


class Store:
    """A replacement for the communication of processes, within one process."""

    def __init__(self, count):
        self.count, self.stop, self.posted = count, threading.Event(), {}


class FakePeers:
    def __init__(self, store, number):
        self.store, self.number = store, number

    def ask(self):
        self.store.stop.set()

    def asked(self):
        return self.store.stop.is_set()

    def post(self, position):
        self.store.posted.setdefault(self.number, position)

    def positions(self, ended):
        while len(self.store.posted) < self.store.count and not ended.is_set():
            time.sleep(0.001)
        return list(self.store.posted.values()) if len(self.store.posted) == self.store.count else None

    def leave(self, status):
        raise AssertionError("nothing may end this process")


@pytest.mark.parametrize("seed", range(5))
def test_processes_that_are_steps_apart_stop_after_the_same_step(seed, monkeypatch):
    """They start from a step other than 0, as resumed trainings do, and one asks all to stop at a random moment."""
    monkeypatch.setattr("flax_transformer.processes.interruption.LOOK_INTERVAL", 0.005)
    store, first, stopped = Store(3), 40, {}

    def train(number):
        rng = random.Random(100 * seed + number)
        with Interruption() as interruption:
            interruption.meet(FakePeers(store, number))
            for step in range(first + 1, first + 2000):
                time.sleep(rng.uniform(0, 0.002))
                if interruption.check(step):
                    stopped[number] = step
                    return

    threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(random.Random(seed).uniform(0, 0.1))
    store.stop.set()
    for thread in threads:
        thread.join(timeout=20)
    assert len(stopped) == 3 and len(set(stopped.values())) == 1 and OVER not in stopped.values()
    assert stopped[0] > max(store.posted.values())


def test_without_a_signal_nothing_stops(monkeypatch):
    monkeypatch.setattr("flax_transformer.processes.interruption.LOOK_INTERVAL", 0.005)
    with Interruption() as interruption:
        interruption.meet(FakePeers(Store(2), 0))
        for step in range(1, 20):
            time.sleep(0.002)
            assert interruption.check(step) is None
