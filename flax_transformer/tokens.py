"""One side of a batch: token ids with the segments and positions that go with them, and checks of all three.

Inside `jit` the values are not known and cannot be checked; there an id outside the vocabulary gives NaN.

Glossary: B rows of a batch, S slots of a row, D d_model; under `pmap` another dimension, the devices, comes first.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Tokens(flax.struct.PyTreeNode):
    """The tokens of one side of a batch: NumPy arrays from the data pipeline, JAX arrays inside a step.

    Padding has segment 0, and its positions mean nothing.

    Attributes:
        ids: token ids, int32.
        segments: the number of each token's sentence within its row, counted from 1; 0 is padding.
        positions: the position of each token within its sentence, counted from 0.
    """

    ids: Int[Any, "*B S"]
    segments: Int[Any, "*B S"]
    positions: Int[Any, "*B S"]

    @classmethod
    def from_ids(cls, ids: Int[Any, "B S"], pad_id: int) -> "Tokens":
        """One sentence in each row: every token that is not `pad_id` belongs to segment 1.

        Padding may stand behind the sentence or, as some tokenizers write it, in front.
        """
        segments = (ids != pad_id).astype(jnp.int32)
        # 0 in a row that is all padding, or that has no place.
        begins = jnp.argmax(segments, axis=1, keepdims=True) if ids.shape[1] else 0
        index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        positions = jnp.maximum(index - begins, 0).astype(jnp.int32)
        return cls(ids, segments, positions)

    @classmethod
    def from_segments(cls, ids: Int[Any, "B S"], segments: Int[Any, "B S"]) -> "Tokens":
        """Several sentences in each row: positions start again from 0 with each segment."""
        index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        starts = segments != jnp.roll(segments, 1, axis=1)
        return cls(ids, segments, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1))

    def shift_right(self, start_id: int) -> "Tokens":
        """The decoder's input: ids shifted right, each sentence starting with `start_id` (section 3.1)."""
        return self.replace(ids=jnp.where(self.positions == 0, start_id, jnp.roll(self.ids, 1, axis=1)))


def check_tokens(name: str, tokens: Any, size: int) -> None:
    """Raises ValueError unless token ids are integers [B, S], in the vocabulary where they are known.

    Args:
        name: what error messages call them.
        tokens: an array of token ids, or `Tokens`, whose segments and positions are checked too.
        size: the number of token ids in the vocabulary.
    """
    if isinstance(tokens, Tokens):
        check_tokens(name, tokens.ids, size)
        for field in ("segments", "positions"):
            numbers = getattr(tokens, field)
            if not jnp.issubdtype(numbers.dtype, jnp.integer) or numbers.shape != tokens.ids.shape:
                raise ValueError(
                    f"{name}.{field} is {numbers.dtype} of shape {numbers.shape}, and the ids have shape "
                    f"{tokens.ids.shape}: give one integer for each token"
                )
        return
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2:
        raise ValueError(f"{name} is {tokens.dtype} of shape {tokens.shape}: give token ids, integers [B, S]")
    if is_known(tokens):
        values = np.asarray(tokens)
        wrong = values[(values < 0) | (values >= size)]
        if wrong.size:
            raise ValueError(
                f"{name} has the token id {wrong[0]}, the vocabulary has {size}, 0 to {size - 1}: give ids of this "
                "model's vocabulary, and pad with model.pad_id"
            )


def is_known(array: Any) -> bool:
    """Whether the values can be read: the array is not being traced and lies on devices of this process."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def look_up(embedding: nn.Embed, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """The vector of each token id; NaN for ids outside the table, negative ones too (-1 is not the last row)."""
    return nn.with_logical_constraint(embedding(ids.astype(jnp.uint32)), ("batch",))
