"""Compares compiled searches with whole passes through the model, which need no cache."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from flax_transformer.decoding.jitted import (
    align_targets,
    extend_stream,
    score_targets,
    search_translations,
    start_stream,
)
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens

V, PAD, START, EOS = 12, 0, 1, 2
SOURCE = np.array([[4, 9, 5, 2, 0, 0, 0], [6, 3, 7, 8, 10, 11, 2], [5, 2, 0, 0, 0, 0, 0]], "int32")
LIMITS = np.array([9, 6, 2], "int32")
LONGEST = 9
SPECIAL = (PAD, START)  # what no output holds
GREEDY = BeamSearch(beam_size=1, banned=SPECIAL)
BEAM = BeamSearch(beam_size=4, num_return=3, banned=SPECIAL)
SAMPLING = Sampling(num_return=3, banned=SPECIAL)
every_search = pytest.mark.parametrize("settings", [GREEDY, BEAM, SAMPLING], ids=["greedy", "beam", "sampling"])


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(V, 290)  # A model whose outputs end both at and before their limits.


@pytest.fixture(scope="module")
def ensemble(make_model, model):
    """Two models that differ in size too."""
    return model, make_model(V, 291, d_model=8, num_decoder_layers=2)


def split(models):
    """The configs and the parameters."""
    return tuple(config for config, _ in models), tuple(params for _, params in models)


def keys(settings, count=3):
    return jax.random.split(jax.random.key(0), 3)[:count] if isinstance(settings, Sampling) else None


def search(*models, source=SOURCE, limits=LIMITS, settings, max_length=LONGEST, **options):
    configs, params = split(models)
    options = {"configs": configs, "settings": settings, "max_length": max_length, **options}
    options.setdefault("rngs", keys(settings, len(source)))
    found, is_open = search_translations(params, source, limits, **options)
    return {**jax.device_get(vars(found)), "open": np.asarray(is_open)}


def log_probs_of(model, target, source=SOURCE):
    """Log-probabilities [B, T, V] of one pass over whole targets, in which no token is special."""
    config, params = model
    words = Tokens.from_segments(target, np.ones_like(target))
    return jax.nn.log_softmax(whole_pass(config)({"params": params}, source, words))


@cache
def whole_pass(config):
    return jax.jit(partial(Transformer(config).apply, deterministic=True))


def mean_log_probs(models, target):
    """Log-probabilities of the mean of the models' probabilities, by hand."""
    return np.log(np.mean([np.exp(np.float64(log_probs_of(model, target))) for model in models], axis=0))


def check_log_probs(found, models, atol=1e-4):
    """Each token's log-probability equals that of parallel passes, and they sum to those of the outputs."""
    lengths, each = found["lengths"], found["token_log_probs"]
    assert (lengths > 0).all() and (lengths <= LIMITS[:, None]).all()
    for rank in range(lengths.shape[1]):
        tokens = found["tokens"][:, rank]
        expected = np.take_along_axis(mean_log_probs(models, tokens), tokens[..., None], axis=-1)[..., 0]
        there = np.arange(tokens.shape[1]) < lengths[:, rank, None]
        np.testing.assert_allclose(each[:, rank], np.where(there, expected, 0), atol=atol)
        assert (tokens[~there] == PAD).all() and (tokens == EOS).sum(1).tolist() == [1] * len(tokens)
    np.testing.assert_allclose(found["log_probs"], each.sum(-1), atol=atol)


def test_greedy_search_equals_a_loop_that_runs_the_whole_model_at_each_step(model):
    target, lengths = np.zeros((len(SOURCE), LONGEST), "int32"), np.zeros(len(SOURCE), int)
    for step in range(LONGEST):
        log_probs = np.array(log_probs_of(model, target))[:, step]
        log_probs[:, SPECIAL] = -np.inf
        best = log_probs.argmax(-1)
        best = np.where(step + 1 >= LIMITS, EOS, best)
        target[:, step] = np.where(lengths == 0, best, 0)
        lengths = np.where((lengths == 0) & (best == EOS), step + 1, lengths)
    assert (lengths == LIMITS).any()
    found = search(model, settings=GREEDY)
    assert np.array_equal(found["lengths"][:, 0], lengths)
    assert np.array_equal(found["tokens"][:, 0], target)


@every_search
def test_log_probabilities_equal_those_of_parallel_passes(model, settings):
    found = search(model, settings=settings)
    check_log_probs(found, [model])
    expected = found["log_probs"] / settings.penalty(found["lengths"])
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5)
    assert (found["lengths"][2] == LIMITS[2]).any()  # an end that was forced counts like any other


@every_search
def test_an_ensemble_averages_probabilities(ensemble, settings):
    check_log_probs(search(*ensemble, settings=settings), ensemble)


def test_an_ensemble_chooses_by_the_mean_probability(ensemble):
    found = search(*ensemble, settings=GREEDY)
    tokens = found["tokens"][:, 0]
    log_probs = mean_log_probs(ensemble, tokens)
    log_probs[..., SPECIAL] = -np.inf
    best = log_probs.argmax(-1)
    chosen = np.arange(LONGEST) < np.minimum(found["lengths"], LIMITS[:, None] - 1)
    assert np.array_equal(tokens[chosen], best[chosen])
    for model in ensemble:
        assert not np.array_equal(tokens, search(model, settings=GREEDY)["tokens"][:, 0])


