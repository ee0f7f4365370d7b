"""Takes a function that gives the next token's logits and leaves the best token sequences: greedy and beam search.

It knows no Transformer: `step_fn(state, tokens) -> (state, logits)` is all it asks for, and the state may be any
pytree. The whole search is one `while_loop`, so nothing leaves the device until the end.
Glossary: B sentences, N hypotheses of each (the beam), L longest output in tokens, V vocabulary, R returned of each.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

StepFn = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


class Hypotheses(flax.struct.PyTreeNode):
    """Finished outputs, the best first.

    Attributes:
        tokens: ids without the start token, up to and with the end of sentence, then padding.
        lengths: number of tokens, the end of sentence included.
        log_probs: the sum of the tokens' log-probabilities, in nats.
        scores: that sum divided by the length penalty.
    """

    tokens: Int[Array, "B R L"]
    lengths: Int[Array, "B R"]
    log_probs: Float[Array, "B R"]
    scores: Float[Array, "B R"]


def length_penalty(length: Int[Array, "..."], alpha: float) -> Float[Array, "..."]:
    """((5 + length) / 6) ** alpha, by which a log-probability is divided (Wu et al. 2016, equation 14; section 6.1)."""
    return ((5 + length) / 6) ** alpha


def _end_at_limit(
    log_probs: Float[Array, "*B V"], step: Int[Array, ""], limits: Int[Array, "*#B"], eos_id: int
) -> Float[Array, "*B V"]:
    """Leaves only the end of sentence where the next token is the last one allowed."""
    must_end = (step + 1 >= limits)[..., None] & (jnp.arange(log_probs.shape[-1]) != eos_id)
    return jnp.where(must_end, -jnp.inf, log_probs)


def greedy_search(
    step_fn: StepFn,
    state: PyTree,
    limits: Int[Array, "B"],
    *,
    max_length: int,
    start_id: int,
    eos_id: int,
    pad_id: int,
    alpha: float = 0.0,
) -> Hypotheses:
    """Takes the most probable token at each step.

    Args:
        step_fn: from the state and the last tokens [B] to the next state and logits [B, V].
        state: before the first step.
        limits: each sentence's longest output in tokens, the end of sentence included; at the limit it is forced.
        max_length: the largest limit, L.
        start_id: the token before the first.
        eos_id: the token that ends a sentence.
        pad_id: what stands after it.
        alpha: exponent of the length penalty in the scores; the choice does not depend on it.

    Returns:
        One hypothesis for each sentence.
    """
    batch = limits.shape[0]

    def unfinished(carry):
        step, _, _, _, lengths, _ = carry
        return (step < max_length) & jnp.any(lengths == 0)

    def extend(carry):
        step, state, last, tokens, lengths, total = carry
        state, logits = step_fn(state, last)
        log_probs = _end_at_limit(jax.nn.log_softmax(logits), step, limits, eos_id)
        live = lengths == 0
        best = jnp.where(live, jnp.argmax(log_probs, axis=-1).astype(jnp.int32), pad_id)
        total += jnp.where(live, jnp.max(log_probs, axis=-1), 0.0)
        tokens = tokens.at[:, step].set(best)
        return step + 1, state, best, tokens, jnp.where(live & (best == eos_id), step + 1, lengths), total

    _, _, _, tokens, lengths, total = jax.lax.while_loop(
        unfinished,
        extend,
        (
            jnp.zeros((), jnp.int32),
            state,
            jnp.full((batch,), start_id, jnp.int32),
            jnp.full((batch, max_length), pad_id, jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch,), jnp.float32),
        ),
    )
    scores = total / length_penalty(lengths, alpha)
    return Hypotheses(tokens[:, None], lengths[:, None], total[:, None], scores[:, None])


class _Beam(flax.struct.PyTreeNode):
    """Live hypotheses go on; finished ones are kept as long as they are among the best."""

    step: Int[Array, ""]
    state: PyTree
    live_tokens: Int[Array, "B N L"]
    live_log_probs: Float[Array, "B N"]
    finished: Hypotheses


def beam_search(
    step_fn: StepFn,
    state: PyTree,
    limits: Int[Array, "B"],
    *,
    beam_size: int,
    max_length: int,
    start_id: int,
    eos_id: int,
    pad_id: int,
    alpha: float = 0.6,
    num_return: int = 1,
) -> Hypotheses:
    """Keeps the `beam_size` most probable beginnings of each sentence (section 6.1: beam 4, alpha 0.6).

    It stops when no live hypothesis can still enter the ones returned: log-probabilities only fall, so a live one is
    bounded by its log-probability so far under the kindest penalty it can still get. A beam of one has nothing to
    compare and is greedy search.

    Args:
        step_fn: from the state and the last tokens [B * N] to the next state and logits [B * N, V].
        state: before the first step. Each leaf has a leading axis of B * N, a sentence's hypotheses together; a
            scalar belongs to all of them.
        limits: each sentence's longest output in tokens, the end of sentence included; at the limit it is forced.
        beam_size: hypotheses kept for each sentence, N.
        max_length: the largest limit, L.
        start_id: the token before the first.
        eos_id: the token that ends a sentence.
        pad_id: what stands after it.
        alpha: exponent of `length_penalty`.
        num_return: hypotheses returned for each sentence, at most N.

    Returns:
        The best hypotheses by score; where fewer than asked for exist, the rest have score -inf.

    Raises:
        ValueError: `num_return` is less than 1 or more than `beam_size`.
    """
    if not 1 <= num_return <= beam_size:
        raise ValueError(f"num_return is {num_return}, beam_size is {beam_size}: 1 <= num_return <= beam_size")
    if beam_size == 1:
        return greedy_search(
            step_fn,
            state,
            limits,
            max_length=max_length,
            start_id=start_id,
            eos_id=eos_id,
            pad_id=pad_id,
            alpha=alpha,
        )
    batch = limits.shape[0]

    def can_win(beam: _Beam) -> Bool[Array, ""]:
        penalties = jnp.stack([length_penalty(limits, alpha), length_penalty(beam.step + 1, alpha) + 0.0 * limits])
        bound = jnp.max(beam.live_log_probs, axis=1) / jnp.max(penalties, axis=0)
        worst_returned = jax.lax.top_k(beam.finished.scores, num_return)[0][:, -1]
        return jnp.any((bound > worst_returned) & (bound > -jnp.inf))

    def extend(beam: _Beam) -> _Beam:
        last = jnp.where(beam.step == 0, start_id, beam.live_tokens[:, :, jnp.maximum(beam.step - 1, 0)])
        state, logits = step_fn(beam.state, last.reshape(-1))
        log_probs = jax.nn.log_softmax(logits).reshape(batch, beam_size, -1)
        log_probs = _end_at_limit(log_probs, beam.step, limits[:, None], eos_id)
        totals = beam.live_log_probs[:, :, None] + log_probs

        ended_totals = totals[:, :, eos_id]
        finished = _best_finished(
            beam.finished,
            Hypotheses(
                tokens=beam.live_tokens.at[:, :, beam.step].set(eos_id),
                lengths=jnp.full((batch, beam_size), beam.step + 1),
                log_probs=ended_totals,
                scores=ended_totals / length_penalty(beam.step + 1, alpha),
            ),
            beam_size,
        )

        going_on = totals.at[:, :, eos_id].set(-jnp.inf).reshape(batch, -1)
        live_log_probs, chosen = jax.lax.top_k(going_on, beam_size)
        parents, tokens = jnp.divmod(chosen, log_probs.shape[-1])
        live_tokens = jnp.take_along_axis(beam.live_tokens, parents[:, :, None], axis=1)
        return _Beam(
            step=beam.step + 1,
            state=_follow_parents(state, parents),
            live_tokens=live_tokens.at[:, :, beam.step].set(tokens),
            live_log_probs=live_log_probs,
            finished=finished,
        )

    shape = (batch, beam_size)
    padding = jnp.full((*shape, max_length), pad_id, jnp.int32)
    nothing = jnp.full(shape, -jnp.inf, jnp.float32)
    beam = _Beam(
        step=jnp.zeros((), jnp.int32),
        state=state,
        live_tokens=padding,
        # All hypotheses begin alike: only the first counts, or the beam would hold N copies of it.
        live_log_probs=nothing.at[:, 0].set(0.0),
        finished=Hypotheses(padding, jnp.zeros(shape, jnp.int32), nothing, nothing),
    )
    beam = jax.lax.while_loop(lambda beam: (beam.step < max_length) & can_win(beam), extend, beam)
    return _best_finished(beam.finished, None, num_return)


def _best_finished(finished: Hypotheses, new: Hypotheses | None, keep: int) -> Hypotheses:
    both = finished if new is None else jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), finished, new)
    _, best = jax.lax.top_k(both.scores, keep)
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, index: row[index])(leaf, best), both)


def _follow_parents(state: PyTree, parents: Int[Array, "B N"]) -> PyTree:
    rows = (jnp.arange(parents.shape[0])[:, None] * parents.shape[1] + parents).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, state)
