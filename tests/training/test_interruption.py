"""Takes signals and leaves a verdict: the first is noticed and the second ends the program as ever."""

import signal
import threading

from flax_transformer.training.interruption import Interruption


def test_the_first_signal_is_noticed_and_the_second_does_what_it_did_before():
    told = []
    # Not Python's own: a shell lets its background jobs ignore SIGINT.
    ours = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        before = signal.getsignal(signal.SIGINT)
        with Interruption() as interruption:
            assert interruption.signal is None
            signal.raise_signal(signal.SIGINT)
            assert interruption.signal is signal.SIGINT and not told
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_thread_that_can_notice_no_signals_trains_all_the_same():
    noticed = []

    def enter():
        with Interruption() as interruption:
            noticed.append(interruption.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert noticed == [None]
