import math
import time
import types

import numpy as np
import pytest

import flax_transformer.training.step_statistics as window_module
from flax_transformer.monitoring.utilization import Work
from flax_transformer.training.loss import LossSums
from flax_transformer.training.step import StepMetrics
from flax_transformer.training.step_statistics import STEPS_IN_FLIGHT, Clock, Window


def metrics_of(smoothed, tokens, *, norm=1.0, skipped=0, skipped_in_a_row=0):
    sums = LossSums(smoothed=smoothed, cross_entropy=smoothed / 2, correct=tokens / 4, tokens=tokens)
    return StepMetrics(
        sums=sums, gradient_norm=norm, module_norms={}, skipped=skipped, skipped_in_a_row=skipped_in_a_row
    )


WORK = Work(target_slots=20, flops=1e6, peak_flops=None)


def window_of(size, seen=None, work=WORK):
    return Window(size, lambda step, metrics: seen.append(step) if seen is not None else None, work)


def test_a_window_is_the_mean_over_tokens_of_its_steps():
    window = window_of(3)
    assert window.add(1, metrics_of(10.0, 5.0)) == window.add(2, metrics_of(40.0, 10.0, norm=4.0)) == []
    window.add(3, metrics_of(10.0, 5.0))
    ((step, means),) = window.settle()
    assert step == 3
    assert means["loss"] == pytest.approx(60 / 20) and means["cross_entropy"] == pytest.approx(30 / 20)
    assert means["accuracy"] == pytest.approx(0.25) and means["gradient_norm"] == pytest.approx(2.0)


def test_as_many_steps_are_under_way_as_may_be_and_never_more():
    under_way, most = [], []
    window = Window(1, lambda step, metrics: under_way.remove(step), WORK)
    for step in range(1, 6):
        under_way.append(step)
        most.append(len(under_way))
        window.add(step, metrics_of(1.0, 1.0))
    assert most == [1, *[STEPS_IN_FLIGHT] * 4]
    assert [step for step, _ in window.settle()] == [5] and not under_way


def test_settling_leaves_a_window_open_and_closing_gives_what_it_has():
    window = window_of(4)
    told = []
    for step in range(1, 7):
        told += window.add(step, metrics_of(float(step), 1.0))
    told += window.settle()
    assert [step for step, _ in told] == [4]
    ((step, means),) = window.close()
    assert step == 6 and means["loss"] == pytest.approx((5 + 6) / 2)
    assert window.close() == window.settle() == []


def test_updates_that_were_left_out_are_counted_and_no_part_of_a_mean():
    window = window_of(3)
    nan = float("nan")
    window.add(1, metrics_of(10.0, 5.0))
    window.add(2, metrics_of(nan, 5.0, norm=nan, skipped=1, skipped_in_a_row=1))
    window.add(3, metrics_of(20.0, 5.0, skipped=1))
    ((_, means),) = window.settle()
    assert means["loss"] == pytest.approx(3.0) and means["gradient_norm"] == 1.0 and means["skipped"] == 1
    for step in (4, 5, 6):
        window.add(step, metrics_of(nan, 5.0, norm=nan, skipped=step - 2, skipped_in_a_row=step - 3))
    ((_, means),) = window.settle()
    assert math.isnan(means["loss"]) and math.isnan(means["tokens_per_second"]) and means["skipped"] == 4


