"""Dropout: a random share of the activations is set to zero and the rest is scaled up (section 5.4).

It replaces `flax.linen.Dropout`, which draws 32 random bits for each activation and so takes a large part of a small
model's training step on a CPU. Eight bits are enough for a rate rounded to 1/256, at a quarter of the cost.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

LEVELS = 256


def dropout(inputs: Float[Array, "*shape"], rate: float, rng: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Sets each entry to zero with probability `rate`, rounded to 1/256, without changing the expectation.

    Args:
        inputs: of one dimension or more; over a mesh the first one is that which Flax's rules of logical axes call
            "batch".
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
    words = _draw(rng, (*leading, math.ceil(last / 4)))
    levels = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, 4 * words.shape[-1])[..., :last]
    return jnp.where(levels >= dropped_levels, inputs * (LEVELS / (LEVELS - dropped_levels)), 0)


def _draw(rng: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Random words; over a mesh each device draws only those of its own rows.

    XLA by itself divides the work of the generator "threefry2x32" among devices, but not that of "rbg" and
    "unsafe_rbg". With these each device derives a key of its own, so the words depend on the number of devices.
    """
    rows = nn.logical_to_mesh_axes(("batch",))
    if rows[0] is None or jax.sharding.get_abstract_mesh().empty or str(jax.random.key_impl(rng)) == "threefry2x32":
        return jax.random.bits(rng, shape, jnp.uint32)

    def draw_own(rng):
        own_rng = jax.random.fold_in(rng, jax.lax.axis_index(rows[0]))
        return jax.random.bits(own_rng, (shape[0] // jax.lax.axis_size(rows[0]), *shape[1:]), jnp.uint32)

    return jax.shard_map(draw_own, in_specs=PartitionSpec(), out_specs=rows)(rng)


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
        return dropout(inputs, self.rate, self.make_rng("dropout"))
