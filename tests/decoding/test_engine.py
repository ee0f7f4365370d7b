import itertools
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformer.decoding import engine as engine_module
from flax_transformer.decoding import ensemble as ensemble_module
from flax_transformer.decoding.machine import Machine
from flax_transformer.decoding.scoring import Scorer
from flax_transformer.decoding.search import BROKEN
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.slots import advance
from tests.decoding.engines import (
    BEAM,
    EOS,
    GREEDY,
    PAD,
    SAMPLING,
    SOURCES,
    START,
    V,
    check_same,
    keys,
    make_sources,
    search,
)


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


def test_many_sentences_take_few_programs_and_get_what_each_gets_alone(engine):
    before = advance._cache_size()
    together = search(engine, SOURCES, GREEDY)
    assert advance._cache_size() - before <= 2  # for sources of up to 16 tokens, and the few outputs longer than 24
    check_same(together, [search(engine, [source], GREEDY)[0] for source in SOURCES])
    assert len({tuple(output.ids.tolist()) for (output,) in together}) > 10  # or whatever is mixed up would not show


@pytest.mark.parametrize("settings", [BEAM, SAMPLING], ids=["beam", "sampling"])
def test_other_neighbours_and_batches_change_no_result(engine, make_engine, settings):
    sources = [source for source in SOURCES if len(source) <= 8]
    rngs = keys(len(sources))
    together = search(engine, sources, settings, rngs=rngs)
    assert all(len(outputs) == 2 for outputs in together)
    order = np.random.default_rng(1).permutation(len(sources))[:7]
    others = make_engine(batch_tokens=16)
    mixed = search(others, [sources[number] for number in order], settings, rngs=rngs[order])
    check_same(mixed, [together[number] for number in order])


def test_every_output_ends_once_and_holds_no_padding_and_no_start(engine):
    for settings in (GREEDY, SAMPLING):
        for outputs in search(engine, SOURCES, settings):
            assert len(outputs) == settings.num_return
            for ids, log_probs in outputs:
                assert ids.tolist().index(EOS) == len(ids) - 1 and not {PAD, START} & set(ids.tolist())
                assert len(log_probs) == len(ids) and (log_probs < 0).all()


def test_a_sentences_limit_follows_its_own_length_and_not_that_of_its_slot(engine):
    never = GREEDY.replace(extra_length=3, min_length=99)  # so that each ends at its limit
    sources = [[5] * (length - 1) + [EOS] for length in (1, 2, 5, 7, 8, 9, 13)]
    found = search(engine, sources, never)
    assert [len(output.ids) for (output,) in found] == [len(source) + 3 for source in sources]
    found = search(engine, sources[:4], never.replace(max_length=6))
    assert [len(output.ids) for (output,) in found] == [4, 5, 6, 6]


@pytest.mark.parametrize(
    "settings", [pytest.param(Sampling(min_length=50), marks=pytest.mark.slow), BeamSearch(beam_size=3, min_length=50)]
)
def test_outputs_that_need_more_room_than_their_slots_have_get_it(engine, make_engine, settings):
    """They are moved twice; each is what slots that have all the room from the start give."""
    sources, rngs = [source for source in SOURCES if len(source) <= 14][:6], keys(6)
    found = search(engine, sources, settings, rngs=rngs)
    assert min(len(output.ids) for (output,) in found) >= 50
    # A source of 33 to 64 tokens, which is given up, makes slots that the others then use.
    roomy = make_engine(batch_tokens=64 * 8)
    request, *others = roomy.submit([[5] * 40 + [EOS], *sources], settings, rngs=np.concatenate([rngs[:1], rngs]))
    check_same([other.result() for other in others], found)
    request.cancel()


def test_outputs_begin_with_their_prefixes_and_go_on_as_if_they_had_chosen_them(engine):
    sources = [source for source in SOURCES if len(source) > 4][:6]
    free = search(engine, sources, GREEDY)
    other = 5 if free[1][0].ids[0] != 5 else 6
    prefixes = [[], [other], [9, 9, 9, 9, 9, 9, 9], [3, 4], [], free[5][0].ids[:2].tolist()]
    found = search(engine, sources, GREEDY, prefixes)
    for (output,), prefix in zip(found, prefixes, strict=True):
        assert output.ids[: len(prefix)].tolist() == prefix and len(output.ids) > len(prefix)
    for number in (0, 4, 5):  # no wish, or the wish for what comes anyway
        check_same([found[number]], [free[number]])
    reverse = search(engine, sources[::-1], GREEDY, prefixes[::-1])
    check_same(found, reverse[::-1])