def test_an_ensemble_of_twice_the_same_model_equals_the_model(model):
    twice, once = search(model, model, settings=BEAM), search(model, settings=BEAM)
    assert np.array_equal(twice["tokens"], once["tokens"])
    np.testing.assert_allclose(twice["token_log_probs"], once["token_log_probs"], atol=1e-5)


@every_search
def test_scoring_an_output_gives_the_log_probabilities_of_the_search(ensemble, settings):
    configs, params = split(ensemble)
    found = search(*ensemble, settings=settings)
    for rank in range(settings.num_return):
        scored = score_targets(params, SOURCE, found["tokens"][:, rank], configs=configs)
        np.testing.assert_allclose(scored, found["token_log_probs"][:, rank], atol=1e-4)


@pytest.mark.parametrize("settings", [BEAM, SAMPLING], ids=["beam", "sampling"])
def test_padding_other_sentences_and_room_do_not_change_a_result(model, settings):
    together = search(model, settings=settings)
    assert SOURCE[0].tolist() == [4, 9, 5, 2, 0, 0, 0]
    short = {"source": SOURCE[:1, :4], "limits": LIMITS[:1], "rngs": keys(settings, 1)}
    alone = search(model, settings=settings, max_length=LONGEST + 2, **short)
    assert np.array_equal(alone["tokens"][0, :, :LONGEST], together["tokens"][0])
    np.testing.assert_allclose(alone["scores"][0], together["scores"][0], atol=1e-5)


def test_sentences_that_need_more_room_are_reported(model):
    whole, cut = search(model, settings=GREEDY), search(model, settings=GREEDY, max_length=3)
    assert not whole["open"].any()
    assert np.array_equal(cut["open"], whole["lengths"][:, 0] > 3) and cut["open"].any()
    assert np.array_equal(cut["tokens"][2, :, :3], whole["tokens"][2, :, :3])


def test_a_few_sentences_that_may_wait_are_left_and_the_others_do_not_change(model):
    """Two of forty sentences have a high limit and reach it."""
    source, limits = np.random.default_rng(0).integers(3, V, (40, 7)).astype("int32"), np.full(40, 3, "int32")
    limits[[4, 17]] = LONGEST
    options = {"source": source, "limits": limits, "settings": GREEDY.replace(min_length=LONGEST)}
    nobody, all_may = np.zeros(40, bool), np.ones(40, bool)
    whole, cut = search(model, may_wait=nobody, **options), search(model, may_wait=all_may, **options)
    assert not whole["open"].any() and whole["lengths"][:, 0].tolist() == limits.tolist()
    assert np.flatnonzero(cut["open"]).tolist() == [4, 17]
    not_told, one = search(model, **options), search(model, may_wait=np.arange(40) != 4, **options)
    for name in ("tokens", "lengths", "log_probs"):
        assert np.array_equal(cut[name][~cut["open"]], whole[name][~cut["open"]])
        for finished in (not_told, one):  # one that may not wait is finished, and the other continues meanwhile
            assert np.array_equal(finished[name], whole[name])


@pytest.mark.parametrize("settings", [BEAM, SAMPLING], ids=["beam", "sampling"])
def test_several_devices_find_the_same_as_one(model, settings):
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[: len(SOURCE)]), ("batch",))
    prefix = np.array([[5, 7], [6, PAD], [PAD, PAD]], "int32")
    shared, alone = (search(model, settings=settings, prefix=prefix, mesh=each) for each in (mesh, None))
    assert np.array_equal(shared["tokens"], alone["tokens"])
    np.testing.assert_allclose(shared["scores"], alone["scores"], atol=1e-5)
    assert (alone["tokens"][0, :, :2] == [5, 7]).all() and (alone["tokens"][1, :, 0] == 6).all()


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_a_stream_chooses_the_same_tokens_as_the_search(ensemble, settings):
    configs, params = split(ensemble)
    found = search(*ensemble, settings=settings)
    options = {"configs": configs, "settings": settings, "max_length": LONGEST, "rngs": keys(settings)}
    progress = start_stream(params, SOURCE, LIMITS, **options)
    for step in range(1, LONGEST + 1):
        progress = extend_stream(params, progress, LIMITS, **options)
        assert np.array_equal(progress.live.tokens[..., :step], found["tokens"][..., :step])
    assert np.array_equal(progress.live.lengths, found["lengths"])


@pytest.mark.parametrize("layer", [0, -1])
def test_an_alignment_is_the_mean_over_models_and_heads_of_their_weights(make_model, layer):
    models = [make_model(V, seed, num_decoder_layers=2) for seed in (292, 293)]
    target = np.array([[7, 5, 9, 2, 0], [2, 0, 0, 0, 0], [3, 3, 4, 8, 2]], "int32")
    configs, params = split(models)
    aligned = np.asarray(align_targets(params, SOURCE, target, configs=configs, layer=layer))
    expected = []
    for config, own in models:
        apply = jax.jit(partial(Transformer(config).apply, deterministic=True, return_weights=True))
        expected += list(np.asarray(apply({"params": own}, SOURCE, target)[1].cross[layer]).swapaxes(0, 1))
    np.testing.assert_allclose(aligned, np.mean(expected, axis=0), atol=1e-6)
    assert aligned.shape == (3, 5, 7)
    np.testing.assert_allclose(aligned.sum(-1), target != PAD, atol=1e-5)
    assert (aligned.swapaxes(1, 2)[SOURCE == PAD] == 0).all()
