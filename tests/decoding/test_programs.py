import pytest

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.sizes import rooms_up_to

SEARCH, OTHER = BeamSearch(beam_size=1, extra_length=4), BeamSearch(beam_size=2, extra_length=4)


@pytest.fixture(scope="module")
def programs(make_translator):
    """The programs of an engine that uses only what was prepared: rooms of 16 and 32, with 1 and 4 slots."""
    engine = make_translator(batch_tokens=256).engine
    programs = engine.programs
    programs.only_prepared()
    for room in (16, 32):
        for count in (1, 4):
            programs.prepare(engine.compiled_for(SEARCH), room, count)
    programs.known = engine.compiled_for(SEARCH)
    programs.unknown = engine.compiled_for(OTHER)
    return programs


def test_prepared_rooms_are_used_as_far_as_they_go(programs):
    assert programs.rooms(programs.known, 9) == [16]
    assert programs.rooms(programs.known, 17) == programs.rooms(programs.known, 32) == [16, 32]
    assert programs.rooms(programs.known, 40) == [16, 32, 48]
    assert programs.rooms(programs.unknown, 40) == rooms_up_to(40)


def test_prepared_numbers_of_slots_are_used_unless_half_of_the_slots_would_be_empty(programs):
    assert [programs.slots(programs.known, 16, count) for count in (1, 2, 3, 4, 9, 100)] == [1, 4, 4, 4, 4, 4]
    assert programs.slots(programs.known, 48, 100) == programs.slots(programs.unknown, 16, 100) == 1
    assert programs.slots(programs.known, 16, 100, prepared=False) == 64


def test_an_engine_gets_by_with_what_was_prepared(make_translator, programs):
    translator = make_translator(batch_tokens=256)
    sentences = ["a dog runs", "the cat", "on it"] * 5
    expected = translator.translate(sentences, SEARCH)
    prepared = make_translator(batch_tokens=256)
    prepared.engine.programs.only_prepared()
    prepared.engine.programs.prepare(prepared.engine.compiled_for(SEARCH), 16, 4)
    requests = prepared.engine.submit(prepared.draft(sentences, SEARCH).sources, SEARCH)
    requests[0].result()
    assert prepared.engine.slots[1] in (1, 4, 5)
    assert prepared.translate(sentences, SEARCH) == expected
