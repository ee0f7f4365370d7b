"""The library's own errors, and those of functions that it calls."""

import pytest

from flax_transformer.decoding import batching
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.errors import is_own


def raised_by(function, *arguments):
    with pytest.raises(Exception) as raised:
        function(*arguments)
    return raised.value


def test_only_what_the_library_raises_itself_is_its_own_error():
    assert is_own(raised_by(lambda: BeamSearch(beam_size=0)))
    assert not is_own(raised_by(int, "a"))
    assert not is_own(ValueError("never raised"))


def test_an_error_of_a_function_that_the_library_calls_is_not_its_own():
    assert not is_own(raised_by(batching.full_rows, [], 64, 1))  # the `max` of nothing
