"""Takes the metrics of steps that are still under way and leaves their means over some steps, and their speed."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from flax_transformer.data.batch import Batch
from flax_transformer.monitoring.utilization import Work
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

    def __init__(self, size: int, check: Callable[[int, StepMetrics], None], work: Work):
        """Begins the first window.

        Args:
            size: steps in a window.
            check: is shown the number and the metrics of each step, once they are there.
            work: what a step asks of the devices.
        """
        self._size, self._check, self._work = size, check, work
        self._in_flight: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        # With the seconds that each took, where they were measured.
        self._gathered: list[tuple[StepMetrics, float | None]] = []
        self._last = 0
        self._since, self._is_measured = time.monotonic(), True
        self._waited = 0.0

    def add(self, step: int, metrics: StepMetrics) -> list[tuple[int, dict[str, float]]]:
        """Takes a step's metrics; gives the step and the means of each window that is complete.

        It leaves room for the step that comes next.
        """
        self._in_flight.append((step, metrics))
        return self._fetch(STEPS_IN_FLIGHT - 1)

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
        """Leaves the time inside out of the speed."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def begin_anew(self) -> None:
        """Leaves out of the speed the time so far and the step that is added next, which was compiled in it."""
        self._since, self._is_measured = time.monotonic(), False
        self._waited = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Hands batches on, and counts the time that they are waited for."""
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
        """That of the steps whose time was measured; nothing where there are none."""
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
