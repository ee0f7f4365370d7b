"""Tests the choice of the next token.

Samples are compared with their probabilities by a chi-square test, which a correct program fails for one seed in
100,000; the seeds are fixed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_transformer.decoding.next_token import GROUP, allowed_tokens, best_tokens, draw_tokens
from flax_transformer.decoding.settings import BeamSearch, Sampling

PAD, EOS = 0, 2
best_jitted = jax.jit(best_tokens, static_argnames="count")


def check_best(scores, count):
    """The values found equal those of a sort, and the indices point to them."""
    values, where = jax.device_get(best_jitted(jnp.asarray(scores), count=count))
    flat = scores.reshape(*scores.shape[:-2], -1)
    np.testing.assert_array_equal(values, -np.sort(-flat, axis=-1)[..., :count])
    assert where.dtype == np.int32 and (where >= 0).all() and (where < flat.shape[-1]).all()
    # If only impossible tokens are left, their indices mean nothing.
    there = np.where(values > -np.inf, np.take_along_axis(flat, where, axis=-1), -np.inf)
    np.testing.assert_array_equal(there, values)
    for row, found in zip(where.reshape(-1, count), values.reshape(-1, count), strict=True):
        places = row[found > -np.inf]
        assert len(set(places.tolist())) == len(places)


# One group and many, multiples of the group size and primes.
@pytest.mark.parametrize(
    ("size", "hypotheses", "count"),
    [
        (5, 1, 1),
        (5, 3, 6),
        (61, 4, 4),
        (GROUP, 3, 6),
        (67, 3, 6),
        (131, 1, 1),
        (211, 3, 15),
        (3 * GROUP, 4, 8),
        (1000, 1, 5),
    ],
)
def test_the_best_tokens_equal_those_of_a_sort(size, hypotheses, count):
    check_best(np.random.default_rng(size).normal(size=(7, hypotheses, size)).astype("float32"), count)


def test_rows_may_have_any_number_of_dimensions():
    check_best(np.random.default_rng(0).normal(size=(2, 3, 1, 131)).astype("float32"), 1)


@pytest.mark.parametrize("count", [GROUP + 7, 2 * 3 * 101])
def test_more_tokens_than_a_group_has_can_be_found(count):
    scores = np.random.default_rng(0).normal(size=(2, 2, 3 * 101)).astype("float32")
    check_best(scores, count)
    check_best(np.sort(scores, axis=-1), count)  # all of the best in one group


@pytest.mark.parametrize(("size", "count"), [(67, 8), (67, 3 * 67), (GROUP, 3 * GROUP)])
def test_impossible_tokens_come_last(size, count):
    rng = np.random.default_rng(1)
    for share in (0.5, 0.99, 1.0):
        scores = rng.normal(size=(5, 3, size)).astype("float32")
        scores[rng.random(scores.shape) < share] = -np.inf
        scores[0, 1:] = -np.inf
        check_best(scores, count)


def test_tokens_with_equal_scores_are_found_once_each():
    check_best(np.random.default_rng(2).integers(0, 3, (7, 3, 151)).astype("float32"), 20)
    check_best(np.zeros((7, 3, 151), "float32"), 20)


@partial(jax.jit, static_argnames=("settings", "vocab_size"))
def allowed_jitted(tokens, step, limits, prefix, *, settings, vocab_size=7):
    return allowed_tokens(tokens, step, limits, prefix, settings, vocab_size=vocab_size, eos_id=EOS, pad_id=PAD)


def allowed(tokens, *, settings, limits=None, prefix=None, room=9, vocab_size=7):
    """Which tokens may come after these, for each of B sentences with N hypotheses."""
    tokens = np.array(tokens, "int32")
    batch, hypotheses, step = tokens.shape
    padded = np.zeros((batch, hypotheses, room), "int32")
    padded[..., :step] = tokens
    limits = np.array([room] * batch if limits is None else limits, "int32")
    prefix = None if prefix is None else np.array(prefix, "int32")
    found = allowed_jitted(
        padded, np.full(batch, step, "int32"), limits, prefix, settings=settings, vocab_size=vocab_size
    )
    return np.broadcast_to(found, (batch, hypotheses, vocab_size))


def names(row):
    return set(np.flatnonzero(row).tolist())


def test_without_constraints_all_tokens_are_allowed_until_the_limit_and_then_only_the_end():
    free = BeamSearch()
    for step in range(4):
        found = allowed(np.full((3, 2, step), 5), settings=free, limits=[3, 4, 9])
        for sentence, limit in enumerate([3, 4, 9]):
            for row in found[sentence]:
                assert names(row) == ({EOS} if step + 1 >= limit else set(range(7)))


def test_banned_tokens_are_not_allowed_and_if_all_are_banned_the_end_is():
    assert names(allowed([[[3]]], settings=BeamSearch(banned=(1, 5)))[0, 0]) == {0, 2, 3, 4, 6}
    assert names(allowed([[[3]]], settings=BeamSearch(banned=(2,)))[0, 0]) == {0, 1, 3, 4, 5, 6}
    assert names(allowed([[[3]]], settings=BeamSearch(banned=tuple(range(7))))[0, 0]) == {EOS}
    others = tuple(token for token in range(7) if token != EOS)
    # Too short for an end, but nothing else is allowed.
    assert names(allowed([[[3]]], settings=BeamSearch(banned=others, min_length=5))[0, 0]) == {EOS}


def test_if_all_listed_tokens_are_banned_the_end_is_allowed_though_the_list_is_padded():
    tokens, listed = jnp.full((1, 1, 4), 5), jnp.array([[EOS, 4, 5, -1, -1]])
    settings, ids = BeamSearch(banned=(4, 5), min_length=3), {"eos_id": EOS, "pad_id": PAD}
    found = allowed_tokens(tokens, jnp.array([1]), jnp.array([9]), None, settings, vocab_size=5, listed=listed, **ids)
    assert np.asarray(found)[0, 0].tolist() == [True, False, False, False, False]


def test_the_end_is_allowed_from_the_minimum_length_on():
    for step in range(6):
        found = allowed(np.full((1, 1, step), 5), settings=BeamSearch(min_length=4), limits=[6])
        # An output counts its end: the end as the fourth token makes it four long.
        assert (EOS in names(found[0, 0])) == (step + 1 >= 4)
    assert names(allowed([[[5]]], settings=BeamSearch(min_length=9), limits=[2])[0, 0]) == {EOS}


def repeating(tokens, size, vocab_size):
    """A direct definition: the tokens that followed earlier occurrences of the last ones."""
    found = set()
    for token in range(vocab_size):
        grown = [*tokens, token]
        if len(grown) >= size:
            earlier = [grown[start : start + size] for start in range(len(grown) - size)]
            if grown[-size:] in earlier:
                found.add(token)
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_sequence_of_n_tokens_may_repeat(size):
    vocab_size = 5
    for step in (0, 1, 2, 3, 8, 20):
        tokens = np.random.default_rng(step).choice([1, 3, 4], (5, 3, step))
        found = allowed(tokens, settings=BeamSearch(no_repeat_ngram=size), room=23, vocab_size=vocab_size)
        for sentence, hypothesis in np.ndindex(5, 3):
            expected = set(range(vocab_size)) - repeating(tokens[sentence, hypothesis].tolist(), size, vocab_size)
            assert names(found[sentence, hypothesis]) == expected


def test_if_every_continuation_would_repeat_the_end_is_allowed():
    tokens = [[[0, 1, 3, 4, 5, 6]]]
    assert names(allowed(tokens, settings=BeamSearch(no_repeat_ngram=1))[0, 0]) == {EOS}
    assert names(allowed(tokens, settings=BeamSearch(no_repeat_ngram=1, min_length=9))[0, 0]) == {EOS}


def test_a_prefix_overrides_bans_and_the_limit_overrides_the_prefix():
    prefix = [[4, 4, 5, PAD], [3, PAD, PAD, PAD], [PAD] * 4, [4, 4, 4, 4]]
    strict = BeamSearch(banned=(4,), no_repeat_ngram=1, min_length=9)
    for step in range(6):
        said = np.array([[4, 4, 5, 6, 6, 6], [3, 6, 6, 6, 6, 6], [6] * 6, [4] * 6])[:, None, :step]
        found = allowed(said, settings=strict, prefix=prefix, limits=[9, 9, 9, 3])
        plain = allowed(said, settings=strict, limits=[9, 9, 9, 3])
        for sentence, row in enumerate(prefix):
            wished = row[step] if step < len(row) else PAD
            if sentence == 3 and step >= 2:
                assert names(found[sentence, 0]) == {EOS}
            elif wished != PAD:
                assert names(found[sentence, 0]) == {wished}
            else:
                assert np.array_equal(found[sentence], plain[sentence])


DRAWS, SIZE = 8_000, 11
LOGITS = np.random.default_rng(3).normal(scale=1.5, size=SIZE).astype("float32")
draw_jitted = jax.jit(draw_tokens, static_argnames="settings")


def at(step, sentences=DRAWS // 4):
    """The same number of tokens so far for each sentence."""
    return np.full(sentences, step, "int32")


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def expected_probabilities(settings, logits=LOGITS):
    """Temperature, then the most probable k, then the least number of those that have probability p together."""
    probabilities = softmax(np.float64(logits) / settings.temperature)
    order = np.argsort(-probabilities)
    if settings.top_k:
        probabilities[order[settings.top_k :]] = 0
        probabilities /= probabilities.sum()
    if settings.top_p < 1:
        kept = 1 + np.flatnonzero(np.cumsum(probabilities[order]) >= settings.top_p)[0]
        probabilities[order[kept:]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_k": 100},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(wish):
    settings = Sampling(**wish)
    logits = np.broadcast_to(LOGITS, (DRAWS // 4, 4, SIZE))  # each sentence has its key, each of its samples draws
    keys = jax.random.split(jax.random.key(4), DRAWS // 4)
    drawn = np.asarray(draw_jitted(logits, keys, at(2), settings=settings))
    counts, expected = np.bincount(drawn.ravel(), minlength=SIZE), expected_probabilities(settings)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], DRAWS * expected[possible]).pvalue > 1e-5


def test_tokens_that_are_not_allowed_are_not_drawn_and_the_others_share_their_probability():
    logits = np.where(np.arange(SIZE) % 3 == 0, -np.inf, LOGITS).astype("float32")
    keys = jax.random.split(jax.random.key(5), DRAWS)
    settings = Sampling(top_k=9, top_p=0.9999)
    drawn = draw_jitted(np.broadcast_to(logits, (DRAWS, 1, SIZE)), keys, at(0, DRAWS), settings=settings)
    counts, expected = np.bincount(np.asarray(drawn).ravel(), minlength=SIZE), softmax(np.float64(logits))
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], DRAWS * expected[expected > 0]).pvalue > 1e-5


def test_samples_steps_and_sentences_are_independent():
    """Chi-square test of independence for the tokens that two of them draw."""
    logits = np.broadcast_to(LOGITS[:5], (DRAWS, 2, 5))
    keys = jax.random.split(jax.random.key(6), DRAWS)
    first, second = (np.asarray(draw_jitted(logits, keys, at(s, DRAWS), settings=Sampling())) for s in (0, 1))
    for one, other in [(first[:, 0], first[:, 1]), (first[:, 0], second[:, 0]), (first[1:, 0], first[:-1, 0])]:
        table = np.zeros((5, 5))
        np.add.at(table, (one, other), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-5


def test_a_sentence_draws_with_its_own_key_whatever_the_others():
    logits = np.random.default_rng(7).normal(size=(6, 3, SIZE)).astype("float32")
    keys = jax.random.split(jax.random.key(8), 6)
    together = np.asarray(draw_jitted(logits, keys, at(1, 6), settings=Sampling()))
    alone = np.asarray(draw_jitted(logits[4:5], keys[4:5], at(1, 1), settings=Sampling()))
    assert np.array_equal(together[4:5], alone)
    assert together.shape == (6, 3) and together.dtype == np.int32
