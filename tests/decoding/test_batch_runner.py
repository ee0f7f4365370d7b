from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_transformer.decoding import batch_runner as engine_module
from flax_transformer.decoding.batch_runner import Engine
from flax_transformer.decoding.batching import bucket
from flax_transformer.decoding.jitted import search_translations
from flax_transformer.decoding.settings import BeamSearch, Sampling

V, PAD, START, EOS = 12, 0, 1, 2
# With so little extra room no output needs a longer bucket than its source.
GREEDY = BeamSearch(beam_size=1, extra_length=4)
BEAM = BeamSearch(beam_size=3, num_return=2, extra_length=4)
SAMPLING = Sampling(num_return=2, extra_length=4)


def make_sources(count, longest=16):
    rng = np.random.default_rng(0)
    return [[*rng.integers(3, V, rng.integers(0, longest)).tolist(), EOS] for _ in range(count)]


SOURCES = make_sources(40)


@pytest.fixture(scope="module")
def make_engine(make_model):
    """Makes an engine of one model, or of several if seeds are given."""

    def make(*seeds, batch_tokens=64, devices=1, **changes):
        configs, models = zip(*(make_model(V, seed, **changes) for seed in seeds or (290,)), strict=True)
        return Engine(configs, models, batch_tokens=batch_tokens, devices=jax.local_devices()[:devices])

    return make


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture
def searched(monkeypatch):
    """Records the arguments of the compiled search: the source's shape, limits and options."""
    calls = []

    def watch(models, source, limits, **options):
        calls.append((source.shape, limits, options))
        return search_translations(models, source, limits, **options)

    monkeypatch.setattr(engine_module, "search_translations", watch)
    return calls


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def search(engine, sources, settings, prefixes=None, rngs=None):
    if isinstance(settings, Sampling) and rngs is None:
        rngs = keys(len(sources))
    return engine.search(sources, settings, prefixes=prefixes or [[]] * len(sources), rngs=rngs)


