"""Checks the integers that a model is called with: token ids, and the segments and positions that go with them.

Values are looked at where they are known. Inside `jit` they are not: there an id that has no vector gets NaN.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def check_tokens(name: str, tokens: Any, size: int) -> None:
    """Raises ValueError unless `tokens` are token ids [B, S], all of them, where they are known, in the vocabulary.

    Args:
        name: what errors call them.
        tokens: an array.
        size: the number of token ids.
    """
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


def check_beside(name: str, numbers: Any, shape: tuple[Any, ...]) -> None:
    """Raises ValueError unless `numbers`, segments or positions, are integers of the tokens' shape; `None` is fine."""
    if numbers is not None and not (jnp.issubdtype(numbers.dtype, jnp.integer) and numbers.shape == shape):
        raise ValueError(
            f"{name} is {numbers.dtype} of shape {numbers.shape}, and the tokens have shape {shape}: give one integer "
            "for each token"
        )


def is_known(array: Any) -> bool:
    """Whether an array's values can be looked at: it is not being traced, and lies where this process can read it."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def look_up(embedding: nn.Embed, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """A vector for each token id; NaN for one that is not in the table, below 0 too (Python's -1 is its last row)."""
    return embedding(tokens.astype(jnp.uint32))
