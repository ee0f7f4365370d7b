"""Position encodings, sinusoidal and learned (section 3.5); positions are counted from 0 within each sentence.

Glossary: B batch, S positions in a row, D d_model.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.tokens import is_known


def sinusoidal_positions(
    positions: Int[Array, "*B S"], d_model: int, *, interleaved: bool = True, endpoint: bool = False
) -> Float[Array, "*B S {d_model}"]:
    """Sines and cosines of geometrically spaced frequencies (section 3.5), for positions of any size.

    Args:
        positions: counted from 0.
        d_model: even number of features.
        interleaved: true puts sines in even and cosines in odd features, as the paper does; false puts sines in the
            first half and cosines in the second.
        endpoint: whether the longest wave is exactly 10000 times as long as the shortest, so that wavelengths are
            2 pi * 10000^(i / (D/2 - 1)), as in tensor2tensor, fairseq and Marian; the paper has 10000^(i / (D/2)).

    Raises:
        ValueError: `d_model` is odd.
    """
    if d_model % 2:
        raise ValueError(f"d_model is {d_model}: sines and cosines come in pairs, so give an even number")
    # In another order, these operations would give other last bits, and stored models were trained with these.
    last = max(d_model - 2, 1) if endpoint else d_model
    frequencies = jnp.exp(jnp.arange(0, d_model, 2) * (-jnp.log(10000.0) / last))
    angles = positions[..., None] * frequencies
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1 if interleaved else -2)
    return waves.reshape(*positions.shape, d_model)


# An int, or a symbolic dimension where jax.export exports a program for any length.
Length = Any


class LearnedPositions(nn.Module):
    """One trained vector for each position: the alternative in section 3.5 and row (E) of table 3.

    Attributes:
        max_length: number of positions.
        d_model: features of each vector.
    """

    max_length: int
    d_model: int

    @nn.compact
    def __call__(self, positions: Int[Array, "*B S"]) -> Float[Array, "*B S D"]:
        """Looks positions up; those outside the table give NaN.

        Raises:
            ValueError: a position is known to be outside the table.
        """
        if is_known(positions):
            check_length(int(positions.max(initial=0)) + 1, self.max_length)
            if positions.min(initial=0) < 0:
                raise ValueError(f"positions has {positions.min()}: count positions from 0")
        table = self.param("embedding", nn.initializers.normal(self.d_model**-0.5), (self.max_length, self.d_model))
        return jnp.take(table, positions.astype(jnp.uint32), axis=0, mode="fill", fill_value=jnp.nan)


def check_length(length: Length, max_length: int) -> None:
    """Raises ValueError where `length` positions do not fit into a learned table of `max_length`."""
    if length > max_length:
        raise ValueError(
            f"a sentence has {length} positions, but model.max_length is {max_length}: "
            "raise it before training, filter the data, or choose sinusoidal positions"
        )