def check_same(found, expected):
    """Equal tokens, and log-probabilities that are equal up to the effect of a batch's shape."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [output.ids.tolist() for output in ours] == [output.ids.tolist() for output in theirs]
        for output, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(output.log_probs, other.log_probs, rtol=1e-3, atol=1e-4)


def test_many_sentences_compile_once_per_bucket_and_get_the_same_outputs_as_alone(engine, searched):
    before = search_translations._cache_size()
    together = search(engine, SOURCES, GREEDY)
    compiled = search_translations._cache_size() - before
    shapes = {shape for shape, _, _ in searched}
    assert len(searched) > 2 * len(shapes)
    assert compiled <= len(shapes) == len({bucket(len(source)) for source in SOURCES})
    check_same(together, [search(engine, [source], GREEDY)[0] for source in SOURCES])
    assert len({tuple(output.ids.tolist()) for (output,) in together}) > 10  # otherwise a mix-up would not show


@pytest.mark.parametrize("settings", [BEAM, SAMPLING], ids=["beam", "sampling"])
def test_other_sentences_and_batches_do_not_change_a_result(engine, make_engine, settings):
    sources = [source for source in SOURCES if len(source) <= 8]
    rngs = keys(len(sources))
    together = search(engine, sources, settings, rngs=rngs)
    assert all(len(outputs) == 2 for outputs in together)
    order = np.random.default_rng(1).permutation(len(sources))[:7]
    others = make_engine(batch_tokens=16)
    mixed = search(others, [sources[number] for number in order], settings, rngs=rngs[order])
    check_same(mixed, [together[number] for number in order])


def test_every_output_ends_once_without_padding_or_start(engine):
    for settings in (GREEDY, SAMPLING):
        for outputs in search(engine, SOURCES, settings):
            assert len(outputs) == settings.num_return
            for ids, log_probs in outputs:
                assert ids.tolist().index(EOS) == len(ids) - 1 and not {PAD, START} & set(ids.tolist())
                assert len(log_probs) == len(ids) and (log_probs < 0).all()


def test_a_sentences_limit_follows_its_own_length_and_not_its_buckets(engine):
    never = GREEDY.replace(extra_length=3, min_length=99)  # so that each ends at its limit
    sources = [[5] * (length - 1) + [EOS] for length in (1, 2, 5, 7, 8, 9, 13)]
    found = search(engine, sources, never)
    assert [len(output.ids) for (output,) in found] == [len(source) + 3 for source in sources]
    found = search(engine, sources[:4], never.replace(max_length=6))
    assert [len(output.ids) for (output,) in found] == [4, 5, 6, 6]


def test_a_batch_does_not_wait_for_its_last_few_sentences_which_are_finished_later(engine, make_engine, searched):
    sources = [source for source in make_sources(200, longest=8) if len(source) <= 8][:60]
    found = search(make_engine(batch_tokens=32 * 8), sources, GREEDY)
    assert {width for (_, width), _, _ in searched} == {8, 16}  # some moved to a bucket that no source needs
    assert not any(options["may_wait"][: len(sources)].any() for (_, width), _, options in searched if width == 16)
    check_same(found, search(engine, sources, GREEDY))


def test_outputs_that_need_more_room_than_their_bucket_get_it(engine, searched):
    """They are longer than two buckets, and each equals the output of a search with enough room."""
    settings, rngs = Sampling(min_length=24), keys(6)
    sources = [source for source in SOURCES if len(source) <= 16][:6]
    found = search(engine, sources, settings, rngs=rngs)
    widths = [width for (_, width), _, _ in searched]
    assert widths == sorted(widths) and len(set(widths)) > 2
    assert len({shape for shape, _, _ in searched}) == len(set(widths))
    whole, _ = search_translations(
        engine.models,
        np.array([source + [PAD] * (16 - len(source)) for source in sources], "int32"),
        np.array([settings.limit(len(source)) for source in sources], "int32"),
        configs=engine.configs,
        settings=settings.replace(banned=(PAD, START)),
        max_length=settings.limit(16),
        rngs=rngs,
    )
    for number, outputs in enumerate(found):
        for rank, output in enumerate(outputs):
            length = int(whole.lengths[number, rank])
            assert output.ids.tolist() == whole.tokens[number, rank, :length].tolist()
            np.testing.assert_allclose(
                output.log_probs, whole.token_log_probs[number, rank, :length], rtol=1e-3, atol=1e-4
            )


def test_outputs_begin_with_their_prefixes_and_continue_as_if_these_were_chosen(engine):
    sources = [source for source in SOURCES if len(source) > 4][:6]
    free = search(engine, sources, GREEDY)
    other = 5 if free[1][0].ids[0] != 5 else 6
    prefixes = [[], [other], [9, 9, 9, 9, 9, 9, 9], [3, 4], [], free[5][0].ids[:2].tolist()]
    found = search(engine, sources, GREEDY, prefixes)
    for (output,), prefix in zip(found, prefixes, strict=True):
        assert output.ids[: len(prefix)].tolist() == prefix and len(output.ids) > len(prefix)
    for number in (0, 4, 5):  # no prefix, or the prefix of what is chosen anyway
        check_same([found[number]], [free[number]])
    reverse = search(engine, sources[::-1], GREEDY, prefixes[::-1])
    check_same(found, reverse[::-1])


def test_a_prefix_without_room_for_the_end_is_an_error_with_a_remedy(engine):
    fits = search(engine, [[5, EOS]], GREEDY, [[7] * 5])
    assert fits[0][0].ids.tolist() == [7] * 5 + [EOS]
    message = "a prefix has 6 tokens, but its output may have only 6"
    with pytest.raises(ValueError, match=message):
        search(engine, [[5, EOS]], GREEDY, [[7] * 6])


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_eight_devices_share_each_batch_and_find_the_same_as_one(engine, make_engine, searched, settings):
    sources = [source for source in SOURCES if len(source) <= 8]
    expected = search(engine, sources, settings)
    searched.clear()
    check_same(search(make_engine(devices=8, batch_tokens=128), sources, settings), expected)
    for (rows, width), _, options in searched:
        assert rows % 8 == 0 and rows * width <= 128
        assert options["mesh"].size == 8


def test_targets_of_any_lengths_are_scored_and_aligned_like_alone(make_engine):
    together, alone = make_engine(devices=8), make_engine()
    short, long = ([source for source in SOURCES if (len(source) <= 8) == shorter] for shorter in (True, False))
    sources, targets = [*long[:2], *short[:3]], [*long[2:4], *short[3:6]]
    scored, aligned = together.score(sources, targets), together.align(sources, targets, layer=-1)
    for source, target, (ids, log_probs), weights in zip(sources, targets, scored, aligned, strict=True):
        assert ids.tolist() == target and log_probs.shape == (len(target),)
        assert weights.shape == (len(target), len(source))
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(log_probs, alone.score([source], [target])[0].log_probs, atol=1e-4)
        np.testing.assert_allclose(weights, alone.align([source], [target], layer=-1)[0], atol=1e-5)


def test_programs_compiled_in_advance_are_not_compiled_again(make_engine):
    # An output is at most one and a half times as long as its source: no sentence moves on to another bucket.
    settings, engine = BeamSearch(beam_size=1, extra_length=5), make_engine()
    engine.compile(settings, longest=13, sentences=1)
    compiled = search_translations._cache_size()
    engine.compile(settings, longest=13, sentences=1)
    for length in range(1, 17):
        search(engine, [[5] * (length - 1) + [EOS]], settings)
    assert search_translations._cache_size() == compiled
    engine.compile(settings, longest=8, sentences=None)  # batches that are full
    compiled = search_translations._cache_size()
    search(engine, [[5, EOS]] * 30, settings)
    assert search_translations._cache_size() == compiled


def test_learned_positions_limit_outputs_and_a_longer_source_is_an_error(make_engine):
    engine = make_engine(positions="learned", max_length=6)
    endless = BeamSearch(beam_size=1, min_length=99)
    engine.compile(endless, longest=64, sentences=1)
    compiled = search_translations._cache_size()
    for length in (2, 6):
        ((ids, log_probs),) = search(engine, [[5] * (length - 1) + [EOS]], endless)[0]
        assert len(ids) == 6 and np.isfinite(log_probs).all()
    assert search_translations._cache_size() == compiled
    with pytest.raises(ValueError, match="has 7 positions, but model.max_length is 6: raise it"):
        search(engine, [[5] * 6 + [EOS]], endless)


def test_an_output_can_use_all_learned_positions_if_the_next_bucket_is_larger(make_engine):
    engine = make_engine(positions="learned", max_length=60)
    ((ids, log_probs),) = search(engine, [[5] * 19 + [EOS]], BeamSearch(beam_size=1, min_length=99))[0]
    assert len(ids) == 60 and np.isfinite(log_probs).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_stream_is_the_search_token_by_token(make_engine, devices):
    engine, source, settings = make_engine(devices=devices), SOURCES[1], SAMPLING.replace(num_return=1)
    steps = list(engine.stream(source, settings, rngs=keys(1)))
    ids = search(engine, [source], settings, rngs=keys(1))[0][0].ids.tolist()
    assert steps == [ids[: length + 1] for length in range(len(ids))]


@pytest.mark.parametrize(("trained_with", "used"), [("auto", "auto"), ("cudnn", "auto"), ("xla", "xla")])
def test_the_implementation_of_attention_suits_the_devices_whatever_training_used(trained_with, used, make_engine):
    engine = make_engine(attention_implementation=trained_with)
    assert [config.attention_implementation for config in engine.configs] == [used]


def test_devices_that_are_not_the_default_ones_use_xla(make_engine, monkeypatch):
    monkeypatch.setattr(engine_module, "get_default_device", lambda: SimpleNamespace(platform="gpu"))
    assert make_engine().configs[0].attention_implementation == "xla"
