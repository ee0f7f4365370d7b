"""Looks into a model while it reads a given translation: likely tokens at each place, and all attention weights.

Glossary: S source tokens, T target tokens, C candidates, H heads, Q queries, M what they attend to.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.batching import bucket, pad
from flax_transformer.decoding.ensemble import Ensemble, without_banned
from flax_transformer.decoding.requests import Ids
from flax_transformer.decoding.scoring import best_aligned
from flax_transformer.decoding.transposed import TransposedParams, opened
from flax_transformer.model import AttentionWeights
from flax_transformer.positions import check_length
from flax_transformer.stacks import wave_vectors

CANDIDATES = 10
SMALLEST_WIDTH = 32


class Seen(flax.struct.PyTreeNode):
    """What one parallel pass shows.

    Attributes:
        ids: the most probable tokens at each place, the most probable one first.
        log_probs: their log-probabilities.
        weights: the attention weights of all layers.
        alignment: how much each target token attends to each source token, see `best_aligned`.
    """

    ids: Int[Array, "1 T C"]
    log_probs: Float[Array, "1 T C"]
    weights: AttentionWeights
    alignment: Float[Array, "1 T S"]


@functools.partial(jax.jit, static_argnames=("config",))
def see(
    params: PyTree | TransposedParams,
    source: Int[Array, "1 S"],
    target: Int[Array, "1 T"],
    listed: Bool[Array, "V"],
    *,
    config: TransformerConfig,
) -> Seen:
    """What a model sees in a pair of sentences.

    Args:
        params: its parameters.
        source: padded token ids.
        target: padded token ids.
        listed: among which tokens the target is chosen.
        config: its config.
    """
    with opened(config, params) as (model, variables):
        logits, weights = model.apply(variables, source, target, deterministic=True, return_weights=True)
    log_probs = jax.nn.log_softmax(jnp.where(listed, without_banned(config, logits), -jnp.inf))
    best, ids = jax.lax.top_k(log_probs, min(CANDIDATES, config.target_vocab_size))
    words = (source != config.pad_id) & (source != config.eos_id)
    alignment = best_aligned(jnp.stack(weights.cross), words, target != config.pad_id)
    return Seen(ids, best, weights, alignment)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A source and a target under inspection.

    Attributes:
        source_size: number of source tokens, S.
        target_size: number of target tokens, T.
    """

    source_size: int
    target_size: int
    _seen: Seen

    def candidates(self) -> tuple[Int[np.ndarray, "T C"], Float[np.ndarray, "T C"]]:
        """The most probable tokens at each place of the target, given those before it, and their log-probabilities."""
        ids, log_probs = jax.device_get((self._seen.ids, self._seen.log_probs))
        return ids[0, : self.target_size], log_probs[0, : self.target_size]

    def layers(self, kind: str) -> int:
        """How many layers have weights of a kind: "encoder", "decoder" (none if it is recurrent) or "cross"."""
        return len(getattr(self._seen.weights, kind))

    def alignment(self) -> Float[np.ndarray, "T S"]:
        """How much each target token attends to each source token, in the layer that aligns best."""
        return np.asarray(self._seen.alignment)[0, : self.target_size, : self.source_size]

    def heads(self, kind: str, layer: int) -> Float[np.ndarray, "H Q M"]:
        """The weights of a layer's heads; row q belongs to source token q, or to the query that predicts token q."""
        rows = self.source_size if kind == "encoder" else self.target_size
        columns = self.target_size if kind == "decoder" else self.source_size
        # Copied as a whole: to cut it on the device would compile a program for each size.
        return np.asarray(getattr(self._seen.weights, kind)[layer])[0, :, :rows, :columns]


class Inspector:
    """Inspects pairs with the first model of an ensemble. Sentences of similar length share a program."""

    def __init__(self, ensemble: Ensemble):
        """Takes the ensemble."""
        self._ensemble, self._config, self._params = ensemble, ensemble.configs[0], ensemble.models[0]

    def inspect(self, source: Ids, target: Ids, listed: Ids | np.ndarray | None = None) -> Inspection:
        """Reads a pair of sentences; any thread may call it.

        Args:
            source: the ids of the source, with the end of sentence.
            target: the ids of the target, with the end of sentence.
            listed: the ids among which each token was chosen, as with a shortlist; all if not given.

        Raises:
            ValueError: one of them has more tokens than there are learned positions.
        """
        width = self._width(max(len(source), len(target)))
        pair = (self._padded(ids, width) for ids in (source, target))
        chosen = np.full(self._config.target_vocab_size, listed is None)
        if listed is not None:
            chosen[np.asarray(listed)] = True
        return Inspection(len(source), len(target), see(self._params, *pair, chosen, config=self._config))

    def align(self, sources: Sequence[Ids], targets: Sequence[Ids]) -> list[np.ndarray]:
        """The alignment [T, S] of each pair, one after the other."""
        return [self.inspect(*pair).alignment() for pair in zip(sources, targets, strict=True)]

    def position_vectors(self, count: int) -> Float[np.ndarray, "P D"]:
        """The vectors that are added to the embeddings at the first positions, as many as there are up to `count`."""
        config = self._config
        if config.positions == "learned":
            params = self._params.params if isinstance(self._params, TransposedParams) else self._params
            return np.asarray(params["encoder"]["learned_positions"]["embedding"][:count], np.float32)
        return np.asarray(wave_vectors(config, jnp.arange(count)), np.float32)

    def compile(self, longest: int) -> None:
        """Compiles what pairs of up to `longest` tokens need."""
        width = 0
        while width < min(longest, self._ensemble.learned or longest):
            width = self._width(width + 1)
            ids = [self._config.eos_id] * width
            jax.block_until_ready(self.inspect(ids, ids)._seen.ids)

    def _width(self, length: int) -> int:
        return bucket(length, smallest=SMALLEST_WIDTH, most=self._ensemble.learned)

    def _padded(self, ids: Sequence[int], width: int) -> Int[np.ndarray, "1 S"]:
        check_length(len(ids), width)
        return pad([ids], 1, width, self._ensemble.pad_id)
