from flax_transformer.decoding.programs import Programs
from flax_transformer.decoding.settings import BeamSearch
from tests.decoding.engines import BEAM, GREEDY, SAMPLING, SOURCES, make_sources, search


def test_machines_that_an_engine_lets_go_of_are_kept_nowhere(make_engine, monkeypatch):
    made = []
    make = Programs.machine
    monkeypatch.setattr(Programs, "machine", lambda self, *size: made.append(make(self, *size)) or made[-1])
    engine = make_engine()
    for settings in (GREEDY, BEAM, SAMPLING, GREEDY, BEAM):
        search(engine, SOURCES, settings)
    machines = {id(machine) for group in engine._scheduler.groups.values() for _, machine in group.machines}
    kept = {id(machine) for group in engine._scheduler.groups.values() for machine in group.current.values()}
    assert kept and kept <= machines and len(machines) < len(made)


def test_each_size_of_slots_is_made_once_for_sentences_of_several_lengths(make_engine, monkeypatch):
    made, make = [], Programs.machine
    monkeypatch.setattr(
        Programs, "machine", lambda self, settings, room, count: made.append(room) or make(self, settings, room, count)
    )
    sources = [source for source in make_sources(600, 32) if len(source) > 16 or len(source) % 2]
    search(make_engine(batch_tokens=16 * 32), sources, BeamSearch(beam_size=1, extra_length=0))
    assert len(made) > 1 and len(set(made)) == len(made)


def test_while_sentences_wait_nearly_all_slots_hold_one(make_engine):
    engine = make_engine(batch_tokens=16 * 32)
    search(engine, [source for source in make_sources(400) if len(source) <= 14], GREEDY)
    assert engine.occupancy >= 0.9
