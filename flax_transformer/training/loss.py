"""Takes logits and targets and leaves the summed loss and what it is divided by (section 5.4).

Sums, not means: devices and micro-batches hold different numbers of tokens, so whoever adds them up divides once.
Glossary: B batch, T target, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

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


def sums_in_chunks(
    sums_of: Callable[[Array, Array, Array], LossSums],
    outputs: Float[Array, "B T D"],
    target: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    chunks: int,
    scale: Scalar = 1.0,
) -> LossSums:
    """What `sums_of` gives, added up over parts of the target slots: the logits of one part at a time are in memory.

    But for a factor, the gradient of a summed loss is known as soon as the logits are. Differentiated, each part keeps
    that gradient, which is as large as its outputs, in place of its logits: none are made twice.

    This is for a training step, which differentiates `smoothed` in reverse. The gradients of `cross_entropy`, `correct`
    and `tokens` count as zero, without an error. Forward mode (`jax.jvp`, `jax.linearize`, `jax.hessian`) is an error,
    and so is a gradient inside `jax.shard_map` unless `check_vma=False`. Where any of that is needed, call `sums_of`
    on the whole instead.

    Args:
        sums_of: from some slots' outputs, targets and validity to their sums; its other parameters it closes over.
        outputs: of the decoder.
        target: the token ids that were wanted.
        valid: false for padding.
        chunks: the number of parts; it divides T.
        scale: what `smoothed` is multiplied by before it is differentiated: a small gradient in float16 is kept so much
            larger.
    """

    # Slots, not rows: the rows may be divided among devices.
    def divide(array: Array) -> Array:
        return jnp.moveaxis(jnp.reshape(array, (array.shape[0], chunks, -1, *array.shape[2:])), 1, 0)

    parts = divide(outputs), divide(target), divide(valid)
    of_part, weights = jax.closure_convert(sums_of, *(part[0] for part in parts))

    def scaled_loss(outputs: Array, weights: list[Array], *rest: Any) -> tuple[Array, LossSums]:
        sums = of_part(outputs, *rest, *weights)
        return sums.smoothed * scale, sums

    @jax.custom_vjp
    def total(outputs: Array, weights: list[Array], target: Array, valid: Array) -> LossSums:
        def add(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
            return jax.tree.map(jnp.add, sums, of_part(*part, *weights)), None

        return jax.lax.scan(add, LossSums.zeros(), (outputs, target, valid))[0]

    def forward(outputs: Array, weights: list[Array], target: Array, valid: Array) -> tuple[LossSums, Any]:
        def add(so_far: Any, part: tuple[Array, Array, Array]) -> tuple[Any, Array]:
            outputs, *rest = part
            gradient_of = jax.grad(scaled_loss, argnums=(0, 1), has_aux=True)
            (to_outputs, to_weights), sums = gradient_of(outputs, weights, *rest)
            return jax.tree.map(jnp.add, so_far, (sums, to_weights)), to_outputs

        zeros = LossSums.zeros(), jax.tree.map(jnp.zeros_like, weights)
        (sums, to_weights), to_outputs = jax.lax.scan(add, zeros, (outputs, target, valid))
        return sums, (to_outputs, to_weights)

    def backward(gradients: Any, cotangent: LossSums) -> tuple[Any, ...]:
        factor = cotangent.smoothed / scale
        return *jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradients), None, None

    total.defvjp(forward, backward)
    return total(parts[0], weights, *parts[1:])
