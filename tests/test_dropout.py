import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.dropout import Dropout, dropout

INPUTS = jnp.arange(1, 36, dtype="float32").reshape(5, 7)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.999])
def test_the_share_dropped_is_the_rate_rounded_to_one_in_256(rate):
    entries = 201 * 499
    share = min(round(256 * rate), 255) / 256
    kept = dropout(jnp.ones((201, 499)), rate, jax.random.key(0)) != 0
    # Five standard deviations of a binomial count.
    assert abs(float(1 - kept.mean()) - share) < 5 * math.sqrt(share * (1 - share) / entries)


def test_no_column_is_dropped_more_than_another():
    draws, rate = 2003, 0.25
    kept = dropout(jnp.ones((draws, 7)), rate, jax.random.key(1)) != 0
    assert (np.abs(1 - np.asarray(kept).mean(0) - rate) < 5 * math.sqrt(rate * (1 - rate) / draws)).all()
    # Neighbours, which come from the same word of random bits, are not correlated either.
    correlations = np.corrcoef(np.asarray(kept, float).T)[np.triu_indices(7, 1)]
    assert (np.abs(correlations) < 5 / math.sqrt(draws)).all()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_kept_entries_are_scaled_so_that_the_expectation_stays(rate):
    share = round(256 * rate) / 256
    dropped = np.asarray(dropout(INPUTS, rate, jax.random.key(2)))
    assert (dropped == 0).any() and (dropped != 0).any()
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, INPUTS / (1 - share)), rtol=2e-7)


@pytest.mark.parametrize("last", [1, 2, 3, 4, 9])
def test_any_size_of_the_last_axis_works_and_jit_changes_nothing(last):
    inputs = jnp.ones((3, 11, last))
    dropped = dropout(inputs, 0.5, jax.random.key(3))
    assert dropped.shape == inputs.shape
    assert 0 < (dropped == 0).mean() < 1
    assert np.array_equal(dropped, jax.jit(dropout, static_argnums=1)(inputs, 0.5, jax.random.key(3)))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 0)])
def test_nothing_is_dropped_from_nothing(shape):
    assert dropout(jnp.zeros(shape), 0.1, jax.random.key(0)).shape == shape


def test_equal_keys_drop_the_same_entries_and_different_keys_do_not():
    once, again, other = (dropout(INPUTS, 0.5, jax.random.key(seed)) for seed in (4, 4, 5))
    assert np.array_equal(once, again)
    assert not np.array_equal(once == 0, other == 0)
    # The key determines which entries are dropped, not the inputs.
    assert np.array_equal(dropout(-3 * INPUTS, 0.5, jax.random.key(4)) == 0, once == 0)


@pytest.mark.parametrize("rate", [0.0, 0.001])
def test_a_rate_that_rounds_to_zero_is_the_identity(rate):
    assert np.array_equal(dropout(INPUTS, rate, jax.random.key(6)), INPUTS)


def test_bfloat16_stays_bfloat16():
    assert dropout(INPUTS.astype("bfloat16"), 0.3, jax.random.key(7)).dtype == jnp.bfloat16


def test_gradients_of_kept_entries_are_scaled_like_the_entries():
    gradient = jax.grad(lambda inputs: dropout(inputs, 0.25, jax.random.key(8)).sum())(INPUTS)
    np.testing.assert_allclose(gradient, dropout(jnp.ones_like(INPUTS), 0.25, jax.random.key(8)), rtol=1e-6)


def test_the_layer_drops_only_when_it_is_not_deterministic():
    layer = Dropout(0.5)
    assert np.array_equal(layer.apply({}, INPUTS, deterministic=True), INPUTS)
    dropped = layer.apply({}, INPUTS, deterministic=False, rngs={"dropout": jax.random.key(9)})
    assert 0 < (dropped == 0).mean() < 1


def test_a_layer_with_rate_zero_needs_no_key():
    assert np.array_equal(Dropout(0.0).apply({}, INPUTS, deterministic=False), INPUTS)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 10.0, float("nan")])
def test_a_rate_outside_zero_to_one_is_an_error(rate):
    with pytest.raises(ValueError, match=f"the dropout rate is {rate}: give the share"):
        dropout(jnp.ones((2, 5)), rate, jax.random.key(0))
