"""Takes a function that gives the next token's logits and leaves token sequences: beam search, greedy search, sampling.

It knows no Transformer: `step_fn(state, tokens) -> (state, logits)` is all it asks for, and the state may be any
pytree. The whole search is one `while_loop`, so nothing leaves the device until the end.
Glossary: B sentences, N hypotheses of each, C candidates, L longest output in tokens, P longest prefix, V vocabulary,
R returned of each sentence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from flax_transformer.decoding.next_token import allowed_tokens, best_tokens, draw_tokens
from flax_transformer.decoding.settings import BeamSearch, Sampling

FEW = 16  # A sixteenth of a batch is few.


class Hypotheses(flax.struct.PyTreeNode):
    """Finished outputs: the best first, or samples in the order they were drawn.

    Attributes:
        tokens: ids without the start token, up to and with the end of sentence, then padding.
        lengths: number of tokens, the end of sentence included.
        token_log_probs: the log-probability of each token, in nats, 0 for padding. It is the model's own: what
            constraints or a temperature took from other tokens is not given to it.
        log_probs: their sum.
        scores: that sum divided by the length penalty.
    """

    tokens: Int[Array, "B R L"]
    lengths: Int[Array, "B R"]
    token_log_probs: Float[Array, "B R L"]
    log_probs: Float[Array, "B R"]
    scores: Float[Array, "B R"]


class Progress(flax.struct.PyTreeNode):
    """What travels through the loop.

    Attributes:
        step: number of tokens chosen for each live hypothesis.
        state: that of `step_fn`.
        live: hypotheses that go on. Greedy and sampled ones stay here when they have ended.
        ended: those of a beam that have ended, the best first; empty places have score -inf.
    """

    step: Int[Array, ""]
    state: PyTree
    live: Hypotheses
    ended: Hypotheses


def follow_rows(state: PyTree, parents: Int[Array, "B N"]) -> PyTree:
    """Gives each hypothesis its parent's row of every leaf [B * N, ...]; a scalar belongs to all of them."""
    rows = (jnp.arange(parents.shape[0])[:, None] * parents.shape[1] + parents).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """One search: `search.result(search.run(state))` is what it finds, in one `while_loop`.

    `start` and `extend` are its steps, for those who want to see each.

    Attributes:
        step_fn: from the state and the last tokens [B * N] to the next state and logits [B * N, V].
        limits: each sentence's longest output in tokens, the end of sentence included; at the limit it is forced.
        settings: what is searched, and how; N is `settings.hypotheses`.
        max_length: the room for an output, L: the largest limit, or less where `open` is heeded.
        start_id: the token before the first.
        eos_id: the token that ends a sentence.
        pad_id: what stands after it.
        prefix: tokens that each output begins with, padded; they count in lengths and scores.
        rngs: one random key for each sentence, [B]; sampling needs them.
        may_wait: which sentences may be left open as soon as few of the batch are, so that they do not keep all others
            waiting; none if not given. `open` tells which were left.
        follow: from the state and for each hypothesis the parent [B, N] that it goes on from, to the state in which
            it does.
    """

    step_fn: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    limits: Int[Array, "B"]
    settings: BeamSearch | Sampling
    max_length: int
    start_id: int
    eos_id: int
    pad_id: int
    prefix: Int[Array, "B P"] | None = None
    rngs: Key[Array, "B"] | None = None
    may_wait: Bool[Array, "B"] | None = None
    follow: Callable[[Any, jax.Array], Any] = follow_rows

    def __post_init__(self):
        """Raises ValueError where sampling has no random keys."""
        if isinstance(self.settings, Sampling) and self.rngs is None:
            raise ValueError("sampling draws with random keys: give rngs, one for each sentence")

    @property
    def _beam(self) -> BeamSearch | None:
        """The settings of hypotheses that compete; a beam of one has nothing to compare and is greedy search."""
        return self.settings if isinstance(self.settings, BeamSearch) and self.settings.beam_size > 1 else None

    def run(self, state: PyTree) -> Progress:
        """Searches until no next step can change the result, there is no more room, or all that are open may wait.

        Args:
            state: before the first step, of N hypotheses for each sentence, one after the other.
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
        # The hypotheses of a beam begin alike: only the first counts, or the beam would hold N copies of it.
        beginnings = shape[1] if self._beam is None else 1
        live = nothing.replace(log_probs=nothing.log_probs.at[:, :beginnings].set(0.0))
        return Progress(step=jnp.zeros((), jnp.int32), state=state, live=live, ended=nothing)

    def unfinished(self, progress: Progress) -> Bool[Array, ""]:
        """Whether a next step is worth it."""
        is_open = self.open(progress)
        if self.may_wait is not None:
            is_open &= ~self.may_wait | (jnp.sum(is_open) > len(is_open) // FEW)
        return (progress.step < self.max_length) & jnp.any(is_open)

    def extend(self, progress: Progress) -> Progress:
        """The progress after one more token of each live hypothesis."""
        return self._extend_each(progress) if self._beam is None else self._extend_beam(progress, self._beam)

    def result(self, progress: Progress) -> Hypotheses:
        """What has been found: `settings.num_return` of each sentence; where there are fewer, the rest score -inf."""
        if self._beam is not None:
            return jax.tree.map(lambda leaf: leaf[:, : self.settings.num_return], progress.ended)
        live = progress.live
        return live.replace(scores=live.log_probs / self.settings.penalty(live.lengths))

    def open(self, progress: Progress) -> Bool[Array, "B"]:
        """Which sentences a next step can change; after `run` those that waited or need more room."""
        if self._beam is None:
            return jnp.any(progress.live.lengths == 0, axis=1)
        best = jnp.max(progress.live.log_probs, axis=1)
        if self._beam.stopping == "first":
            return (best > -jnp.inf) & (progress.ended.scores[:, -1] == -jnp.inf)
        # Log-probabilities only fall, so a live hypothesis is bounded by its own under the kindest penalty to come.
        now, at_limit = self.settings.penalty(progress.step + 1), self.settings.penalty(self.limits)
        bound = best / jnp.maximum(now, at_limit)
        return (best > -jnp.inf) & (bound > progress.ended.scores[:, self.settings.num_return - 1])

    def _next(self, progress: Progress) -> tuple[PyTree, Float[Array, "B N V"], Float[Array, "B N"]]:
        """The next state; logits, -inf for tokens that may not come; and what turns them into log-probabilities."""
        tokens = progress.live.tokens
        last = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(progress.step - 1, 0), axis=2, keepdims=False)
        last = jnp.where(progress.step == 0, self.start_id, last)
        state, logits = self.step_fn(progress.state, last.reshape(-1))
        logits = logits.reshape(*last.shape, -1).astype(jnp.float32)
        allowed = allowed_tokens(
            tokens,
            progress.step,
            self.limits,
            self.prefix,
            self.settings,
            vocab_size=logits.shape[-1],
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )
        return state, jnp.where(allowed, logits, -jnp.inf), -jax.nn.logsumexp(logits, axis=-1)

    def _extend_each(self, progress: Progress) -> Progress:
        """Every hypothesis goes on by itself: greedy search and sampling."""
        step, live = progress.step, progress.live
        state, logits, normalizer = self._next(progress)
        if isinstance(self.settings, Sampling):
            assert self.rngs is not None
            chosen = draw_tokens(logits, self.rngs, step, self.settings)
            best = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
        else:
            best, chosen = (leaf[..., 0] for leaf in best_tokens(logits[:, :, None], 1))
        going = live.lengths == 0
        log_probs = jnp.where(going, best + normalizer, 0.0)
        live = live.replace(
            tokens=live.tokens.at[:, :, step].set(jnp.where(going, chosen, self.pad_id)),
            lengths=jnp.where(going & (chosen == self.eos_id), step + 1, live.lengths),
            token_log_probs=live.token_log_probs.at[:, :, step].set(log_probs),
            log_probs=live.log_probs + log_probs,
        )
        return progress.replace(step=step + 1, state=state, live=live)

    def _extend_beam(self, progress: Progress, settings: BeamSearch) -> Progress:
        """The best continuations go on, whichever hypothesis they continue."""
        size, live = settings.beam_size, progress.live
        state, logits, normalizer = self._next(progress)
        totals = logits + (live.log_probs + normalizer)[..., None]
        vocab_size = totals.shape[-1]
        if settings.stopping == "first":
            candidates, where = best_tokens(totals, 2 * size)
            is_end = where % vocab_size == self.eos_id
            # An end that is not among the best is lost, and a sentence that has its hypotheses takes no more.
            counts = is_end & (jnp.arange(2 * size) < size) & self.open(progress)[:, None]
            ends, ending = jnp.where(counts, candidates, -jnp.inf), where // vocab_size
            going_on, index = jax.lax.top_k(jnp.where(is_end, -jnp.inf, candidates), size)
            where = jnp.take_along_axis(where, index, axis=1)
        else:
            ends, ending = totals[:, :, self.eos_id], jnp.broadcast_to(jnp.arange(size), (len(totals), size))
            going_on, where = best_tokens(jnp.where(jnp.arange(vocab_size) == self.eos_id, -jnp.inf, totals), size)
        parents, chosen = jnp.divmod(where, vocab_size)
        return Progress(
            step=progress.step + 1,
            state=self.follow(state, parents),
            live=self._append(progress, parents, chosen, going_on),
            ended=_best(progress.ended, self._append(progress, ending, jnp.full_like(ending, self.eos_id), ends)),
        )

    def _append(
        self, progress: Progress, parents: Int[Array, "B C"], tokens: Int[Array, "B C"], log_probs: Float[Array, "B C"]
    ) -> Hypotheses:
        """Live hypotheses with one more token each, and so with these log-probabilities."""
        step = progress.step
        before = _take(progress.live, parents)
        # Of what is impossible nothing will be read; infinite differences would be NaN.
        last = jnp.where(log_probs > -jnp.inf, log_probs - before.log_probs, -jnp.inf)
        return Hypotheses(
            tokens=before.tokens.at[:, :, step].set(tokens),
            lengths=jnp.full_like(parents, step + 1),
            token_log_probs=before.token_log_probs.at[:, :, step].set(last),
            log_probs=log_probs,
            scores=log_probs / self.settings.penalty(step + 1),
        )


def _best(ended: Hypotheses, new: Hypotheses) -> Hypotheses:
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), ended, new)
    return _take(both, jax.lax.top_k(both.scores, ended.scores.shape[1])[1])


def _take(hypotheses: Hypotheses, index: Int[Array, "B C"]) -> Hypotheses:
    return jax.tree.map(lambda leaf: jax.vmap(lambda rows, chosen: rows[chosen])(leaf, index), hypotheses)
