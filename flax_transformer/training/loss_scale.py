"""Adapts the factor by which the loss is multiplied in float16, the loss scale (Micikevicius et al., 2018).

float16 has no numbers between 0 and 6e-8, where many gradients are. So the loss is multiplied by a large factor before
the backward pass, and the gradient is divided by it afterwards. If the factor is too large, the gradient is not finite:
that update is skipped and the factor halved. After many finite gradients in a row it is doubled.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FIRST = 2.0**15
GROWTH_INTERVAL = 2000


class LossScale(NamedTuple):
    """The loss scale, a part of the training state.

    Attributes:
        factor: multiplies the mean loss; a power of 2, at least 1.
        finite_steps: number of finite gradients in a row since the factor last changed.
    """

    factor: Float[Array, ""]
    finite_steps: Int[Array, ""]

    @classmethod
    def create(cls) -> "LossScale":
        """The factor before the first update."""
        return cls(factor=jnp.float32(FIRST), finite_steps=jnp.int32(0))

    def adjust(self, finite: Bool[Array, ""]) -> "LossScale":
        """The loss scale after a gradient that was or was not finite."""
        grows = finite & (self.finite_steps + 1 >= GROWTH_INTERVAL)
        factor = jnp.where(finite, jnp.where(grows, 2 * self.factor, self.factor), self.factor / 2)
        finite_steps = jnp.where(finite & ~grows, self.finite_steps + 1, 0)
        return LossScale(factor=jnp.maximum(factor, 1.0), finite_steps=finite_steps)
