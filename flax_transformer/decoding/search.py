"""Beam search, greedy search and sampling, over any function that computes the logits of the next token.

The search does not depend on the model: it only needs `step_fn(state, tokens) -> (state, logits)`, with any pytree as
state. `Search.run` is a single `while_loop`, so nothing leaves the device until the end. Each sentence counts its own
steps: a program that puts a new sentence in the place of a finished one calls `start`, `extend` and `open` itself, as
`slots.py` does.
Glossary: B sentences, N hypotheses of each, C candidates, L longest output in tokens, P longest prefix, V vocabulary
(or the tokens listed for a sentence, if its search chooses among these), R outputs returned for each sentence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from flax_transformer.decoding.next_token import allowed_tokens, best_tokens, draw_tokens
from flax_transformer.decoding.settings import BeamSearch, Sampling, check_sampling

# The log-probability of the end of a sentence whose logits are not finite, as when its activations overflow float16.
BROKEN = -1e9


class Hypotheses(flax.struct.PyTreeNode):
    """Finished outputs: the best first, or samples in the order they were drawn.

    Attributes:
        tokens: ids without the start token, up to and including the end of sentence, then padding.
        lengths: number of tokens, including the end of sentence.
        token_log_probs: the model's log-probability of each token, in nats, 0 for padding. Neither the temperature nor
            the probability of tokens that were not allowed changes it. Where the logits are not finite, the sentence
            ends with a token of log-probability `BROKEN`.
        log_probs: their sum.
        scores: that sum divided by the length penalty.
    """

    tokens: Int[Array, "B R L"]
    lengths: Int[Array, "B R"]
    token_log_probs: Float[Array, "B R L"]
    log_probs: Float[Array, "B R"]
    scores: Float[Array, "B R"]


class Progress(flax.struct.PyTreeNode):
    """The state of the loop.

    Attributes:
        step: number of tokens chosen for each live hypothesis of a sentence.
        state: the state of `step_fn`.
        live: hypotheses that have not ended; those of greedy search and sampling stay here when they end.
        ended: hypotheses of a beam that have ended, the best first; empty places have score -inf.
    """

    step: Int[Array, "B"]
    state: PyTree
    live: Hypotheses
    ended: Hypotheses


def follow_rows(state: PyTree, parents: Int[Array, "B N"]) -> PyTree:
    """Gives each hypothesis its parent's row in every leaf [B * N, ...]; scalars are shared by all."""
    rows = (jnp.arange(parents.shape[0])[:, None] * parents.shape[1] + parents).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search; `search.result(search.run(state))` runs it in one `while_loop` and returns the outputs.

    `start` and `extend` run it step by step.

    Attributes:
        step_fn: takes the state and the last tokens [B * N], and returns the next state and logits [B * N, V].
        limits: the maximum length of each sentence's output, in tokens including the end of sentence, which is forced
            there.
        settings: the settings of the search; N is `settings.hypotheses`. Its `max_length` limits all sentences too; its
            `extra_length` does not matter, since a search does not know how long the sources are.
        max_length: the number of tokens for which there is room, L: the largest limit, or less if the caller searches
            the sentences that `open` reports again.
        start_id: the token before the first; it is not chosen later unless it is `eos_id` too.
        eos_id: the token that ends a sentence.
        pad_id: the token that follows the end of sentence.
        prefix: tokens with which each output must begin, padded; they count in lengths and, but for `given`, in scores.
        given: how many of the prefix's first tokens have probability 1 whatever the model says, such as the token of
            the target's language; 0 if not given.
        listed: the token ids to which the logits of each sentence belong, the end of sentence among them, then -1,
            whose logits are -inf; 0 to V - 1 if not given.
        rngs: one random key for each sentence, which only sampling needs.
        num_return: how many outputs of each sentence must be certain before its search stops, at most
            `settings.beam_size`; `settings.num_return` if not given. Sampling and greedy search ignore it.
        follow: takes the state and the parent [B, N] of each hypothesis, and returns the state in which each hypothesis
            continues its parent.
    """

    step_fn: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    limits: Int[Array, "B"]
    settings: BeamSearch | Sampling
    max_length: int
    start_id: int
    eos_id: int
    pad_id: int
    prefix: Int[Array, "B P"] | None = None
    given: Int[Array, "B"] | None = None
    listed: Int[Array, "B V"] | None = None
    rngs: Key[Array, "B"] | None = None
    num_return: Int[Array, "B"] | None = None
    follow: Callable[[Any, jax.Array], Any] = follow_rows

    def __post_init__(self):
        """Raises ValueError if sampling has no random keys, or if samples are to be compared as texts."""
        if isinstance(self.settings, Sampling):
            check_sampling(self.settings, self.rngs)

    @property
    def _beam(self) -> BeamSearch | None:
        """The settings of a beam of two or more; `None` for sampling, and for a beam of one, which is greedy search."""
        return self.settings if isinstance(self.settings, BeamSearch) and self.settings.beam_size > 1 else None

    def run(self, state: PyTree) -> Progress:
        """Searches until no further step can change the result, or the room is full.

        Args:
            state: the state before the first step, with the N hypotheses of each sentence one after the other.
        """
        return jax.lax.while_loop(self.unfinished, self.extend, self.start(state))

    def start(self, state: PyTree) -> Progress:
        """The progress before the first step."""
        shape = (self.limits.shape[0], self.settings.hypotheses)
        nothing = Hypotheses(
            tokens=jnp.full((*shape, self.max_length), self.pad_id, jnp.int32),
            lengths=jnp.zeros(shape, jnp.int32),
            token_log_probs=jnp.zeros((*shape, self.max_length), jnp.float32),
            log_probs=jnp.full(shape, -jnp.inf, jnp.float32),
            scores=jnp.full(shape, -jnp.inf, jnp.float32),
        )
        # All hypotheses of a beam start the same, so only the first one counts; otherwise the beam would hold N copies.
        beginnings = shape[1] if self._beam is None else 1
        live = nothing.replace(log_probs=nothing.log_probs.at[:, :beginnings].set(0.0))
        return Progress(step=jnp.zeros(shape[0], jnp.int32), state=state, live=live, ended=nothing)

    def unfinished(self, progress: Progress) -> Bool[Array, ""]:
        """Whether to make another step."""
        return jnp.any(self.open(progress) & (progress.step < self.max_length))

    def extend(self, progress: Progress) -> Progress:
        """The progress after one more token of each live hypothesis."""
        return self._extend_each(progress) if self._beam is None else self._extend_beam(progress, self._beam)

    def result(self, progress: Progress) -> Hypotheses:
        """The outputs, `settings.num_return` for each sentence; if fewer were found, the others have score -inf."""
        if self._beam is not None:
            return jax.tree.map(lambda leaf: leaf[:, : self.settings.num_return], progress.ended)
        live = progress.live
        return live.replace(scores=live.log_probs / self.settings.penalty(live.lengths))

    def open(self, progress: Progress) -> Bool[Array, "B"]:
        """Which sentences a further step can change; after `run` these are the ones that need more room."""
        if self._beam is None:
            return jnp.any(progress.live.lengths == 0, axis=1)
        best = jnp.max(progress.live.log_probs, axis=1)
        if self._beam.stopping == "first":
            return (best > -jnp.inf) & (progress.ended.scores[:, -1] == -jnp.inf)
        # Log-probabilities only fall, so a live hypothesis cannot score better than it would now under the most
        # favourable penalty that is still possible.
        now, at_limit = self.settings.penalty(progress.step + 1), self.settings.penalty(self._limits)
        bound = best / jnp.maximum(now, at_limit)
        last = jnp.broadcast_to(self.settings.num_return if self.num_return is None else self.num_return, bound.shape)
        worst = jnp.take_along_axis(progress.ended.scores, last[:, None] - 1, axis=1)[:, 0]
        return (best > -jnp.inf) & (bound > worst)

    @property
    def _limits(self) -> Int[Array, "B"]:
        """The maximum lengths, `settings.max_length` included."""
        return self.limits if self.settings.max_length is None else jnp.minimum(self.limits, self.settings.max_length)

    def _next(self, progress: Progress) -> tuple[PyTree, Float[Array, "B N V"], Float[Array, "B N"]]:
        """The next state; logits, -inf for tokens that may not come; and the term that makes them log-probabilities."""
        tokens = progress.live.tokens
        step = progress.step[:, None, None]
        last = jnp.take_along_axis(tokens, jnp.maximum(step - 1, 0), axis=2, mode="clip")
        last = jnp.where(step == 0, self.start_id, last)
        state, logits = self.step_fn(progress.state, last.reshape(-1))
        logits = logits.reshape(*tokens.shape[:2], -1).astype(jnp.float32)
        banned = self.settings.banned
        if self.start_id not in (self.eos_id, *banned):
            banned = (*banned, self.start_id)
        allowed = allowed_tokens(
            tokens,
            progress.step,
            self._limits,
            self.prefix,
            self.settings.replace(banned=banned),
            vocab_size=logits.shape[-1],
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            listed=self.listed,
        )
        if self.given is not None:  # the logits of a certain token
            is_given = (progress.step < self.given)[:, None, None]
            logits = jnp.where(is_given, jnp.where(allowed, 0.0, -jnp.inf), logits)
        normalizer = -jax.nn.logsumexp(logits, axis=-1)
        broken = ~jnp.isfinite(normalizer)  # no logit means anything, so the sentence ends here
        only_end = jnp.where(self._is_end(logits.shape[-1]), 0.0, -jnp.inf)
        logits = jnp.where(broken[..., None], only_end, jnp.where(allowed, logits, -jnp.inf))
        return state, logits, jnp.where(broken, BROKEN, normalizer)

    def _is_end(self, size: int) -> Bool[Array, "#B 1 V"]:
        """Which of the logits belongs to the end of sentence."""
        return (jnp.arange(size)[None, None] if self.listed is None else self.listed[:, None]) == self.eos_id

    def _ids(self, places: Int[Array, "B C"]) -> Int[Array, "B C"]:
        """The token ids at these places of the logits."""
        if self.listed is None:
            return places
        # If all logits are -inf, `top_k` may return a place of the padding (-1); any valid id will do.
        return jnp.maximum(jnp.take_along_axis(self.listed, places, axis=1), 0)

    def _extend_each(self, progress: Progress) -> Progress:
        """Extends every hypothesis independently, as greedy search and sampling do."""
        step, live = progress.step, progress.live
        state, logits, normalizer = self._next(progress)
        if isinstance(self.settings, Sampling):
            assert self.rngs is not None
            chosen = draw_tokens(logits, self.rngs, step, self.settings)
            best = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
        else:
            best, chosen = (leaf[..., 0] for leaf in best_tokens(logits[:, :, None], 1))
        chosen = self._ids(chosen)
        going = live.lengths == 0
        log_probs = jnp.where(going, best + normalizer, 0.0)
        live = live.replace(
            tokens=_set(live.tokens, step, jnp.where(going, chosen, self.pad_id)),
            lengths=jnp.where(going & (chosen == self.eos_id), step[:, None] + 1, live.lengths),
            token_log_probs=_set(live.token_log_probs, step, log_probs),
            log_probs=live.log_probs + log_probs,
        )
        return progress.replace(step=step + 1, state=state, live=live)

    def _extend_beam(self, progress: Progress, settings: BeamSearch) -> Progress:
        """Keeps the best continuations of all hypotheses together."""
        size, live = settings.beam_size, progress.live
        state, logits, normalizer = self._next(progress)
        totals = logits + (live.log_probs + normalizer)[..., None]
        vocab_size = totals.shape[-1]
        if settings.stopping == "first":
            candidates, where = best_tokens(totals, 2 * size)
            is_end = self._ids(where % vocab_size) == self.eos_id
            # A hypothesis that ends outside the `size` best is dropped, and a finished sentence accepts no more.
            counts = is_end & (jnp.arange(2 * size) < size) & self.open(progress)[:, None]
            ends, ending = jnp.where(counts, candidates, -jnp.inf), where // vocab_size
            going_on, index = jax.lax.top_k(jnp.where(is_end, -jnp.inf, candidates), size)
            where = jnp.take_along_axis(where, index, axis=1)
        else:
            is_end = self._is_end(vocab_size)
            if self.listed is None:
                ends = totals[:, :, self.eos_id]
            else:
                ends = jnp.max(jnp.where(is_end, totals, -jnp.inf), axis=-1)
            ending = jnp.broadcast_to(jnp.arange(size), ends.shape)
            going_on, where = best_tokens(jnp.where(is_end, -jnp.inf, totals), size)
        parents, chosen = where // vocab_size, self._ids(where % vocab_size)
        return Progress(
            step=progress.step + 1,
            state=self.follow(state, parents),
            live=self._append(progress, parents, chosen, going_on),
            ended=_best(
                progress.ended, self._append(progress, ending, jnp.full_like(ending, self.eos_id, jnp.int32), ends)
            ),
        )

    def _append(
        self, progress: Progress, parents: Int[Array, "B C"], tokens: Int[Array, "B C"], log_probs: Float[Array, "B C"]
    ) -> Hypotheses:
        """Appends a token to each parent; `log_probs` are those of the new hypotheses."""
        step = progress.step
        before = _take(progress.live, parents)
        # Impossible hypotheses get -inf, because the difference of two infinities would be NaN.
        last = jnp.where(log_probs > -jnp.inf, log_probs - before.log_probs, -jnp.inf)
        return Hypotheses(
            tokens=_set(before.tokens, step, tokens),
            lengths=jnp.broadcast_to(step[:, None] + 1, parents.shape),
            token_log_probs=_set(before.token_log_probs, step, last),
            log_probs=log_probs,
            scores=log_probs / self.settings.penalty(step + 1)[:, None],
        )


def _set(array: Shaped[Array, "B C L"], step: Int[Array, "B"], values: Shaped[Array, "B C"]) -> Shaped[Array, "B C L"]:
    """The array with each sentence's values at its own step; a step past the end changes nothing."""
    return jnp.where(jnp.arange(array.shape[2]) == step[:, None, None], values[..., None], array)


def _best(ended: Hypotheses, new: Hypotheses) -> Hypotheses:
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), ended, new)
    return _take(both, jax.lax.top_k(both.scores, ended.scores.shape[1])[1])


def _take(hypotheses: Hypotheses, index: Int[Array, "B C"]) -> Hypotheses:
    return jax.tree.map(lambda leaf: jax.vmap(lambda rows, chosen: rows[chosen])(leaf, index), hypotheses)
