"""What is compiled before and while a server serves, with programs that cannot be compiled."""

import logging

import pytest

from flax_transformer.decoding.programs import Programs
from flax_transformer.serving.preparing import Preparation


@pytest.fixture
def prepared(monkeypatch):
    """The numbers of slots of the programs that were compiled; for more than one slot there is no memory."""
    done = []

    def prepare(programs, settings, room, count):
        if count > 1:
            raise RuntimeError(f"RESOURCE_EXHAUSTED: {count} slots\nmore lines")
        done.append(count)

    monkeypatch.setattr(Programs, "prepare", prepare)
    monkeypatch.setattr("flax_transformer.decoding.inspection.Inspector.compile", lambda inspector, longest: None)
    return done


def test_a_program_that_cannot_be_compiled_while_the_server_serves_is_logged_and_the_others_are_made(
    served, prepared, caplog
):
    preparation = Preparation([served], longest=40)
    with caplog.at_level(logging.ERROR, "flax_transformer.serving"):
        preparation.begin(everything=False)
        preparation._thread.join(60)
    assert len(prepared) >= 6  # for each size one search, and one stream, although what lies between failed
    assert "a program could not be compiled (RuntimeError: RESOURCE_EXHAUSTED: " in caplog.text
    assert "more lines" not in caplog.text


def test_a_program_that_cannot_be_compiled_before_the_server_is_ready_is_an_error(served, prepared):
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        Preparation([served], longest=40).begin(everything=True)
