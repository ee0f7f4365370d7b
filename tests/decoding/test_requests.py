import pytest

from flax_transformer.decoding.requests import Request


def test_an_error_of_a_listener_ends_its_request_alone():
    request = Request([5, 2], prefix=(), given=0, limit=9, num_return=1, rng=None, streams=True)
    request.when_told(lambda ids: ids[1])
    request.tell([7])  # raises nothing in the engine's thread
    with pytest.raises(IndexError):
        request.result(timeout=1)
    with pytest.raises(IndexError):
        list(request)
