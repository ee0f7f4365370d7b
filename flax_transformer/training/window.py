"""Takes the metrics of steps that are still under way and leaves their means over some steps, and the time trained."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from flax_transformer.training.step import StepMetrics

# Steps run ahead of the host; more than two of them on several CPU devices can deadlock jax's runtime.
STEPS_IN_FLIGHT = 2


class Clock:
    """Counts the seconds trained, those before an interruption included."""

    def __init__(self, before: float):
        """Goes on from the seconds trained before."""
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Seconds trained until now."""
        return time.monotonic() - self._start


class Window:
    """Gathers the metrics of some steps without making the device wait for the host."""

    def __init__(self, size: int, check: Callable[[int, StepMetrics], None]):
        """Begins the first window.

        Args:
            size: steps in a window.
            check: is shown the number and the metrics of each step, once they are there.
        """
        self._size, self._check = size, check
        self._in_flight: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._gathered: list[StepMetrics] = []
        self._last = 0
        self._since = time.monotonic()

    def add(self, step: int, metrics: StepMetrics) -> list[tuple[int, dict[str, float]]]:
        """Takes a step's metrics; gives the step and the means of each window that is complete."""
        self._in_flight.append((step, metrics))
        return self._fetch(STEPS_IN_FLIGHT)

    def settle(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for the steps under way; gives the windows that are complete with them."""
        return self._fetch(0)

    def close(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for the steps under way; gives the last window too, complete or not."""
        complete = self._fetch(0)
        return [*complete, (self._last, self._means())] if self._gathered else complete

    def _fetch(self, left: int) -> list[tuple[int, dict[str, float]]]:
        complete = []
        while len(self._in_flight) > left:
            step, on_device = self._in_flight.popleft()
            metrics = jax.device_get(on_device)
            self._check(step, metrics)
            self._gathered.append(metrics)
            self._last = step
            if step % self._size == 0:
                complete.append((step, self._means()))
        return complete

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the tokens a second."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def _means(self) -> dict[str, float]:
        skipped = int(self._gathered[-1].skipped)
        made = [metrics for metrics in self._gathered if not metrics.skipped_in_a_row]
        now = time.monotonic()
        seconds, self._since, self._gathered = now - self._since, now, []

        def total(name: str) -> float:
            return float(np.sum([getattr(metrics.sums, name) for metrics in made], dtype=np.float64))

        tokens = total("tokens") if made else float("nan")
        return {
            "loss": total("smoothed") / tokens,
            "cross_entropy": total("cross_entropy") / tokens,
            "accuracy": total("correct") / tokens,
            "gradient_norm": float(np.mean([metrics.gradient_norm for metrics in made])) if made else float("nan"),
            "tokens_per_second": tokens / seconds,
            "skipped": skipped,
        }
