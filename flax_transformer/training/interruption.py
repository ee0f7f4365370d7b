"""Takes a signal that wants the training to end and leaves it the time to finish its step and write a checkpoint.

SIGTERM is what a preempted machine and a cluster's scheduler send, SIGINT is Ctrl-C. A second signal ends at once.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

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
    """Notices signals while it is entered, and with several processes also those of the others."""

    def __init__(self) -> None:
        """Notices nothing yet."""
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._several = jax.process_count() > 1

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread notice signals; a training in another one is not told of them.
        if threading.current_thread() is threading.main_thread():
            # With several processes jax notices SIGTERM itself, and tells the others.
            noticed = (signal.SIGINT,) if self._several else SIGNALS
            self._before = {number: signal.signal(number, self._notice) for number in noticed}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def check(self, step: int) -> signal.Signals | None:
        """The signal behind which training stops after this step, the same step on all processes, if there is one.

        Args:
            step: the one just made; with several processes it must be asked for each.
        """
        if not self._several:
            return self._signal
        return (self._signal or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None

    def stop_behind(self, step: int) -> None:
        """Raises `Interrupted` if there was a signal: for work behind the checkpoint of `step` that may be done again.

        With several processes it does nothing, since the others wait for the result of that work.
        """
        if self._signal is not None and not self._several:
            raise Interrupted(step, self._signal)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        # Whoever asks twice means it.
        self._restore()
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
