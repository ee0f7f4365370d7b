"""Takes whether a gradient in float16 was finite and leaves the factor for the next loss (Micikevicius et al., 2018).

float16 has nothing between 0 and 6e-8, where many gradients lie. So the loss is multiplied by a large factor before the
backward pass, and the gradient divided by it after. A factor that is too large gives infinities: that update is left
out and the factor halved; after many finite ones in a row it is doubled.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FIRST = 2.0**15
GROWTH_INTERVAL = 2000


class LossScale(NamedTuple):
    """The factor, part of the training state.

    Attributes:
        factor: what the mean loss is multiplied by, a power of 2, at least 1.
        finite_steps: gradients in a row that were finite since the factor last changed.
    """

    factor: Float[Array, ""]
    finite_steps: Int[Array, ""]

    @classmethod
    def create(cls) -> "LossScale":
        """The factor before the first update."""
        return cls(factor=jnp.float32(FIRST), finite_steps=jnp.int32(0))

    def adjust(self, finite: Bool[Array, ""]) -> "LossScale":
        """The factor after a gradient that was finite, or was not."""
        grows = finite & (self.finite_steps + 1 >= GROWTH_INTERVAL)
        factor = jnp.where(finite, jnp.where(grows, 2 * self.factor, self.factor), self.factor / 2)
        finite_steps = jnp.where(finite & ~grows, self.finite_steps + 1, 0)
        return LossScale(factor=jnp.maximum(factor, 1.0), finite_steps=finite_steps)
