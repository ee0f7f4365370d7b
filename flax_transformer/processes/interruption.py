"""Ends a training after a signal as soon as no work is lost: before the first step, after a checkpoint, or at the end.

Pre-empted machines and schedulers send SIGTERM, Ctrl-C sends SIGINT, and SIGHUP comes when the terminal or the ssh
connection is gone. Slurm and other schedulers send SIGUSR1, SIGUSR2 or SIGXCPU some time before they end a job. SIGHUP
often comes twice, from the terminal and from the shell, and SIGXCPU every second, so only a second SIGTERM or SIGINT
ends the training at once. A repetition within a second counts as the same signal: make, and programs like it, pass on
a signal that has reached the training already.
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
# These end a training unless its parent process has set them to be ignored, as nohup does with SIGHUP.
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

# Positions of a training that are not after a step; after a step, the position is its number.
BEFORE_FIRST_STEP, OVER = 0, sys.maxsize

# In seconds: how often to ask the other processes, and how long a process that receives a signal while it is connecting
# with them waits before it stops alone.
LOOK_INTERVAL, MEETING_TIMEOUT = 0.5, 30.0
# In seconds: how long after the first SIGTERM or SIGINT another one still belongs to it.
SAME_REQUEST = 1.0


class Interrupted(Exception):
    """Raised when a training stops because of a signal, after writing a checkpoint.

    Attributes:
        step: the step of the checkpoint.
        signal: the signal that stopped it.
    """

    def __init__(self, step: int, number: signal.Signals):
        """Makes the message that tells the user how to continue."""
        super().__init__(
            f"{number.name}: stopped after the checkpoint of step {step}; the same command continues there"
        )
        self.step, self.signal = step, number

    @property
    def exit_status(self) -> int:
        """The exit status that a shell reports for a program ended by this signal."""
        return 128 + self.signal


@runtime_checkable
class Peers(Protocol):
    """What an interruption needs of the other processes (see `hosts.Peers`); this file must not import jax."""

    def ask(self) -> None:
        """Asks all processes to stop."""

    def asked(self) -> bool:
        """Whether a process has asked all to stop."""

    def post(self, position: int) -> None:
        """Tells the others which step this process has reached; only the first call counts."""

    def positions(self, ended: threading.Event) -> list[int] | None:
        """The steps that all processes have posted; `None` if `ended` is set before all have done so."""

    def leave(self, status: int) -> None:
        """Exits as soon as all processes have called this."""


class Interruption:
    """Handles signals inside a `with` block in the main thread, including those that other processes receive.

    A training program enters it first and gives its own name. While there is nothing to save, before the first step is
    done and after the last one, a thread then ends the program on a signal, whatever the main thread is doing.
    """

    def __init__(self, program: str | None = None) -> None:
        """Handles nothing yet; `program` names the program that may be ended, `None` if only the training may be."""
        self._program = program
        self._signal: signal.Signals | None = None
        self._requested: float | None = None  # when the first SIGTERM or SIGINT came
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
        # Python handles signals only in the main thread; a training in another thread does not notice them.
        if threading.current_thread() is threading.main_thread():
            if self._program is not None:
                # Python writes the number of each signal here at once, even while the main thread runs C++ code.
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
            self._peers.post(OVER)  # for another process that waits for this one's position
        if self._wakeup is not None:
            with contextlib.suppress(OSError):
                self._wakeup[1].send(b"\0")  # not a signal number: it only wakes the thread
        if self._watch is not None:
            self._watch.join()
        told, before = self._signal is not None, list(self._before)
        self._restore()
        if self._program is not None and told:
            # Signals that arrive while the program exits must not change its exit status or keep it from exiting.
            for number in before:
                signal.signal(number, signal.SIG_DFL if number in INSISTING else signal.SIG_IGN)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._wakeup:
                end.close()

    def expect_peers(self, are_there: bool) -> None:
        """Says whether `meet` will be called; until this is known, a signal does not end the program."""
        self._is_alone = not are_there

    def meet(self, peers: Peers) -> None:
        """From now on all processes stop together, whichever of them receives a signal."""
        self._peers = peers
        if self._watch is None:
            self._start_watch()

    def check(self, step: int) -> signal.Signals | None:
        """Returns the signal because of which training must stop after this step, or `None`.

        All processes stop after the same step.

        Args:
            step: the step that was just done; with several processes this must be called after each step.
        """
        with self._lock:
            self._position = step
            if self._peers is None:
                return self._signal
            stops = self._stop_at is not None and self._position >= self._stop_at
            return (self._signal or signal.SIGTERM) if stops else None

    def stop_after_checkpoint(self, step: int) -> None:
        """Raises `Interrupted` if there was a signal; call it during work that the next run can do again.

        With several processes it does nothing, because the others wait for the result of that work.

        Args:
            step: the step of the newest checkpoint.
        """
        if self._signal is not None and self._peers is None:
            raise Interrupted(step, self._signal)

    def training_is_over(self) -> None:
        """Says that the last checkpoint is complete: from now on a signal ends the program at once."""
        with self._lock:
            self._position = OVER
            told = self._signal is not None if self._peers is None else self._stop_at is not None
            if told and self._program is not None:
                self._end_without_loss()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
        # The thread of a program counts its signals.
        if self._program is None and self._insists(number):
            self._restore()
            signal.raise_signal(number)

    def _insists(self, number: int) -> bool:
        """Whether a signal that has come is the second request to stop."""
        if number not in INSISTING:
            return False
        now = time.monotonic()
        self._requested = self._requested or now
        return now - self._requested > SAME_REQUEST

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # A handler that was not set from Python is None and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _start_watch(self) -> None:
        self._watch = threading.Thread(target=self._watch_signals, name="signals", daemon=True)
        self._watch.start()

    def _watch_signals(self) -> None:
        while not self._ended.is_set():
            for number in self._signals_received():
                self._signal = self._signal or number
                if self._insists(number):
                    what = "stopped at once, since it came twice; the same command continues from the last checkpoint"
                    self._end_program(number, what)
            if self._stop_at is None:
                self._look()

    def _signals_received(self) -> list[signal.Signals]:
        """Waits a moment for signals, and returns them in their order."""
        if self._wakeup is None:
            self._ended.wait(LOOK_INTERVAL)
            return []
        with contextlib.suppress(BlockingIOError, ValueError):
            if select.select([self._wakeup[0]], [], [], LOOK_INTERVAL)[0]:
                received = self._wakeup[0].recv(1024)
                return [signal.Signals(number) for number in received if number in self._before]
        return []

    def _look(self) -> None:
        """Ends the program if no work would be lost; otherwise agrees with the other processes where to stop."""
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
        # While the lock is held, `check` waits, so that this process cannot pass the step that all agree on.
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
        number = self._signal or signal.SIGTERM  # the signal that another process received is not known here
        if self._position == OVER:
            what = "stopped after the last step; nothing is lost, and the same command does the rest"
        else:
            what = "stopped before the first step; nothing is lost, and the same command starts again"
        self._end_program(number, what, self._peers)

    def _end_program(self, number: signal.Signals, what: str, peers: Peers | None = None) -> NoReturn:
        # The program exits inside, so tqdm clears the progress bar for this line and does not draw it again.
        with tqdm.external_write_mode(file=sys.stderr):
            for stream, line in ((sys.stdout, ""), (sys.stderr, f"{self._program}: {number.name}: {what}\n")):
                with contextlib.suppress(OSError):  # the terminal is gone
                    stream.write(line)
                    stream.flush()
            if peers is not None:
                peers.leave(128 + number)
            os._exit(128 + number)
