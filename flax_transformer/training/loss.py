"""Takes logits and targets and leaves the summed loss and what it is divided by (section 5.4).

Sums, not means: devices and micro-batches hold different numbers of tokens, so whoever adds them up divides once.
Glossary: B batch, T target, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# An array on the device, a plain number once it has been fetched.
Scalar = Float[Array | np.ndarray, ""] | float


class LossSums(flax.struct.PyTreeNode):
    """Sums over target tokens, padding left out; divide each by `tokens`.

    Attributes:
        smoothed: label-smoothed cross-entropy in nats, what training minimises.
        cross_entropy: cross-entropy in nats, whose mean's exponential is the perplexity.
        correct: tokens whose logit is the largest.
        tokens: number of target tokens.
    """

    smoothed: Scalar
    cross_entropy: Scalar
    correct: Scalar
    tokens: Scalar

    @classmethod
    def zeros(cls) -> "LossSums":
        """The sums over no tokens."""
        zero = jnp.zeros(())
        return cls(smoothed=zero, cross_entropy=zero, correct=zero, tokens=zero)


def cross_entropy_sums(
    logits: Float[Array, "B T V"], target: Int[Array, "B T"], valid: Bool[Array, "B T"], label_smoothing: float
) -> LossSums:
    """Label-smoothed cross-entropy, summed over the valid target tokens.

    The wanted distribution is 1 - label_smoothing on the target and label_smoothing spread evenly over all of the
    vocabulary, as `optax.smooth_labels` has it; written out, it needs no one-hot array of the logits' size.

    Args:
        logits: of each target token.
        target: the token ids that were wanted.
        valid: false for padding.
        label_smoothing: the paper's 0.1 (section 5.4).
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: its gradient is one more term of the softmax's, not a scatter of the logits' size.
    is_target = jnp.arange(logits.shape[-1]) == target[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    cross_entropy = log_normalizer - target_logits
    uniform = log_normalizer - jnp.mean(logits, axis=-1)
    smoothed = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
    correct = target_logits >= jnp.max(logits, axis=-1)

    def total(values: Float[Array, "B T"] | Bool[Array, "B T"]) -> Float[Array, ""]:
        return jnp.sum(values, where=valid, dtype=jnp.float32)

    return LossSums(
        smoothed=total(smoothed),
        cross_entropy=total(cross_entropy),
        correct=total(correct),
        tokens=total(jnp.ones_like(smoothed)),
    )
