"""Dropout: a random share of the activations is set to zero and the rest is scaled up (section 5.4).

It replaces `flax.linen.Dropout`, which draws 32 random bits for each activation and so takes a large part of a small
model's training step on a CPU. Eight bits are enough for a rate rounded to 1/256, at a quarter of the cost.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

LEVELS = 256


def dropout(inputs: Float[Array, "*shape"], rate: float, rng: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Sets each entry to zero with probability `rate`, rounded to 1/256, without changing the expectation.

    Args:
        inputs: of any shape.
        rate: at least 0 and less than 1; a rate that rounds to 1 keeps one entry in 256.
        rng: random key; equal keys drop equal entries.

    Raises:
        ValueError: the rate is less than 0, or 1 or more.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the dropout rate is {rate}: give the share that is set to zero, at least 0 and less than 1")
    dropped_levels = min(round(rate * LEVELS), LEVELS - 1)
    if dropped_levels == 0:
        return inputs
    *leading, last = inputs.shape
    words = jax.random.bits(rng, (*leading, math.ceil(last / 4)), jnp.uint32)
    levels = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :last]
    return jnp.where(levels >= dropped_levels, inputs * (LEVELS / (LEVELS - dropped_levels)), 0)


class Dropout(nn.Module):
    """`dropout` as a layer, which takes its key from the "dropout" stream.

    Attributes:
        rate: at least 0 and less than 1.
    """

    rate: float

    @nn.compact
    def __call__(self, inputs: Float[Array, "*shape"], *, deterministic: bool) -> Float[Array, "*shape"]:
        """Applies dropout, unless `deterministic`."""
        if deterministic or self.rate == 0:
            return inputs
        return self.drop(inputs, self.make_rng("dropout"))

    def drop(self, inputs: Float[Array, "*shape"], rng: PRNGKeyArray) -> Float[Array, "*shape"]:
        """`__call__` with a given key; a mesh intercepts this method to draw bits on each device for its own rows."""
        return dropout(inputs, self.rate, rng)
