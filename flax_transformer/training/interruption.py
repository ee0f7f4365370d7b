"""Takes a signal that wants the training to end and leaves it the time to finish its step and write a checkpoint.

SIGTERM is what a preempted machine and a cluster's scheduler send, SIGINT is Ctrl-C. A second signal ends at once.
"""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A training was told to stop, and did so behind a checkpoint.

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


class Interruption:
    """Notices signals while it is entered; `signal` is the one that came, or `None`."""

    def __init__(self) -> None:
        """Notices nothing yet."""
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread notice signals; a training in another one is not told of them.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # Whoever asks twice means it.
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
