import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.experiment import Experiment, ScheduleConfig, TrainingConfig
from flax_transformer.training.optimizer import learning_rate_schedule, make_optimizer

STEPS = 53


def rates(steps=STEPS, d_model=16, **schedule):
    """The rate of each update."""
    config = TrainingConfig(steps=steps, schedule=ScheduleConfig(**schedule))
    return np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config, d_model)))(jnp.arange(steps)))


@pytest.mark.parametrize("warmup", [1, 2, 7, 40])
@pytest.mark.parametrize(("d_model", "factor"), [(512, 1.0), (16, 0.5)])
def test_the_paper_s_schedule_is_equation_3(warmup, d_model, factor):
    n = np.arange(1, STEPS + 1, dtype="float64")
    equation_3 = d_model**-0.5 * np.minimum(n**-0.5, n * warmup**-1.5)
    found = rates(d_model=d_model, name="paper", warmup_steps=warmup, learning_rate=factor)
    np.testing.assert_allclose(found, factor * equation_3, rtol=1e-6)
    assert found.argmax() + 1 == warmup


SHAPES = {  # by how many warm-ups, or by what share of the steps after it, have passed since the peak
    "inverse_sqrt": lambda since_peak, warmup, left: (1 + since_peak / warmup) ** -0.5,
    "cosine": lambda since_peak, warmup, left: (1 + np.cos(np.pi * since_peak / left)) / 2,
    "linear": lambda since_peak, warmup, left: 1 - since_peak / left,
    "constant": lambda since_peak, warmup, left: np.ones_like(since_peak),
}


@pytest.mark.parametrize("warmup", [1, 5, 13])
@pytest.mark.parametrize("schedule", SHAPES)
def test_other_schedules_warm_up_linearly_and_decay_as_their_name_says(schedule, warmup):
    found = rates(name=schedule, warmup_steps=warmup, learning_rate=3e-3)
    np.testing.assert_allclose(found[:warmup], 3e-3 * np.arange(1, warmup + 1) / warmup, rtol=1e-6)
    since_peak = np.arange(STEPS - warmup + 1)
    expected = 3e-3 * SHAPES[schedule](since_peak, warmup, STEPS - warmup)
    np.testing.assert_allclose(found[warmup - 1 :], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("linear", 0.0), ("constant", 3e-3)])
def test_decaying_schedules_end_at_zero(schedule, end):
    assert rates(name=schedule, warmup_steps=5, learning_rate=3e-3)[-1] == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize("schedule", ["paper", *SHAPES])
def test_without_warm_up_the_rate_starts_at_the_peak(schedule):
    found = rates(name=schedule, warmup_steps=0, learning_rate=3e-3)
    assert found[0] == found.max() > 0


@pytest.mark.parametrize("schedule", ["paper", *SHAPES])
def test_a_warm_up_longer_than_training_only_rises(schedule):
    found = rates(steps=5, name=schedule, warmup_steps=9)
    assert (np.diff(found) > 0).all()


def settings(**changes):
    constant = {"schedule.name": "constant", "schedule.learning_rate": 0.01, "schedule.warmup_steps": 0}
    changes = {f"training.{name}": value for name, value in (constant | changes).items()}
    return Experiment().changed(changes).training


def updated(config, params, *gradients):
    """The parameters after one update for each gradient, and the optimizer's state."""
    optimizer = make_optimizer(config, 16)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_two_updates_equal_adam_computed_by_hand_with_the_paper_s_constants():
    beta1, beta2, epsilon, rate = 0.9, 0.98, 1e-9, 0.01
    # The smallest gradients are of epsilon's size, so that another epsilon would show.
    first, second = np.array([0.5, -3.0, 1e-9, 2e-8]), np.array([-0.25, 0.0, 3e-9, -1e-8])
    start = np.zeros(4)
    mean, square = (1 - beta1) * first, (1 - beta2) * first**2
    expected = start - rate * (mean / (1 - beta1)) / (np.sqrt(square / (1 - beta2)) + epsilon)
    mean, square = beta1 * mean + (1 - beta1) * second, beta2 * square + (1 - beta2) * second**2
    expected -= rate * (mean / (1 - beta1**2)) / (np.sqrt(square / (1 - beta2**2)) + epsilon)
    found, _ = updated(settings(), jnp.float32(start), jnp.float32(first), jnp.float32(second))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_updates_follow_the_schedule():
    config = settings(**{"schedule.name": "linear", "schedule.warmup_steps": 3}, steps=9)
    schedule = learning_rate_schedule(config, 16)
    gradients = [jnp.ones(1)] * 9  # with equal gradients Adam's direction is 1 throughout
    found, _ = updated(config, jnp.zeros(1), *gradients)
    np.testing.assert_allclose(found[0], -sum(float(schedule(step)) for step in range(9)), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1000.0])
def test_clipping_bounds_the_gradient_s_global_norm_and_leaves_smaller_ones(scale):
    gradients = {"a": scale * jnp.array([[3.0, 4.0]]), "b": scale * jnp.array([12.0])}
    norm = 13 * scale
    _, state = updated(settings(**{"optimizer.clip_norm": 1.5}), jax.tree.map(jnp.zeros_like, gradients), gradients)
    seen = jax.tree.map(lambda mean: mean / (1 - 0.9), optax.tree_utils.tree_get(state, "mu"))
    np.testing.assert_allclose(optax.tree.norm(seen), min(norm, 1.5), rtol=1e-5)
    np.testing.assert_allclose(seen["a"][0, 0], gradients["a"][0, 0] * min(norm, 1.5) / norm, rtol=1e-5)


def test_weight_decay_shrinks_only_matrices_independently_of_adam_s_averages():
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0), "scale": jnp.ones(3)}
    nothing = jax.tree.map(jnp.zeros_like, params)
    found, state = updated(settings(**{"optimizer.weight_decay": 0.1}), params, nothing)
    np.testing.assert_allclose(found["kernel"], 2.0 - 0.01 * 0.1 * 2.0, rtol=1e-6)
    assert np.array_equal(found["bias"], params["bias"]) and np.array_equal(found["scale"], params["scale"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu")))


def test_without_a_gradient_and_without_decay_nothing_moves():
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    found, _ = updated(settings(), params, jax.tree.map(jnp.zeros_like, params))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
