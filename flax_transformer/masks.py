"""Takes lengths, validity or segment numbers and leaves additive masks for `attention.dot_product_attention`.

A mask holds exactly 0 where a query may see a key and -inf where it may not; it is added to the logits before the
softmax (section 3.2.3). Glossary: B batch, H heads, Q query positions, M memory positions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _additive(allowed: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)


def causal_mask(
    length: int, *, memory_length: int | None = None, start: int | Int[Array, ""] = 0
) -> Float[Array, "1 1 Q M"]:
    """Lets position i see the positions up to and including i (section 3.1).

    Args:
        length: number of queries, Q.
        memory_length: number of positions that may be seen, M; as many as queries if not given.
        start: the position of the first query; those before it are in the memory already.
    """
    queries = start + jnp.arange(length)
    memory = jnp.arange(length if memory_length is None else memory_length)
    return _additive(memory <= queries[:, None])[None, None]


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
