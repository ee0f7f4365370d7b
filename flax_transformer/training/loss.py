"""Takes logits and targets and leaves the summed loss and what it is divided by (section 5.4).

These are sums rather than means because devices and micro-batches hold different numbers of tokens: the sums are added
up and divided once.

Glossary: B batch, T target, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# An array on a device, or a float after it has been fetched.
Scalar = Float[Array | np.ndarray, ""] | float


class LossSums(flax.struct.PyTreeNode):
    """Sums over target tokens without padding; divided by `tokens` they are means.

    Attributes:
        smoothed: label-smoothed cross-entropy in nats, which training minimises.
        cross_entropy: cross-entropy in nats; the exponential of its mean is the perplexity.
        correct: number of tokens that have the largest logit.
        tokens: number of target tokens.
    """

    smoothed: Scalar
    cross_entropy: Scalar
    correct: Scalar
    tokens: Scalar

    @classmethod
    def zeros(cls) -> "LossSums":
        """The sums over no tokens at all."""
        zero = jnp.zeros(())
        return cls(smoothed=zero, cross_entropy=zero, correct=zero, tokens=zero)


def cross_entropy_sums(
    logits: Float[Array, "B T V"],
    target: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    label_smoothing: float,
) -> LossSums:
    """Label-smoothed cross-entropy, summed over the valid target tokens.

    The expected distribution gives 1 - label_smoothing to the target and spreads label_smoothing evenly over the whole
    vocabulary, like `optax.smooth_labels`, but without a one-hot array as large as the logits.

    Args:
        logits: the model's predictions.
        target: the expected token ids.
        valid: false for padding.
        label_smoothing: 0.1 in the paper (section 5.4).
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather, whose gradient would be a scatter into an array as large as the logits.
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


def sums_in_chunks(
    sums_of: Callable[[Array, Array, Array], LossSums],
    hidden: Float[Array, "B T D"],
    target: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    chunks: int,
    scale: Scalar = 1.0,
) -> LossSums:
    """Adds up `sums_of` over parts of the target slots, so that only the logits of one part are in memory at a time.

    Except for a factor, the gradient of a summed loss is known as soon as the logits are. When this is differentiated,
    each part keeps that gradient, which is as large as its hidden vectors, and not its logits, which are computed once.

    This is made for a training step, which differentiates `smoothed` in reverse mode. The gradients of `cross_entropy`,
    `correct` and `tokens` are zero, without an error. Forward mode (`jax.jvp`, `jax.linearize`, `jax.hessian`) is an
    error, and so is a gradient inside `jax.shard_map` unless `check_vma=False`. Where you need any of these, call
    `sums_of` on the whole batch instead.

    Args:
        sums_of: computes sums from hidden vectors, targets and validity of some slots; it closes over parameters.
        hidden: the decoder's hidden vectors.
        target: the expected token ids.
        valid: false for padding.
        chunks: number of parts; it divides T.
        scale: factor by which `smoothed` is multiplied before it is differentiated, so that small gradients in float16
            do not become zero.
    """

    # Slots are divided rather than rows, because rows may be divided among devices.
    def divide(array: Array) -> Array:
        return jnp.moveaxis(jnp.reshape(array, (array.shape[0], chunks, -1, *array.shape[2:])), 1, 0)

    parts = divide(hidden), divide(target), divide(valid)
    of_part, weights = jax.closure_convert(sums_of, *(part[0] for part in parts))

    def scaled_loss(hidden: Array, weights: list[Array], *rest: Any) -> tuple[Array, LossSums]:
        sums = of_part(hidden, *rest, *weights)
        return sums.smoothed * scale, sums

    @jax.custom_vjp
    def total(hidden: Array, weights: list[Array], target: Array, valid: Array) -> LossSums:
        def add(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
            return jax.tree.map(jnp.add, sums, of_part(*part, *weights)), None

        return jax.lax.scan(add, LossSums.zeros(), (hidden, target, valid))[0]

    def forward(hidden: Array, weights: list[Array], target: Array, valid: Array) -> tuple[LossSums, Any]:
        def add(so_far: Any, part: tuple[Array, Array, Array]) -> tuple[Any, Array]:
            hidden, *rest = part
            gradient_of = jax.grad(scaled_loss, argnums=(0, 1), has_aux=True)
            (to_hidden, to_weights), sums = gradient_of(hidden, weights, *rest)
            return jax.tree.map(jnp.add, so_far, (sums, to_weights)), to_hidden

        zeros = LossSums.zeros(), jax.tree.map(jnp.zeros_like, weights)
        (sums, to_weights), to_hidden = jax.lax.scan(add, zeros, (hidden, target, valid))
        return sums, (to_hidden, to_weights)

    def backward(gradients: Any, cotangent: LossSums) -> tuple[Any, ...]:
        factor = cotangent.smoothed / scale
        return *jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradients), None, None

    total.defvjp(forward, backward)
    return total(parts[0], weights, *parts[1:])
