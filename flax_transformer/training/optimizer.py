"""Builds the learning-rate schedule, the optimizer and the set of frozen parameters from the training settings.

The schedule and the optimizer are optax's (section 5.3).
"""

import functools

import jax
import optax
from jaxtyping import PyTree

from flax_transformer.experiment import TrainingConfig


def learning_rate_schedule(config: TrainingConfig, d_model: int) -> optax.Schedule:
    """The learning rate at each step, counted from 0; every schedule warms up linearly.

    "paper" is d_model^-0.5 * min(n^-0.5, n * warmup_steps^-1.5) of equation 3 times `learning_rate`, where n counts
    from 1; "inverse_sqrt" has the same shape and `learning_rate` as its peak; "cosine" and "linear" fall to 0 at the
    last step; "constant" stays at `learning_rate`.

    Args:
        config: the training settings: schedule, peak, warm-up and number of steps.
        d_model: the model's width, which scales the paper's schedule.
    """
    name, peak, warmup = config.schedule.name, config.schedule.learning_rate, max(config.schedule.warmup_steps, 1)
    if name == "paper":
        peak *= (d_model * warmup) ** -0.5
    after_warmup = max(config.steps - warmup, 1)
    decay: optax.Schedule = {
        "paper": lambda step: peak * (1 + step / warmup) ** -0.5,
        "inverse_sqrt": lambda step: peak * (1 + step / warmup) ** -0.5,
        "cosine": optax.cosine_decay_schedule(peak, after_warmup),
        "linear": optax.linear_schedule(peak, 0.0, after_warmup),
        "constant": optax.constant_schedule(peak),
    }[name]
    # Update n of the paper counts from 1: the rate at step 0 is peak / warmup, and the peak comes at step warmup - 1.
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rise, decay], [warmup - 1])


def make_optimizer(config: TrainingConfig, d_model: int) -> optax.GradientTransformation:
    """Adam with the paper's betas and epsilon; clipping by global norm, weight decay and frozen parts if asked for.

    Args:
        config: the training settings.
        d_model: the model's width, which scales the paper's schedule.
    """
    settings = config.optimizer
    transforms = [optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)]
    if settings.clip_norm:
        transforms.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    if settings.weight_decay:
        matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        transforms.append(optax.add_decayed_weights(settings.weight_decay, mask=matrices))
    optimizer = optax.chain(*transforms, optax.scale_by_learning_rate(learning_rate_schedule(config, d_model)))
    if not config.freeze:
        return optimizer
    # Frozen parameters have no moments and are not part of the global norm.
    parts = {True: optax.set_to_zero(), False: optimizer}
    return optax.partition(parts, functools.partial(frozen, config.freeze))


def frozen(freeze: str, params: PyTree) -> PyTree:
    """Returns, for each parameter, whether it is frozen.

    Args:
        freeze: as in `TrainingConfig`; "embeddings" includes an output that is tied to them.
        params: the model's parameters.
    """
    parts = freeze.split(",")

    def is_frozen(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> bool:
        name = path[0].key
        return ("encoder" in parts and name == "encoder") or ("embeddings" in parts and name.endswith("_embedding"))

    return jax.tree.map_with_path(is_frozen, params)
