"""Tests how often whole outputs are sampled, with a made-up language whose probabilities are known.

The next token of that language depends on the sentence, the position and the token before. Samples are compared with
their probabilities by a chi-square test, which a correct program fails for one seed in 100,000; the seeds are fixed.
"""

import functools
import itertools
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_transformer.decoding.search import Search
from flax_transformer.decoding.settings import Sampling

PAD, START, EOS = 0, 1, 2
B, V, L = 3, 4, 3
LOGITS = np.random.default_rng(0).normal(scale=1.2, size=(B, L, V, V)).astype("float32")
LOGITS[..., START] = -np.inf  # a search does not choose it


def sample(logits, rngs, settings, max_length=L):
    """Samples of each sentence whose logits these are, as numpy arrays."""
    return SimpleNamespace(**jax.device_get(vars(search(logits, rngs, settings=settings, max_length=max_length))))


@functools.partial(jax.jit, static_argnames=("settings", "max_length"))
def search(logits, rngs, *, settings, max_length):
    def step(state, tokens):
        place, sentence = state
        return (place + 1, sentence), logits[sentence, place, tokens]

    batch = logits.shape[0]
    searching = Search(
        step_fn=step,
        limits=jnp.full(batch, L),
        settings=settings,
        max_length=max_length,
        start_id=START,
        eos_id=EOS,
        pad_id=PAD,
        rngs=rngs,
    )
    state = jnp.zeros((), jnp.int32), jnp.repeat(jnp.arange(batch), settings.hypotheses)
    return searching.result(searching.run(state))


def keys(seed, count=B):
    return jax.random.split(jax.random.key(seed), count)


def softmax(logits):
    exponentials = np.exp(np.float64(logits))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def outputs():
    others = [token for token in range(V) if token != EOS]
    return [(*tokens, EOS) for length in range(L) for tokens in itertools.product(others, repeat=length)]


def product(table, sentence, tokens):
    """Logarithms of the tokens' probabilities; at the limit the end is certain."""
    pairs = itertools.pairwise((START, *tokens))
    return np.prod([table[sentence, place, last, token] for place, (last, token) in enumerate(pairs) if place < L - 1])


def check_frequencies(found, sentence, shares):
    """Chi-square of how often each output was drawn."""
    rows = zip(found.tokens[sentence].tolist(), found.lengths[sentence].tolist(), strict=True)
    counts = Counter(tuple(tokens[:length]) for tokens, length in rows)
    draws = counts.total()
    assert set(counts) <= {tokens for tokens, share in shares.items() if share > 0}
    np.testing.assert_allclose(sum(shares.values()), 1)
    # The test needs five of each, so rarer outputs are counted together.
    rare = [tokens for tokens in shares if draws * shares[tokens] < 5]
    groups = [[tokens] for tokens in shares if tokens not in rare]
    if sum(shares[tokens] for tokens in rare):
        groups.append(rare)
    seen, expected = ([sum(each[tokens] for tokens in group) for group in groups] for each in (counts, shares))
    assert stats.chisquare(seen, draws * np.array(expected)).pvalue > 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_outputs_are_drawn_with_their_probabilities(temperature):
    found = sample(LOGITS, keys(1), Sampling(num_return=4000, temperature=temperature))
    table = softmax(LOGITS / temperature)
    for sentence in range(B):
        shares = {tokens: product(table, sentence, tokens) for tokens in outputs()}
        check_frequencies(found, sentence, shares)


def test_top_k_draws_two_tokens_with_their_renormalised_probabilities():
    found = sample(LOGITS, keys(2), Sampling(num_return=4000, top_k=2))
    table = softmax(LOGITS)
    table[table < np.sort(table, axis=-1)[..., -2:-1]] = 0
    table /= table.sum(axis=-1, keepdims=True)
    for sentence in range(B):
        check_frequencies(found, sentence, {tokens: product(table, sentence, tokens) for tokens in outputs()})


@pytest.mark.parametrize("wishes", [{}, {"temperature": 0.3}, {"top_k": 1}, {"top_p": 0.5}, {"min_length": 3}])
def test_log_probabilities_are_the_models_own_whatever_the_sampling_settings(wishes):
    settings = Sampling(num_return=5, alpha=1.0, length_penalty="length", **wishes)
    found = sample(LOGITS, keys(3), settings)
    table = np.log(softmax(LOGITS))
    for sentence, draw in np.ndindex(B, 5):
        length = found.lengths[sentence, draw]
        tokens = found.tokens[sentence, draw, :length].tolist()
        assert tokens.index(EOS) == length - 1
        pairs = itertools.pairwise((START, *tokens))
        each = [table[sentence, place, last, token] for place, (last, token) in enumerate(pairs)]
        np.testing.assert_allclose(found.token_log_probs[sentence, draw], each + [0] * (L - length), atol=1e-5)
        np.testing.assert_allclose(found.log_probs[sentence, draw], sum(each), atol=1e-5)
        np.testing.assert_allclose(found.scores[sentence, draw], sum(each) / length, atol=1e-5)


def test_equal_keys_draw_equal_samples_and_different_keys_do_not():
    settings = Sampling(num_return=20)
    first, again, other = (sample(LOGITS, keys(seed), settings).tokens for seed in (4, 4, 5))
    assert np.array_equal(first, again)
    assert (first != other).any(axis=(1, 2)).all()


def test_samples_differ_and_do_not_depend_on_other_sentences_or_room():
    settings, rngs = Sampling(num_return=20), keys(6)
    together = sample(LOGITS, rngs, settings).tokens
    alone = sample(LOGITS[2:], rngs[2:], settings, max_length=7).tokens
    assert np.array_equal(alone[0, :, :L], together[2]) and not alone[..., L:].any()
    for sentence in together:
        assert len({tuple(tokens) for tokens in sentence.tolist()}) > 3


def test_sampling_without_keys_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match="give rngs, one for each sentence"):
        sample(LOGITS, None, Sampling())