def test_a_prefix_that_cannot_be_followed_is_an_error_that_names_the_mend(engine, make_engine):
    fits = search(engine, [[5, EOS]], GREEDY, [[7] * 5])
    assert fits[0][0].ids.tolist() == [7] * 5 + [EOS]
    with pytest.raises(ValueError, match="a prefix has 6 tokens, but its output may have only 6"):
        search(engine, [[5, EOS]], GREEDY, [[7] * 6])
    with pytest.raises(ValueError, match="a prefix has the token id 7, which the model never generates"):
        search(make_engine(banned_ids=(7,)), [[5, EOS]], BEAM, [[9, 7]])


@pytest.mark.parametrize(
    "settings", [BEAM, *(pytest.param(each, marks=pytest.mark.slow) for each in (GREEDY, SAMPLING))]
)
def test_eight_devices_share_the_slots_and_find_what_one_finds(engine, make_engine, settings):
    expected = search(engine, SOURCES, settings)
    check_same(search(make_engine(devices=8, batch_tokens=256), SOURCES, settings), expected)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING, BEAM.replace(extra_length=20, min_length=30)])
def test_two_chunks_under_way_as_on_a_gpu_find_the_same(engine, make_engine, settings):
    ahead = make_engine()
    ahead._scheduler._depth = 2
    check_same(search(ahead, SOURCES[:20], settings), search(engine, SOURCES[:20], settings))


def test_targets_of_any_lengths_are_scored_and_aligned_as_alone(make_engine):
    together, alone = (Scorer(make_engine(devices=each).ensemble, batch_tokens=64) for each in (8, 1))
    short, long = ([source for source in SOURCES if (len(source) <= 8) == shorter] for shorter in (True, False))
    sources, targets = [*long[:2], *short[:3]], [*long[2:4], *short[3:6]]
    scored, aligned = together.score(sources, targets, [0] * 5), together.align(sources, targets, layer=-1)
    for source, target, (ids, log_probs), weights in zip(sources, targets, scored, aligned, strict=True):
        assert ids.tolist() == target and log_probs.shape == (len(target),)
        assert weights.shape == (len(target), len(source))
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(log_probs, alone.score([source], [target], [0])[0].log_probs, atol=1e-4)
        np.testing.assert_allclose(weights, alone.align([source], [target], layer=-1)[0], atol=1e-5)


def test_what_was_compiled_ahead_is_not_compiled_again(make_engine):
    settings, engine = BeamSearch(beam_size=1, extra_length=5), make_engine()
    engine.compile(settings, longest=29, sentences=1)
    compiled = advance._cache_size()
    engine.compile(settings, longest=29, sentences=1)
    for length in range(1, 33):
        search(engine, [[5] * (length - 1) + [EOS]], settings)
    assert advance._cache_size() == compiled
    engine.compile(settings, longest=8, sentences=None)  # all slots
    compiled = advance._cache_size()
    search(engine, [[5, EOS]] * 30, settings)
    assert advance._cache_size() == compiled


def test_learned_positions_bound_outputs_and_a_longer_source_is_an_error_that_names_the_mend(make_engine):
    engine = make_engine(positions="learned", max_length=6)
    endless = BeamSearch(beam_size=1, min_length=99)
    engine.compile(endless, longest=64, sentences=1)
    compiled = advance._cache_size()
    for length in (2, 6):
        ((ids, log_probs),) = search(engine, [[5] * (length - 1) + [EOS]], endless)[0]
        assert len(ids) == 6 and np.isfinite(log_probs).all()
    assert advance._cache_size() == compiled
    with pytest.raises(ValueError, match="has 7 positions, but model.max_length is 6: raise it"):
        search(engine, [[5] * 6 + [EOS]], endless)


def test_where_the_next_room_is_more_than_there_are_learned_positions_an_output_has_all_of_them(make_engine):
    engine = make_engine(positions="learned", max_length=60)
    ((ids, log_probs),) = search(engine, [[5] * 19 + [EOS]], BeamSearch(beam_size=1, min_length=99))[0]
    assert len(ids) == 60 and np.isfinite(log_probs).all()


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stream_is_the_search_token_by_token(make_engine, devices):
    engine, source, settings = make_engine(devices=devices), SOURCES[1], SAMPLING.replace(num_return=1)
    (request,) = engine.submit([source], settings, rngs=keys(1), streams=True)
    ids = search(engine, [source], settings, rngs=keys(1))[0][0].ids.tolist()
    assert list(request) == [ids[: length + 1] for length in range(len(ids))]
    assert request.result()[0].ids.tolist() == ids


