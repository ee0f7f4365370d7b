"""Decides which tokens a search may choose next, and chooses the best ones or draws one at random.

Glossary: B sentences, N hypotheses of each, L longest output in tokens, P longest prefix, V vocabulary (or the
tokens listed for a sentence, if its search chooses among these).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flax_transformer.decoding.settings import Sampling, SearchSettings

GROUP = 64  # maximum number of tokens in one group of `best_tokens`


def allowed_tokens(
    tokens: Int[Array, "B N L"],
    step: Int[Array, "B"],
    limits: Int[Array, "B"],
    prefix: Int[Array, "B P"] | None,
    settings: SearchSettings,
    *,
    vocab_size: int,
    eos_id: int,
    pad_id: int,
    listed: Int[Array, "B V"] | None = None,
) -> Bool[Array, "B #N V"]:
    """Which tokens may come next; the length limit overrides the prefix, and the prefix overrides the settings.

    Args:
        tokens: the tokens of each hypothesis so far.
        step: their number, for each sentence.
        limits: the maximum length of each sentence's output, in tokens; the last one can only be the end of sentence.
        prefix: the tokens with which each output must begin, padded; `None` for no prefixes.
        settings: banned tokens and sequences, and the minimum length.
        vocab_size: the number of token ids, V.
        eos_id: the token that ends a sentence.
        pad_id: the token that pads shorter prefixes.
        listed: the token ids that are meant, for each sentence, then -1; 0 to V - 1 if not given.
    """
    ids = jnp.arange(vocab_size)[None, None] if listed is None else listed[:, None]
    is_end = ids == eos_id
    allowed = jnp.ones((1, 1, vocab_size), bool) if listed is None else (listed >= 0)[:, None]
    if settings.banned:
        allowed &= ~jnp.isin(ids, jnp.array(settings.banned))
    if settings.no_repeat_ngram:
        allowed &= ~_repeating(tokens, step, settings.no_repeat_ngram, vocab_size, listed)
    if settings.min_length > 1:
        allowed &= ~(is_end & (step + 1 < settings.min_length)[:, None, None])
    if settings.banned or settings.no_repeat_ngram or settings.min_length > 1:
        # If no token is left, the sentence ends.
        allowed |= is_end & ~jnp.any(allowed, axis=-1, keepdims=True)
    if prefix is not None:
        wished = jnp.take_along_axis(prefix, step[:, None], axis=1, mode="fill", fill_value=pad_id)[..., None]
        allowed = jnp.where(wished == pad_id, allowed, ids == wished)
    return jnp.where((step + 1 >= limits)[:, None, None], is_end, allowed)


def _repeating(
    tokens: Int[Array, "B N L"], step: Int[Array, "B"], size: int, vocab_size: int, listed: Int[Array, "B V"] | None
) -> Bool[Array, "B N V"]:
    """The tokens that would complete a sequence of `size` tokens that occurred before."""
    batch, hypotheses, length = tokens.shape
    # The token at position i would repeat if the `size` - 1 tokens before it equal the last ones.
    step = step[:, None, None]
    repeats = (jnp.arange(length) >= size - 1) & (jnp.arange(length) < step)
    for back in range(1, size):
        last = jnp.take_along_axis(tokens, jnp.maximum(step - back, 0), axis=2, mode="clip")
        repeats &= jnp.roll(tokens, back, axis=2) == last
    if listed is not None:
        return jnp.any((tokens[..., None] == listed[:, None, None]) & repeats[..., None], axis=2)
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(hypotheses)[None, :, None]
    return jnp.zeros((batch, hypotheses, vocab_size), bool).at[rows, columns, tokens].max(repeats)


def best_tokens(scores: Float[Array, "*B N V"], count: int) -> tuple[Float[Array, "*B C"], Int[Array, "*B C"]]:
    """The `count` highest of a sentence's N * V scores, and their indices in that row of N * V.

    They must be in the `count` groups of tokens with the highest maxima, and finding a maximum is much cheaper than
    sorting.
    """
    *batch, hypotheses, vocab_size = scores.shape
    # Padding would copy all scores, so find a group size that divides the vocabulary; most have one.
    size = next((size for size in range(GROUP, GROUP // 2, -1) if vocab_size % size == 0), GROUP)
    if padding := -vocab_size % size:
        scores = jnp.pad(scores, [(0, 0)] * (len(batch) + 1) + [(0, padding)], constant_values=-jnp.inf)
    groups = scores.reshape(*batch, -1, size)
    per_row = groups.shape[-2] // hypotheses
    _, best = jax.lax.top_k(groups.max(axis=-1), min(count, groups.shape[-2]))
    candidates = jnp.take_along_axis(groups, best[..., None], axis=-2)
    values, index = jax.lax.top_k(candidates.reshape(*batch, -1), count)
    group = jnp.take_along_axis(best, index // size, axis=-1)
    column = jnp.minimum(group % per_row * size + index % size, vocab_size - 1)  # may be padding if all others are -inf
    return values, group // per_row * vocab_size + column


def draw_tokens(
    logits: Float[Array, "B N V"], rngs: Key[Array, "B"], step: Int[Array, "B"], settings: Sampling
) -> Int[Array, "B N"]:
    """Draws one token for each hypothesis from the softmax of its logits.

    Args:
        logits: the logits of each token, -inf for tokens that may not come.
        rngs: one key for each sentence, so that the other sentences of the batch do not change what is drawn.
        step: the number of tokens drawn so far, for each sentence.
        settings: the temperature, and how many of the most probable tokens can be drawn.
    """
    logits = logits / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        least = best_tokens(logits[:, :, None], settings.top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if settings.top_p < 1:
        falling = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(falling)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < settings.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    draw = jax.vmap(lambda rng, step, rows: jax.random.categorical(jax.random.fold_in(rng, step), rows))
    return draw(rngs, step, logits).astype(jnp.int32)
