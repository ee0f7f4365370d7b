"""Takes a training state and a batch and leaves the next state and what the step measured: pure functions.

Glossary: B batch rows, S source slots, T target slots.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from flax_transformer.data.batch import Batch
from flax_transformer.model import Transformer
from flax_transformer.training.loss import LossSums, Scalar, cross_entropy_sums


class TrainState(flax.struct.PyTreeNode):
    """All that training remembers.

    Attributes:
        step: number of updates made.
        params: the model's parameters, float32.
        opt_state: the optimizer's state.
        rng: the key from which every step's dropout is derived; it never changes.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    rng: PRNGKeyArray

    @classmethod
    def create(cls, model: Transformer, optimizer: optax.GradientTransformation, rng: PRNGKeyArray) -> "TrainState":
        """A state before the first update; parameters and dropout come from two halves of `rng`."""
        params_rng, dropout_rng = jax.random.split(rng)
        tokens = jnp.ones((1, 2), jnp.int32)
        params = model.init(params_rng, tokens, tokens, deterministic=True)["params"]
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=dropout_rng)


class StepMetrics(flax.struct.PyTreeNode):
    """What one update measured over the global batch.

    Attributes:
        sums: of the losses and tokens.
        gradient_norm: the gradient's global norm, before clipping.
    """

    sums: LossSums
    gradient_norm: Scalar


def batch_sums(
    params: PyTree, batch: Batch, *, model: Transformer, label_smoothing: float, dropout_rng: PRNGKeyArray | None
) -> LossSums:
    """The summed losses of a batch; without `dropout_rng` nothing is dropped."""
    logits = model.apply(
        {"params": params},
        batch.source,
        batch.target,
        source_segments=batch.source_segments,
        target_segments=batch.target_segments,
        source_positions=batch.source_positions,
        target_positions=batch.target_positions,
        deterministic=dropout_rng is None,
        rngs=None if dropout_rng is None else {"dropout": dropout_rng},
    )
    return cross_entropy_sums(
        logits, jnp.asarray(batch.target), jnp.asarray(batch.target_segments) > 0, label_smoothing
    )


def loss_and_gradients(
    params: PyTree,
    batch: Batch,
    *,
    model: Transformer,
    label_smoothing: float,
    dropout_rng: PRNGKeyArray | None = None,
    axis_name: str | None = None,
) -> tuple[LossSums, PyTree]:
    """The global batch's summed losses, and the gradient of its mean label-smoothed loss.

    Args:
        params: the model's parameters.
        batch: this device's share of the global batch.
        model: the Transformer.
        label_smoothing: section 5.4.
        dropout_rng: the step's key; `None` drops nothing.
        axis_name: the axis over which the global batch is divided, under `pmap`.
    """

    def summed_loss(params):
        sums = batch_sums(params, batch, model=model, label_smoothing=label_smoothing, dropout_rng=dropout_rng)
        return sums.smoothed, sums

    gradients, sums = jax.grad(summed_loss, has_aux=True)(params)
    if axis_name is not None:
        # Devices hold different numbers of tokens: sums are added up over devices and divided once.
        gradients, sums = jax.lax.psum((gradients, sums), axis_name)
    return sums, jax.tree.map(lambda gradient: gradient / sums.tokens, gradients)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    label_smoothing: float,
    axis_name: str | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update: the same on one device and on several under `pmap`.

    Args:
        state: before the update.
        batch: this device's share of the global batch.
        model: the Transformer.
        optimizer: from `make_optimizer`.
        label_smoothing: section 5.4.
        axis_name: the axis over which the global batch is divided, under `pmap`.

    Returns:
        The state after the update, and what was measured.
    """
    dropout_rng = jax.random.fold_in(state.rng, state.step)
    if axis_name is not None:
        dropout_rng = jax.random.fold_in(dropout_rng, jax.lax.axis_index(axis_name))
    sums, gradients = loss_and_gradients(
        state.params,
        batch,
        model=model,
        label_smoothing=label_smoothing,
        dropout_rng=dropout_rng,
        axis_name=axis_name,
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics = StepMetrics(sums=sums, gradient_norm=optax.tree.norm(gradients))
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def eval_step(params: PyTree, batch: Batch, *, model: Transformer, axis_name: str | None = None) -> LossSums:
    """The summed losses of a batch without dropout; add batches up, then divide by the tokens."""
    sums = batch_sums(params, batch, model=model, label_smoothing=0.0, dropout_rng=None)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
