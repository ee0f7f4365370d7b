"""Takes signals and leaves a verdict: the first is noticed and the second ends the program as ever."""

import signal
import threading

import pytest

from flax_transformer.training.interruption import Interrupted, Interruption


def test_the_first_signal_is_noticed_and_the_second_does_what_it_did_before():
    told = []
    # Not Python's own: a shell lets its background jobs ignore SIGINT.
    ours = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        before = signal.getsignal(signal.SIGINT)
        with Interruption() as interruption:
            assert interruption.check(1) is None
            signal.raise_signal(signal.SIGINT)
            assert interruption.check(2) is signal.SIGINT and not told
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_thread_that_can_notice_no_signals_trains_all_the_same():
    noticed = []

    def enter():
        with Interruption() as interruption:
            noticed.append(interruption.check(1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert noticed == [None]


def test_what_may_be_done_again_is_ended_by_a_signal_and_by_nothing_else():
    with Interruption() as interruption:
        interruption.stop_behind(4)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM: stopped behind .* step 5;"):
            interruption.stop_behind(5)
