"""The training step and the evaluation step: pure functions of a state, or of parameters, and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from flax_transformer.data.batch import Batch
from flax_transformer.experiment import Experiment
from flax_transformer.model import Transformer
from flax_transformer.projections import gradients_written_out
from flax_transformer.training.loss import LossSums, Scalar, cross_entropy_sums, sums_in_chunks
from flax_transformer.training.loss_scale import LossScale
from flax_transformer.training.optimizer import frozen, make_optimizer

Sums = TypeVar("Sums")
# An array on a device, or an int after it has been fetched.
Count = Int[Array | np.ndarray, ""] | int


class TrainState(flax.struct.PyTreeNode):
    """The state of a training, which a checkpoint holds.

    Attributes:
        step: number of global batches seen so far.
        params: the model's parameters, float32.
        opt_state: the optimizer's state.
        rng: the key from which the dropout of every step is derived; it never changes.
        skipped: number of updates skipped so far because the loss or the gradient was not finite.
        skipped_in_a_row: number of updates skipped since the last one that was made.
        ema: exponential moving average of the parameters, if there is one.
        loss_scale: the loss scale of a model in float16.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    rng: PRNGKeyArray
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    ema: PyTree | None = None
    loss_scale: LossScale | None = None

    @classmethod
    def create(
        cls,
        model: Transformer,
        optimizer: optax.GradientTransformation,
        rng: PRNGKeyArray,
        *,
        with_ema: bool = False,
    ) -> "TrainState":
        """The state before the first update; `rng` is split into a key for parameters and one for dropout."""
        params_rng, dropout_rng = jax.random.split(rng)
        tokens = jnp.ones((1, 2), jnp.int32)
        params = model.init(params_rng, tokens, tokens, deterministic=True)["params"]
        zero = jnp.zeros((), jnp.int32)
        return cls(
            step=zero,
            params=params,
            opt_state=optimizer.init(params),
            rng=dropout_rng,
            skipped=zero,
            skipped_in_a_row=zero,
            # A copy, because a buffer that is in a state twice cannot be donated.
            ema=jax.tree.map(jnp.copy, params) if with_ema else None,
            loss_scale=LossScale.create() if model.config.dtype == "float16" else None,
        )


def create_state(experiment: Experiment, rng: PRNGKeyArray) -> TrainState:
    """The state of an experiment before its first update."""
    model, training = Transformer(experiment.model), experiment.training
    optimizer = make_optimizer(training, experiment.model.d_model)
    return TrainState.create(model, optimizer, rng, with_ema=training.optimizer.ema_decay > 0)


