"""Takes lengths, validity or segment numbers and leaves additive masks for `attention.dot_product_attention`.

A mask is exactly 0 where a query may see a key and -inf where it may not; it is added to the logits before the softmax
(section 3.2.3). Masks of other conventions are errors: booleans and integers because of their type, other numbers, such
as the 1 and 0 of `flax.linen.make_causal_mask`, because of their values.

Glossary: B batch, H heads, Q query positions, M memory positions, N hypotheses of a sentence, L places of a cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.tokens import is_known


def _additive(allowed: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)


def causal_mask(length: int) -> Float[Array, "1 1 Q M"]:
    """Lets each of `length` positions see itself and the positions before it (section 3.1)."""
    positions = jnp.arange(length)
    return _additive(positions <= positions[:, None])[None, None]


def ancestor_mask(
    ancestors: Int[Array, "B N L"], length: int, position: Int[Array, "B"], place: Int[Array, ""]
) -> Float[Array, "B 1 Q M"]:
    """Lets each hypothesis of a sentence see its own past in the cache that all of them share.

    The L places of the cache are a ring: all sentences write to the same place, one place further at each step, and
    a sentence may see as many of the last places as it has tokens. Queries and cache are ordered by place, then by
    hypothesis: Q = `length` * N, M = L * N.

    Args:
        ancestors: for each hypothesis and place, which of the N hypotheses wrote its entry in the cache.
        length: number of places of the queries.
        position: the position of each sentence's first query, counted from the sentence's own beginning.
        place: the place of the first query in the ring.
    """
    batch, hypotheses, room = ancestors.shape
    own = ancestors[..., None] == jnp.arange(hypotheses)
    ahead = jnp.arange(length)[:, None]
    age = (place + ahead - jnp.arange(room)) % room  # how many steps before the query an entry was written
    seen = age <= position[:, None, None] + ahead
    visible = seen[:, :, None, :, None] & own[:, None]
    return _additive(visible.reshape(batch, length * hypotheses, room * hypotheses))[:, None]


def padding_mask(valid: Bool[Array, "B M"]) -> Float[Array, "B 1 1 M"]:
    """Hides padding from every query.

    Args:
        valid: true where a memory position holds a token, false where it is padding.

    Raises:
        ValueError: `valid` is not boolean or does not have two dimensions.
    """
    if valid.dtype != bool or valid.ndim != 2:
        raise ValueError(
            f"valid is {valid.dtype} of shape {valid.shape}: give booleans [B, M], true where there is a token, e.g. "
            "tokens != pad_id, or jnp.arange(M) < lengths[:, None]"
        )
    return _additive(valid)[:, None, None, :]


def segment_mask(query_segments: Int[Array, "B Q"], memory_segments: Int[Array, "B M"]) -> Float[Array, "B 1 Q M"]:
    """Lets each query see the positions of its own segment, so that several sentences can share a row.

    Segment 0 is padding, which sees nothing and which nothing sees.

    Args:
        query_segments: the number of each query's sentence within its row.
        memory_segments: the same for each memory position.

    Raises:
        ValueError: the segments are not integers or do not have two dimensions.
    """
    for name, segments in (("query_segments", query_segments), ("memory_segments", memory_segments)):
        if not jnp.issubdtype(segments.dtype, jnp.integer) or segments.ndim != 2:
            raise ValueError(
                f"{name} are {segments.dtype} of shape {segments.shape}: give one integer for each position, 0 for "
                "padding and 1, 2, ... for sentences, e.g. (tokens != pad_id).astype(jnp.int32)"
            )
    queries, memory = query_segments[:, :, None], memory_segments[:, None, :]
    return _additive((queries == memory) & (queries > 0))[:, None]


def combine_masks(*masks: Float[Array, "#B #H #Q #M"] | None) -> Float[Array, "B H Q M"] | None:
    """Adds masks, so that a query sees a key only where all of them allow it; `None` hides nothing.

    Raises:
        ValueError: as in `check_mask`.
    """
    present = [mask for mask in masks if mask is not None]
    for mask in present:
        check_mask(mask)
    return jax.tree.reduce(jnp.add, present) if present else None


def check_mask(mask: Any) -> None:
    """Raises ValueError unless a mask is additive: floats that are 0 or -inf, in four dimensions.

    Inside `jit` the values are not known and cannot be checked; there `dot_product_attention` gives NaN.
    """
    if mask.ndim != 4:
        raise ValueError(f"mask has shape {mask.shape}: give it four dimensions that broadcast to [B, H, Q, M]")
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        kind = "boolean" if mask.dtype == bool else mask.dtype
        raise ValueError(f"mask is {kind}: give 0 and -inf, e.g. jnp.where(allowed, 0.0, -jnp.inf)")
    if is_known(mask):
        values = np.asarray(mask)
        wrong = values[(values != 0) & (values != -np.inf)]
        if wrong.size:
            raise ValueError(
                f"mask holds {wrong[0]}: give 0 where a query may see a memory position and -inf where it may not, "
                "nothing else, e.g. jnp.where(allowed, 0.0, -jnp.inf)"
            )


def count_seen(mask: Float[Array, "B H Q M"]) -> Float[Array, "B H Q 1"]:
    """How many memory positions each query may see; NaN if its row holds anything but 0 and -inf."""
    allowed = mask == 0
    numbers = jnp.where(allowed | (mask == -jnp.inf), allowed.astype(jnp.float32), jnp.nan)
    # A sum, because a maximum may ignore NaN (XLA's does on CPUs).
    return jnp.sum(numbers, axis=-1, keepdims=True)
