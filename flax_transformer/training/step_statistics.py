"""Averages the metrics of training steps and measures their speed, without making the device wait for the host."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from flax_transformer.data.batch import Batch
from flax_transformer.monitoring.utilization import Work
from flax_transformer.training.step import StepMetrics

# How many steps may be queued on the devices; with more than two on several CPU devices, jax's runtime can deadlock.
STEPS_IN_FLIGHT = 2


class Clock:
    """Measures how long a training has taken, including the time before interruptions."""

    def __init__(self, before: float):
        """Starts the clock at the seconds trained before."""
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """The seconds trained until now."""
        return time.monotonic() - self._start


class Window:
    """Collects the metrics of `size` steps, then returns their means and starts again."""

    def __init__(self, size: int, check: Callable[[int, StepMetrics], None], work: Work):
        """Starts the first window.

        Args:
            size: the number of steps in a window.
            check: called with the number and the metrics of each step as soon as they are known.
            work: the floating-point operations of a step, and what the devices can do.
        """
        self._size, self._check, self._work = size, check, work
        self._in_flight: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        # With the seconds that each step took, if they were measured.
        self._gathered: list[tuple[StepMetrics, float | None]] = []
        self._last = 0
        self._since, self._is_measured = time.monotonic(), True
        self._waited = 0.0

    def add(self, step: int, metrics: StepMetrics) -> list[tuple[int, dict[str, float]]]:
        """Adds a step's metrics; returns the last step and the means of each window that is now complete.

        It waits until no more than `STEPS_IN_FLIGHT` - 1 steps are queued, so that the next step can start.
        """
        self._in_flight.append((step, metrics))
        return self._fetch(STEPS_IN_FLIGHT - 1)

    def settle(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for all steps; returns the windows that are now complete."""
        return self._fetch(0)

    def close(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for all steps; returns the remaining windows, including an incomplete one."""
        complete = self._fetch(0)
        return [*complete, (self._last, self._means())] if self._gathered else complete

    def _fetch(self, left: int) -> list[tuple[int, dict[str, float]]]:
        complete = []
        while len(self._in_flight) > left:
            step, on_device = self._in_flight.popleft()
            metrics = jax.device_get(on_device)
            self._check(step, metrics)
            if self._is_measured:
                now = time.monotonic()
                self._gathered.append((metrics, now - self._since))
                self._since = now
            else:
                self._gathered.append((metrics, None))
                self._is_measured = True
            self._last = step
            if step % self._size == 0:
                complete.append((step, self._means()))
        return complete

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the `with` block from the speed."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def begin_anew(self) -> None:
        """Excludes from the speed the time so far, and the next step to be added, whose time includes compiling."""
        self._since, self._is_measured = time.monotonic(), False
        self._waited = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and measures how long each takes to arrive."""
        while True:
            begin = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - begin
            if batch is None:
                return
            yield batch

    def _means(self) -> dict[str, float]:
        gathered, self._gathered = self._gathered, []
        made = [metrics for metrics, _ in gathered if not metrics.skipped_in_a_row]
        tokens = _total("tokens", made)
        slots = self._work.target_slots * len(made)
        return self._speed(gathered) | {
            "loss": _total("smoothed", made) / tokens,
            "cross_entropy": _total("cross_entropy", made) / tokens,
            "accuracy": _total("correct", made) / tokens,
            "gradient_norm": float(np.mean([metrics.gradient_norm for metrics in made])) if made else float("nan"),
            "fill_rate": tokens / slots if made else float("nan"),
            "skipped": int(gathered[-1][0].skipped),
        }

    def _speed(self, gathered: list[tuple[StepMetrics, float | None]]) -> dict[str, float]:
        """The speed of the steps whose time was measured; empty if there are none."""
        measured = [(metrics, seconds) for metrics, seconds in gathered if seconds is not None]
        if not measured:
            return {}
        steps = [seconds for _, seconds in measured]
        waited, self._waited = self._waited, 0.0
        utilization = {}
        if self._work.peak_flops is not None:
            utilization["model_flops_utilization"] = self._work.flops * len(steps) / sum(steps) / self._work.peak_flops
        made = [metrics for metrics, _ in measured if not metrics.skipped_in_a_row]
        return utilization | {
            "tokens_per_second": _total("tokens", made) / sum(steps),
            "input_wait": waited / sum(steps),
            "step_seconds_p50": float(np.percentile(steps, 50)),
            "step_seconds_p95": float(np.percentile(steps, 95)),
        }


def _total(name: str, made: list[StepMetrics]) -> float:
    if not made:
        return float("nan")
    return float(np.sum([getattr(metrics.sums, name) for metrics in made], dtype=np.float64))