class StepMetrics(flax.struct.PyTreeNode):
    """Measurements of one update over the global batch.

    Attributes:
        sums: sums of losses and tokens.
        gradient_norm: global norm of the gradient before clipping.
        module_norms: norm of the gradient of each module, e.g. `encoder/layers_0`.
        skipped: number of updates skipped so far, including this one.
        skipped_in_a_row: number of updates skipped since the last one that was made; 0 if this one was made.
    """

    sums: LossSums
    gradient_norm: Scalar
    module_norms: dict[str, Scalar]
    skipped: Count
    skipped_in_a_row: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a training minimises, and in how many parts a device computes it.

    Attributes:
        model: the Transformer.
        label_smoothing: the probability spread over the vocabulary (section 5.4).
        freeze: the parts of the model that do not change, as in `TrainingConfig`.
        micro_batches: number of parts into which a device divides its rows, to process one after the other.
        loss_chunks: number of parts into which the target slots are divided, so that only the logits of one part are
            in memory at a time; it divides the number of slots.
    """

    model: Transformer
    label_smoothing: float = 0.0
    freeze: str = ""
    micro_batches: int = 1
    loss_chunks: int = 1

    @classmethod
    def of(cls, experiment: Experiment, micro_batches: int) -> "Objective":
        """The objective of an experiment; how many micro-batches there are depends on the devices."""
        training = experiment.training
        return cls(
            model=Transformer(experiment.model),
            label_smoothing=training.label_smoothing,
            freeze=training.freeze,
            micro_batches=micro_batches,
            loss_chunks=training.parallelism.loss_chunks,
        )


def batch_sums(
    params: PyTree,
    batch: Batch,
    *,
    objective: Objective,
    dropout_rng: PRNGKeyArray | None = None,
    scale: Scalar = 1.0,
) -> LossSums:
    """The summed losses of a batch, all rows at once.

    Args:
        params: the model's parameters.
        batch: sentence pairs.
        objective: what to compute.
        dropout_rng: random key; `None` drops nothing.
        scale: factor by which the caller multiplies the loss before differentiating it; only chunks need it.
    """
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    model, chunks = objective.model, objective.loss_chunks
    run = functools.partial(model.apply, {"params": params}, deterministic=dropout_rng is None, rngs=rngs)
    memory = run(batch.source, method="encode")
    hidden = run(memory, batch.source, batch.target, method="decode")

    def sums_of(hidden: Array, target: Array, valid: Array) -> LossSums:
        logits = model.apply({"params": params}, hidden, method="logits")
        return cross_entropy_sums(logits, target, valid, objective.label_smoothing)

    target, valid = jnp.asarray(batch.target.ids), jnp.asarray(batch.target.segments) > 0
    if chunks == 1:
        return sums_of(hidden, target, valid)
    return sums_in_chunks(sums_of, hidden, target, valid, chunks=chunks, scale=scale)


def add_up(function: Callable[[Batch, int | Array], Sums], zeros: Sums, batch: Batch, micro_batches: int) -> Sums:
    """Adds up a function of a batch over parts of its rows, so that only one part is in memory at a time.

    Args:
        function: computes a tree of sums from some rows and the number of their part.
        zeros: the sums over no rows.
        batch: sentence pairs, in a number of rows that `micro_batches` divides.
        micro_batches: number of parts.
    """
    if micro_batches == 1:
        return function(batch, 0)
    # Part i has the rows i, i + micro_batches, and so on, so that each part lies on all devices that share the rows.
    parts = jax.tree.map(
        lambda leaf: jnp.swapaxes(jnp.reshape(leaf, (-1, micro_batches, *leaf.shape[1:])), 0, 1), batch
    )

    def add(total: Sums, part: tuple[Array, Batch]) -> tuple[Sums, None]:
        number, rows = part
        return jax.tree.map(jnp.add, total, function(rows, number)), None

    total, _ = jax.lax.scan(add, zeros, (jnp.arange(micro_batches), parts))
    return total


def loss_and_gradients(
    params: PyTree,
    batch: Batch,
    *,
    objective: Objective,
    dropout_rng: PRNGKeyArray | None = None,
    loss_scale: LossScale | None = None,
    axis_name: str | None = None,
) -> tuple[LossSums, PyTree]:
    """The summed losses of the global batch, and the gradient of its mean label-smoothed loss.

    Args:
        params: the model's parameters.
        batch: this device's share of the global batch.
        objective: what to differentiate; the gradient of frozen parameters is zero and is not computed.
        dropout_rng: random key; `None` drops nothing.
        loss_scale: the loss scale of a model in float16.
        axis_name: the axis over which the global batch is divided under `pmap`.
    """
    # The differentiated loss is a sum over tokens; divided by the number of slots it is about as large as a mean.
    freeze, micro_batches = objective.freeze, objective.micro_batches
    factor = None if loss_scale is None else loss_scale.factor / batch.target.ids.size

    def sums_and_gradients(rows: Batch, number: int | Array) -> tuple[LossSums, PyTree]:
        rng = dropout_rng
        if rng is not None and micro_batches > 1:
            rng = jax.random.fold_in(rng, number)

        def summed_loss(params):
            if freeze:
                params = jax.tree.map(
                    lambda leaf, stays: jax.lax.stop_gradient(leaf) if stays else leaf, params, frozen(freeze, params)
                )
            scale = 1.0 if factor is None else factor
            sums = batch_sums(params, rows, objective=objective, dropout_rng=rng, scale=scale)
            return sums.smoothed if factor is None else factor * sums.smoothed, sums

        with gradients_written_out():
            gradients, sums = jax.grad(summed_loss, has_aux=True)(params)
        return sums, gradients

    zeros = LossSums.zeros(), jax.tree.map(jnp.zeros_like, params)
    sums, gradients = add_up(sums_and_gradients, zeros, batch, micro_batches)
    if axis_name is not None:
        # Devices hold different numbers of tokens, so sums are added up over devices and divided once.
        gradients, sums = jax.lax.psum((gradients, sums), axis_name)
    divisor = sums.tokens if factor is None else sums.tokens * factor
    return sums, jax.tree.map(lambda gradient: gradient / divisor, gradients)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update of the parameters, on one device or, under `pmap`, on several.

    If the loss or the gradient is not finite, the update is skipped: the batch counts as seen and nothing else changes.

    Args:
        state: the state before the update.
        batch: this device's share of the global batch.
        objective: what to minimise.
        optimizer: from `make_optimizer`; it must not change what the objective freezes.
        ema_decay: decay of the moving average `ema`, if the state has one.
        axis_name: as in `loss_and_gradients`.

    Returns:
        The state after the update, and measurements.
    """
    dropout_rng = jax.random.fold_in(state.rng, state.step)
    if axis_name is not None:
        dropout_rng = jax.random.fold_in(dropout_rng, jax.lax.axis_index(axis_name))
    sums, gradients = loss_and_gradients(
        state.params,
        batch,
        objective=objective,
        dropout_rng=dropout_rng,
        loss_scale=state.loss_scale,
        axis_name=axis_name,
    )
    norms = module_norms(gradients)
    gradient_norm = optax.tree.norm(norms)
    finite = jnp.isfinite(sums.smoothed) & jnp.isfinite(gradient_norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # Parameters change fast at first, so the average then looks back less far.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)

    def if_finite(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda *leaves: jnp.where(finite, *leaves), new, old)

    after = TrainState(
        step=state.step + 1,
        params=if_finite(params, state.params),
        opt_state=if_finite(opt_state, state.opt_state),
        rng=state.rng,
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        ema=if_finite(ema, state.ema),
        loss_scale=None if state.loss_scale is None else state.loss_scale.adjust(finite),
    )
    metrics = StepMetrics(
        sums=sums,
        gradient_norm=gradient_norm,
        module_norms=norms,
        skipped=after.skipped,
        skipped_in_a_row=after.skipped_in_a_row,
    )
    return after, metrics


# The three functions below return the same function for equal experiments, because jax traces and compiles a function
# only once, however often one process trains.
@functools.lru_cache
def make_create_state(experiment: Experiment) -> Callable[[PRNGKeyArray], TrainState]:
    """The `create_state` of an experiment, a function of a random key."""
    return functools.partial(create_state, experiment)


@functools.lru_cache
def make_eval_step(experiment: Experiment, micro_batches: int) -> Callable[..., LossSums]:
    """The `eval_step` of an experiment, a function of parameters, a batch and the name of an axis."""
    return functools.partial(eval_step, objective=Objective.of(experiment, micro_batches))


@functools.lru_cache
def make_train_step(experiment: Experiment, micro_batches: int) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The `train_step` of an experiment, a function of a state, a batch and the name of an axis."""
    return functools.partial(
        train_step,
        objective=Objective.of(experiment, micro_batches),
        optimizer=make_optimizer(experiment.training, experiment.model.d_model),
        ema_decay=experiment.training.optimizer.ema_decay,
    )


def module_norms(gradients: PyTree) -> dict[str, Scalar]:
    """The norm of the gradient of each module; modules are named by the first two parts of their paths."""
    modules: dict[str, list[Array]] = {}
    for path, leaf in jax.tree.leaves_with_path(gradients):
        modules.setdefault(jax.tree_util.keystr(path[:2], simple=True, separator="/"), []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in modules.items()}


def eval_step(params: PyTree, batch: Batch, *, objective: Objective, axis_name: str | None = None) -> LossSums:
    """The summed losses of a batch, without dropout and without label smoothing."""
    unsmoothed = dataclasses.replace(objective, label_smoothing=0.0)

    def sums_of(rows: Batch, number: int | Array) -> LossSums:
        return batch_sums(params, rows, objective=unsmoothed)

    sums = add_up(sums_of, LossSums.zeros(), batch, objective.micro_batches)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
