"""Lets a signal end a training as soon as no work is lost: before the first step, after a checkpoint, or at the end.

SIGTERM is what a pre-empted machine and a scheduler send, SIGINT is Ctrl-C, SIGHUP says that the terminal or the ssh
connection is gone. Slurm and grids send SIGUSR1, SIGUSR2 or SIGXCPU some time before they end a job. SIGHUP often comes
twice, from the terminal and from the shell, and SIGXCPU every second; so only a second SIGTERM or SIGINT ends at once.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn, Protocol, runtime_checkable

from tqdm import tqdm

INSISTING = (signal.SIGTERM, signal.SIGINT)
# These end a training unless whoever started it had them ignored, as nohup does with SIGHUP.
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

# Where a training stands, if not after a step, whose number says it then.
BEFORE_FIRST_STEP, OVER = 0, sys.maxsize

# In seconds: how often the other processes are asked, and how long one that is told to stop while it connects with them
# waits to tell them.
LOOK_INTERVAL, MEETING_TIMEOUT = 0.5, 30.0


class Interrupted(Exception):
    """A training was told to stop, and did so after writing a checkpoint.

    Attributes:
        step: the checkpoint's.
        signal: what told it.
    """

    def __init__(self, step: int, number: signal.Signals):
        """Says what happened, and what goes on."""
        super().__init__(f"{number.name}: stopped behind the checkpoint of step {step}; the same command goes on there")
        self.step, self.signal = step, number

    @property
    def exit_status(self) -> int:
        """What a shell gives a program that this signal ended."""
        return 128 + self.signal


@runtime_checkable
class Peers(Protocol):
    """The processes of one training, as an interruption needs them (`hosts.Peers`)."""

    def ask(self) -> None:
        """Asks all of them to stop."""

    def asked(self) -> bool:
        """Whether one of them has asked all to stop."""

    def post(self, position: int) -> None:
        """Tells the others where this one stands; only the first call counts."""

    def positions(self, ended: threading.Event) -> list[int] | None:
        """Where all of them stood when they posted; `None` if `ended` is set before all have."""

    def leave(self, status: int) -> None:
        """Ends this process as soon as all of them come here."""


class Interruption:
    """Notices signals while it is entered, in the main thread, and with several processes also those of the others.

    A training program enters it first thing and names itself. It is then ended from a thread, whatever its main thread
    computes or waits for, while there is nothing to save: before its first step is done, and after the last one.
    """

    def __init__(self, program: str | None = None) -> None:
        """Notices nothing yet; `program` is the one that may be ended, named in what is said of its end."""
        self._program = program
        self._signal: signal.Signals | None = None
        self._insisted = False
        self._before: dict[signal.Signals, Any] = {}
        self._lock = threading.Lock()
        self._position = BEFORE_FIRST_STEP
        self._stop_at: int | None = None
        self._peers: Peers | None = None
        self._is_alone: bool | None = None  # not known yet
        self._meeting_until: float | None = None
        self._wakeup_before = -1
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread notice signals; a training in another one is not told of them.
        if threading.current_thread() is threading.main_thread():
            if self._program is not None:
                # Python writes the number of each signal here at once, even while the main thread is in C++.
                self._wakeup = socket.socketpair()
                for end in self._wakeup:
                    end.setblocking(False)
                self._wakeup_before = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
            noticed = INSISTING + tuple(name for name in NOTICES if signal.getsignal(name) is not signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._notice) for number in noticed}
        if self._program is not None:
            self._start_watch()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._peers is not None:
            self._peers.post(OVER)  # for one that asks where this process stands
        if self._wakeup is not None:
            with contextlib.suppress(OSError):
                self._wakeup[1].send(b"\0")  # no signal: it only ends the thread's wait
        if self._watch is not None:
            self._watch.join()
        told, before = self._signal is not None, list(self._before)
        self._restore()
        if self._program is not None and told:
            # What comes while the program ends must not change its exit status, and must not keep it from ending.
            for number in before:
                signal.signal(number, signal.SIG_DFL if number in INSISTING else signal.SIG_IGN)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._wakeup:
                end.close()

    def expect_peers(self, are_there: bool) -> None:
        """Announces that `meet` will be called, or never: a program is not ended before it is known whom to tell."""
        self._is_alone = not are_there

    def meet(self, peers: Peers) -> None:
        """From here on all processes stop together, whichever of them is told to."""
        self._peers = peers
        if self._watch is None:
            self._start_watch()

    def check(self, step: int) -> signal.Signals | None:
        """The signal behind which training stops after this step, the same step on all processes, if there is one.

        Args:
            step: the one just made; with several processes it must be asked for each.
        """
        with self._lock:
            self._position = step
            if self._peers is None:
                return self._signal
            stops = self._stop_at is not None and self._position >= self._stop_at
            return (self._signal or signal.SIGTERM) if stops else None

    def stop_behind(self, step: int) -> None:
        """Raises `Interrupted` if there was a signal: for work behind the checkpoint of `step` that may be done again.

        With several processes it does nothing, since the others wait for the result of that work.
        """
        if self._signal is not None and self._peers is None:
            raise Interrupted(step, self._signal)

    def training_is_over(self) -> None:
        """Says that the last checkpoint is complete: from here on a signal ends the program at once."""
        with self._lock:
            self._position = OVER
            told = self._signal is not None if self._peers is None else self._stop_at is not None
            if told and self._program is not None:
                self._end_without_loss()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
        if self._program is not None or number not in INSISTING:
            return  # the signals of a program are counted by its thread
        if self._insisted:
            self._restore()
            signal.raise_signal(number)
        self._insisted = True

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # What was not set from Python comes as None and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _start_watch(self) -> None:
        self._watch = threading.Thread(target=self._watch_signals, name="signals", daemon=True)
        self._watch.start()

    def _watch_signals(self) -> None:
        while not self._ended.is_set():
            for number in self._signals_received():
                self._signal = self._signal or number
                if number in INSISTING and self._insisted:
                    what = "stopped at once, since it came twice; the same command goes on from the last checkpoint"
                    self._end_program(number, what)
                self._insisted = self._insisted or number in INSISTING
            if self._stop_at is None:
                self._look()

    def _signals_received(self) -> list[signal.Signals]:
        """Those that came within the next moment, in their order."""
        if self._wakeup is None:
            self._ended.wait(LOOK_INTERVAL)
            return []
        with contextlib.suppress(BlockingIOError, ValueError):
            if select.select([self._wakeup[0]], [], [], LOOK_INTERVAL)[0]:
                received = self._wakeup[0].recv(1024)
                return [signal.Signals(number) for number in received if number in self._before]
        return []

    def _look(self) -> None:
        """Ends the program where nothing would be lost, or else settles with the others where all stop."""
        if self._peers is None:
            if self._signal is None or self._program is None or self._is_alone is None:
                return
            if not self._is_alone:
                self._meeting_until = self._meeting_until or time.monotonic() + MEETING_TIMEOUT
                if time.monotonic() < self._meeting_until:
                    return
            with self._lock:
                if self._position in (BEFORE_FIRST_STEP, OVER):
                    self._end_without_loss()
            return
        if self._signal is not None:
            self._peers.ask()
        elif not self._peers.asked():
            return
        # Nobody comes past a check before all know where they stop: the lock is held.
        with self._lock:
            self._peers.post(self._position)
            positions = self._peers.positions(self._ended)
            if positions is None:
                return
            last = max(positions)
            self._stop_at = OVER if last == OVER else last + 1
            if self._program is not None and (last == BEFORE_FIRST_STEP or self._position == OVER):
                self._end_without_loss()

    def _end_without_loss(self) -> NoReturn:
        number = self._signal or signal.SIGTERM  # that of another process is not known here
        if self._position == OVER:
            what = "stopped after the last step; nothing is lost, and the same command does what comes after it"
        else:
            what = "stopped before the first step; nothing is lost, and the same command starts again"
        self._end_program(number, what, self._peers)

    def _end_program(self, number: signal.Signals, what: str, peers: Peers | None = None) -> NoReturn:
        # The program ends inside: the progress bar, which gives way to the line, is not drawn again.
        with tqdm.external_write_mode(file=sys.stderr):
            for stream, line in ((sys.stdout, ""), (sys.stderr, f"{self._program}: {number.name}: {what}\n")):
                with contextlib.suppress(OSError):  # the terminal is gone
                    stream.write(line)
                    stream.flush()
            if peers is not None:
                peers.leave(128 + number)
            os._exit(128 + number)