@pytest.mark.parametrize(("trained_with", "used"), [("auto", "auto"), ("cudnn", "auto"), ("xla", "xla")])
def test_attention_is_computed_where_the_devices_are_whatever_training_insisted_on(trained_with, used, make_engine):
    engine = make_engine(attention_implementation=trained_with)
    assert [config.attention_implementation for config in engine.ensemble.configs] == [used]


def test_devices_that_are_not_the_default_ones_are_left_to_xla(make_engine, monkeypatch):
    monkeypatch.setattr(ensemble_module, "get_default_device", lambda: SimpleNamespace(platform="gpu"))
    assert make_engine().ensemble.configs[0].attention_implementation == "xla"


KINDS = {
    "greedy": BeamSearch(beam_size=1),
    "beam": BeamSearch(beam_size=3, num_return=2),
    "first": BeamSearch(beam_size=3, stopping="first", no_repeat_ngram=2, banned=(7,)),
    "sampling": Sampling(num_return=2, top_k=5),
}


@pytest.mark.slow
def test_sentences_from_four_threads_at_random_times_some_cancelled_get_what_each_gets_alone(make_engine):
    """300 sentences of mixed lengths, with every kind of search, prefixes, limits and streams."""
    engine, rng = make_engine(290, 291, batch_tokens=128), np.random.default_rng(11)
    sources, rngs = make_sources(300, longest=15), keys(300, seed=9)
    kinds = [list(KINDS.values())[number % 4] for number in range(300)]
    prefixes = [[[], [], [4, 9]][number % 3] for number in range(300)]
    settings = [kinds[number].replace(extra_length=int(rng.integers(3, 12))) for number in range(300)]
    cancelled = set(rng.choice(300, 30, replace=False).tolist())
    requests, pauses = {}, rng.exponential(0.01, 300)

    def submit(thread):
        for number in range(thread, 300, 4):
            time.sleep(pauses[number])
            options = {"prefixes": prefixes[number : number + 1], "rngs": rngs[number : number + 1]}
            streams = kinds[number].hypotheses == 1 and number % 8 == 0
            (requests[number],) = engine.submit([sources[number]], settings[number], streams=streams, **options)
            if number in cancelled:
                time.sleep(pauses[-number])
                requests[number].cancel()

    threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found, unlike = {}, 0
    for number, request in requests.items():
        try:
            found[number] = request.result()
        except CancelledError:
            assert number in cancelled
    assert len(found) >= 270
    alone = make_engine(290, 291, batch_tokens=32)  # slots for one or two sentences
    for number, outputs in found.items():
        options = {"prefixes": prefixes[number : number + 1], "rngs": rngs[number : number + 1]}
        (expected,) = alone.search([sources[number]], settings[number], **options)
        totals = [sum(output.log_probs) for output in outputs]
        np.testing.assert_allclose(totals, [sum(output.log_probs) for output in expected], atol=1e-3)
        unlike += [output.ids.tolist() for output in outputs] != [output.ids.tolist() for output in expected]
    assert unlike <= 0.005 * len(found)
    engine.close()


def test_an_error_in_the_middle_is_its_own_sentences_and_the_others_get_their_outputs(make_engine):
    engine = make_engine(positions="learned", max_length=20)
    sources, prefixes = [source for source in SOURCES if len(source) <= 16], []
    sources[3], sources[8] = [5] * 20 + [EOS], [5, V, EOS]
    prefixes = [[] for _ in sources]
    prefixes[5] = [7] * 20
    requests = engine.submit(sources, GREEDY, prefixes=prefixes)
    for number, message in (
        (3, "has 21 positions"),
        (5, "a prefix has 20 tokens"),
        (8, "a source has the token id 12"),
    ):
        with pytest.raises(ValueError, match=message):
            requests[number].result()
    others = [number for number in range(len(sources)) if number not in (3, 5, 8)]
    expected = search(engine, [sources[number] for number in others], GREEDY)
    check_same([requests[number].result() for number in others], expected)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        *((settings, {}) for settings in (GREEDY, BEAM, SAMPLING)),
        (BEAM, {"decoder_autoregression": "ssru", "num_decoder_layers": 2}),  # the second's state is not a number
    ],
    ids=["greedy", "beam", "sampling", "recurrent"],
)
def test_a_sentence_that_overflows_float16_ends_at_once_and_spoils_no_other(make_engine, settings, changes):
    engine = make_engine(dtype="float16", **changes)
    (stored,) = engine.ensemble.models
    embedding = stored.params["source_embedding"]
    embedding["embedding"] = embedding["embedding"].at[11].set(1e5)  # infinite in float16
    good = [[token for token in source if token != 11] for source in SOURCES]
    bad = [[11, *source] for source in good[::3]]
    both = [source for pair in zip(good, itertools.cycle(bad), strict=False) for source in pair]
    rngs = keys(len(both))
    found = search(engine, both, settings, rngs=rngs)
    for best, *_ in found[1::2]:
        assert best.ids.tolist() == [EOS] and best.log_probs.tolist() == [BROKEN]
    assert all(output.log_probs.min() > BROKEN for outputs in found[::2] for output in outputs)
    check_same(found[::2], search(engine, good, settings, rngs=rngs[::2]))


