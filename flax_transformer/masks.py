"""Takes lengths, validity or segment numbers and leaves additive masks for `attention.dot_product_attention`.

A mask holds exactly 0 where a query may see a key and -inf where it may not; it is added to the logits before the
softmax (section 3.2.3). Glossary: B batch, H heads, Q query positions, M memory positions, N hypotheses of a sentence,
L positions of a cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _additive(allowed: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)


def causal_mask(length: int) -> Float[Array, "1 1 Q M"]:
    """Lets position i of `length` see the positions up to and including i (section 3.1)."""
    positions = jnp.arange(length)
    return _additive(positions <= positions[:, None])[None, None]


def ancestor_mask(ancestors: Int[Array, "B N L"], length: int, start: int | Int[Array, ""]) -> Float[Array, "B 1 Q M"]:
    """Lets each hypothesis of a sentence see its own past in a cache that all of them share.

    Queries and cache are ordered by position, then by hypothesis: Q = `length` * N, M = L * N.

    Args:
        ancestors: for each hypothesis and position, which of the N wrote what that hypothesis has there.
        length: number of positions that ask.
        start: the first of them; the cache holds those before it.
    """
    batch, hypotheses, room = ancestors.shape
    own = ancestors[..., None] == jnp.arange(hypotheses)
    seen = jnp.arange(room) <= start + jnp.arange(length)[:, None]
    visible = seen[None, :, None, :, None] & own[:, None]
    return _additive(visible.reshape(batch, length * hypotheses, room * hypotheses))[:, None]


def padding_mask(valid: Bool[Array, "B M"]) -> Float[Array, "B 1 1 M"]:
    """Hides padding from every query.

    Args:
        valid: true where a memory position holds a token, false where it is padding.
    """
    return _additive(valid)[:, None, None, :]


def segment_mask(query_segments: Int[Array, "B Q"], memory_segments: Int[Array, "B M"]) -> Float[Array, "B 1 Q M"]:
    """Lets a query see the positions of its own segment, where several sentences are packed into one row.

    Segment 0 is padding: it sees nothing and is seen by nothing.

    Args:
        query_segments: for each query the number of its sentence within the row.
        memory_segments: the same for each memory position.
    """
    queries, memory = query_segments[:, :, None], memory_segments[:, None, :]
    return _additive((queries == memory) & (queries > 0))[:, None]


def combine_masks(*masks: Float[Array, "#B #H #Q #M"] | None) -> Float[Array, "B H Q M"] | None:
    """Adds masks, so that a query sees a key only where all of them allow it; `None` hides nothing."""
    present = [mask for mask in masks if mask is not None]
    return jax.tree.reduce(jnp.add, present) if present else None
