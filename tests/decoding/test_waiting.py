import numpy as np

from flax_transformer.decoding.requests import Request
from flax_transformer.decoding.waiting import Waiting


def make(length, submission=1):
    return Request(
        [5] * length, prefix=(), given=0, limit=9, num_return=1, rng=None, streams=False, submission=submission
    )


def filled(*requests):
    waiting = Waiting()
    waiting.add(list(requests))
    return waiting


def test_of_one_submission_the_longest_that_fits_comes_first_and_of_equal_ones_the_first():
    requests = [make(length) for length in np.random.default_rng(0).integers(1, 20, 50)]
    waiting = filled(*requests)
    assert (len(waiting), waiting.longest()) == (50, max(request.need for request in requests))
    assert waiting.count(4, 9) == sum(4 < request.need <= 9 for request in requests)
    taken = [waiting.take(4, 9) for _ in range(waiting.count(4, 9))]
    assert taken == sorted((r for r in requests if 4 < r.need <= 9), key=lambda request: -request.need)
    assert waiting.take(4, 9) is None and len(waiting) == 50 - len(taken)
    assert {*waiting.take_all()} == {*requests} - {*taken} and len(waiting) == waiting.longest() == 0


def test_a_single_sentence_waits_for_one_turn_of_a_large_submission():
    large = [make(9, submission=1) for _ in range(5000)]
    waiting = filled(*large)
    assert waiting.take(0, 9) in large
    small = [make(3, submission=2), make(2, submission=3)]
    waiting.add(small)
    assert [waiting.take(0, 9) in small for _ in range(5)] == [False, True, False, True, False]


def test_two_large_submissions_take_turns_though_one_has_longer_sentences():
    waiting = filled(*(make(9, submission=1) for _ in range(20)))
    waiting.add([make(3, submission=2) for _ in range(20)])
    assert [waiting.take(0, 9).submission for _ in range(30)] == [1, 2] * 15


def test_small_submissions_share_a_turn_so_that_many_of_them_are_found_as_fast_as_one():
    requests = [make(number % 7 + 1, submission=number) for number in range(1, 200)]
    waiting = filled(*requests)
    assert [waiting.take(0, 9).need for _ in range(199)] == sorted((request.need for request in requests), reverse=True)


def test_a_turn_is_passed_on_where_nothing_fits_and_cancelled_requests_are_passed_over():
    waiting = filled(*(make(9, submission=1) for _ in range(20)))
    waiting.add([make(3, submission=2) for _ in range(20)])
    assert [waiting.take(0, 5).submission for _ in range(3)] == [2, 2, 2]
    for request in waiting.take_all():
        if request.submission == 1:
            request.cancel()
        waiting.add([request])
    assert {waiting.take(0, 9).submission for _ in range(17)} == {2} and waiting.take(0, 9) is None