def test_a_hypothesis_that_overflows_float16_spoils_no_other_of_its_sentence(make_engine):
    engine = make_engine(dtype="float16")
    plain = search(engine, SOURCES, SAMPLING)
    (stored,) = engine.ensemble.models
    embedding = stored.params["target_embedding"]
    embedding["embedding"] = embedding["embedding"].at[3].set(1e5)  # infinite in float16
    compared = 0
    for before, after in zip(plain, search(engine, SOURCES, SAMPLING), strict=True):
        overflows = [3 in output.ids.tolist()[:-1] for output in before]
        for one, other, does in zip(before, after, overflows, strict=True):
            assert (other.log_probs.min() <= BROKEN) == does
            assert does or one.ids.tolist() == other.ids.tolist()
        compared += len(set(overflows)) == 2
    assert compared > 3  # sentences of which one output overflows and another does not


def test_a_thread_that_cannot_be_started_fails_only_that_call(make_engine, monkeypatch):
    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no new thread")))
        with pytest.raises(RuntimeError, match="no new thread"):
            engine.submit(SOURCES[:1], GREEDY)
    assert len(search(engine, SOURCES[:2], GREEDY)) == 2


def test_what_a_search_cannot_follow_is_an_error_of_that_caller(make_engine):
    engine = make_engine()
    for rngs in (np.zeros((1, 4), np.uint32), keys(2)):
        with pytest.raises(ValueError, match="rngs is no NumPy array of uint32"):
            engine.submit(SOURCES[:1], SAMPLING, rngs=rngs)
    for prefix, given, message in (([5, EOS], 0, "an end of sentence"), ([5], 2, "of which 2 are given")):
        (request,) = engine.submit(SOURCES[:1], GREEDY, prefixes=[prefix], given=[given])
        with pytest.raises(ValueError, match=message):
            request.result(timeout=100)


def test_an_error_of_the_device_reaches_every_waiting_call_and_the_next_ones_are_served(make_engine, monkeypatch):
    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "collect", lambda machine: (_ for _ in ()).throw(RuntimeError("out of memory")))
        for request in engine.submit(SOURCES, GREEDY):
            with pytest.raises(RuntimeError, match="out of memory"):
                request.result(timeout=100)
    assert len(search(engine, SOURCES[:3], GREEDY)) == 3


def test_closing_ends_every_waiting_call_with_an_error_that_names_the_mend(make_engine):
    engine = make_engine()
    endless = BeamSearch(beam_size=1, min_length=10**5, max_length=10**5, extra_length=10**5)
    requests = engine.submit(SOURCES, endless)
    (stream,) = engine.submit(SOURCES[:1], endless, streams=True)
    assert next(iter(stream))
    errors = []

    def wait(request):
        try:
            request.result()
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=wait, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join(timeout=100)
    assert len(errors) == len(requests) and all("closed before this was done" in error for error in errors)
    with pytest.raises(ValueError, match="closed before this was done"):
        list(stream)
    with pytest.raises(ValueError, match="the engine is closed: make a new translator"):
        engine.submit(SOURCES[:1], GREEDY)
    engine.close()


def test_the_thread_ends_when_idle_and_starts_again(make_engine, monkeypatch):
    monkeypatch.setattr(engine_module, "IDLE_S", 0.01)
    engine = make_engine()
    for _ in range(2):
        found = search(engine, SOURCES[:2], GREEDY)
        deadline = time.monotonic() + 60
        while engine._thread is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(found) == 2


def test_an_exception_while_waiting_gives_up_the_sentences_that_are_left(make_engine):
    engine, calls = make_engine(), []

    def after_each():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.search(SOURCES, GREEDY, after_each=after_each)
    assert len(calls) == 3
    check_same(search(engine, SOURCES[:2], GREEDY), search(make_engine(), SOURCES[:2], GREEDY))
