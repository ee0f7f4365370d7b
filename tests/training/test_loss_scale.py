import jax
import jax.numpy as jnp

from flax_transformer.training.loss_scale import FIRST, GROWTH_INTERVAL, LossScale

adjust = jax.jit(LossScale.adjust)
GOOD, BAD = jnp.bool_(True), jnp.bool_(False)


def scale_of(factor, finite_steps):
    return LossScale(factor=jnp.float32(factor), finite_steps=jnp.int32(finite_steps))


def after(scale, *finite):
    for value in finite:
        scale = adjust(scale, value)
    return float(scale.factor), int(scale.finite_steps)


def test_an_infinite_gradient_halves_the_factor_and_resets_the_count():
    assert after(LossScale.create(), BAD) == (FIRST / 2, 0)
    assert after(LossScale.create(), GOOD, GOOD, BAD, GOOD) == (FIRST / 2, 1)


def test_many_finite_gradients_in_a_row_double_it_once():
    assert after(scale_of(8, GROWTH_INTERVAL - 2), GOOD) == (8, GROWTH_INTERVAL - 1)
    assert after(scale_of(8, GROWTH_INTERVAL - 1), GOOD) == (16, 0)
    assert after(scale_of(8, GROWTH_INTERVAL - 1), BAD, GOOD) == (4, 1)


def test_it_never_falls_below_one():
    assert after(scale_of(2, 5), BAD, BAD, BAD) == (1, 0)