@pytest.fixture
def now(monkeypatch):
    """The time, in a list of one number, which tests change."""
    now = [1000.0]
    monkeypatch.setattr(window_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_time_that_was_spent_on_something_else_is_no_part_of_the_speed(now):
    window = window_of(1)
    with window.paused():
        now[0] += 0.3
    now[0] += 0.1
    window.add(1, metrics_of(1.0, 100.0))
    ((_, means),) = window.settle()
    assert means["tokens_per_second"] == pytest.approx(1000)


def test_the_speed_tells_of_full_slots_of_waiting_and_of_single_steps(now):
    def slow():
        for number in range(4):
            now[0] += 0.1
            yield number

    window = window_of(4, work=Work(target_slots=20, flops=1e6, peak_flops=4e7))
    for step, _ in enumerate(window.timed(slow()), 1):
        now[0] += 0.3 if step == 2 else 0.1
        window.add(step, metrics_of(1.0, 5.0))
    ((_, means),) = window.settle()
    # One second in all, of which four tenths were waited for batches.
    assert means["fill_rate"] == pytest.approx(0.25) and means["input_wait"] == pytest.approx(0.4)
    assert means["model_flops_utilization"] == pytest.approx(4 * 1e6 / 4e7)
    assert 0 < means["step_seconds_p50"] < means["step_seconds_p95"] <= 1


class Device:
    """A clock, and a device that takes 0.2 s of it for each step, one after the other, while the host goes on."""

    def __init__(self, monkeypatch):
        self.now, self.free = 1000.0, 0.0
        monkeypatch.setattr(window_module, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(window_module, "jax", types.SimpleNamespace(device_get=self.wait))

    def step(self):
        self.free = max(self.now, self.free) + 0.2
        return metrics_of(1000.0, 1000.0, norm=self.free)

    def wait(self, metrics):
        self.now = max(self.now, metrics.gradient_norm)
        return metrics

    def batches(self, numbers):
        for step in numbers:
            self.now += 0.05
            yield step


@pytest.mark.parametrize("pause_every", [7, 1000])
@pytest.mark.parametrize("size", [1, 10, 50])
@pytest.mark.parametrize("first", [1, 191, 200])
def test_the_first_step_in_which_compiling_was_is_no_part_of_the_speed(first, size, pause_every, monkeypatch):
    device = Device(monkeypatch)
    window = window_of(size, work=Work(target_slots=2000, flops=1e6, peak_flops=1e7))
    told = []
    for step in window.timed(device.batches(range(first, 261))):
        metrics = device.step()
        if step == first:
            device.now += 7.0
            window.begin_anew()
        told += window.add(step, metrics)
        if step % pause_every == 0:
            told += window.settle()
            with window.paused():
                device.now += 3.0
    told += window.close()

    assert [step for step, _ in told] == [step for step in range(first, 261) if step % size == 0 or step == 260]
    begin = first
    for step, means in told:
        assert (means["loss"], means["fill_rate"]) == (1.0, 0.5)
        timed = range(max(begin, first + 1), step + 1)
        begin = step + 1
        if not timed:
            assert means.keys() == {"loss", "cross_entropy", "accuracy", "gradient_norm", "fill_rate", "skipped"}
            continue
        # Where it has nothing to do, after the start and after a pause, the device too waits for the batch.
        waits = [number == first + 1 or (number - 1) % pause_every == 0 for number in timed]
        rate = len(timed) / (0.2 * len(timed) + 0.05 * sum(waits))
        assert means["tokens_per_second"] == pytest.approx(1000 * rate)
        assert means["model_flops_utilization"] == pytest.approx(rate / 10)
        assert means["step_seconds_p50"] == pytest.approx(np.percentile([0.25 if wait else 0.2 for wait in waits], 50))
        assert means["step_seconds_p95"] == pytest.approx(np.percentile([0.25 if wait else 0.2 for wait in waits], 95))
        # A batch is waited for while the step before is made: at either end one may fall into the next window.
        assert abs(means["input_wait"] - 0.05 * rate) <= 0.05 * rate / len(timed) + 1e-6


def test_nothing_is_said_of_the_peak_where_nobody_has_told_it():
    window = window_of(1)
    window.add(1, metrics_of(1.0, 100.0))
    ((_, means),) = window.settle()
    assert "tokens_per_second" in means and "model_flops_utilization" not in means


def test_the_clock_goes_on_from_the_time_before():
    clock = Clock(100.0)
    time.sleep(0.02)
    assert 100.02 <= clock.seconds < 110
