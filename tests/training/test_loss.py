import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.training.loss import LossSums, cross_entropy_sums, sums_in_chunks

B, T, V = 3, 7, 11
RNG = np.random.default_rng(0)
LOGITS = jnp.float32(RNG.normal(scale=3.0, size=(B, T, V)))
TARGET = jnp.int32(RNG.integers(0, V, (B, T)))
VALID = jnp.arange(T) < jnp.array([[7], [4], [0]])  # full, partly padding, an empty row


def optax_loss(logits, smoothing):
    wanted = optax.smooth_labels(jax.nn.one_hot(TARGET, V), smoothing)
    return jnp.sum(optax.softmax_cross_entropy(logits, wanted), where=VALID)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_the_loss_and_its_gradient_equal_optax_s_with_smoothed_labels(smoothing):
    def our_loss(logits):
        return cross_entropy_sums(logits, TARGET, VALID, smoothing).smoothed

    ours, our_gradient = jax.value_and_grad(our_loss)(LOGITS)
    theirs, their_gradient = jax.value_and_grad(optax_loss)(LOGITS, smoothing)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(our_gradient, their_gradient, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_not_smoothed(smoothing):
    sums = cross_entropy_sums(LOGITS, TARGET, VALID, smoothing)
    plain = optax.softmax_cross_entropy_with_integer_labels(LOGITS, TARGET)
    np.testing.assert_allclose(sums.cross_entropy, np.sum(plain, where=VALID), rtol=1e-6)
    assert (sums.smoothed == sums.cross_entropy) == (smoothing == 0)


def test_padding_adds_nothing_to_any_sum_nor_to_the_gradient():
    def smoothed(logits, target):
        sums = cross_entropy_sums(logits, target, VALID, 0.1)
        return sums.smoothed, sums

    gradient, before = jax.grad(smoothed, has_aux=True)(LOGITS, TARGET)
    other_logits = jnp.where(VALID[..., None], LOGITS, 50 - LOGITS)
    other_gradient, after = jax.grad(smoothed, has_aux=True)(other_logits, jnp.where(VALID, TARGET, 1))
    assert before == after
    assert np.array_equal(gradient, other_gradient)
    assert not gradient[~VALID].any() and gradient[VALID].any(-1).all()


def test_only_valid_tokens_are_counted():
    sums = cross_entropy_sums(LOGITS, TARGET, VALID, 0.1)
    assert sums.tokens == VALID.sum()
    assert sums.correct == (VALID & (LOGITS.argmax(-1) == TARGET)).sum()
    all_correct = cross_entropy_sums(100 * jax.nn.one_hot(TARGET, V), TARGET, VALID, 0.0)
    assert all_correct.correct == all_correct.tokens
    np.testing.assert_allclose(all_correct.cross_entropy, 0, atol=1e-6)


def test_a_batch_of_padding_alone_sums_to_zero():
    assert all(value == 0 for value in jax.tree.leaves(cross_entropy_sums(LOGITS, TARGET, VALID & False, 0.1)))


def test_huge_logits_stay_finite():
    huge = cross_entropy_sums(1e4 * LOGITS, TARGET, VALID, 0.1)
    assert np.isfinite(jax.tree.leaves(huge)).all()


WEIGHTS = {"kernel": jnp.float32(RNG.normal(size=(5, V))), "bias": jnp.float32(RNG.normal(size=V))}
OUTPUTS = jnp.float32(RNG.normal(size=(B, T, 5)))


def sums_with(weights, outputs, chunks):
    def sums_of(outputs, target, valid):
        return cross_entropy_sums(outputs @ weights["kernel"] + weights["bias"], target, valid, 0.1)

    if chunks is None:
        return sums_of(outputs, TARGET, VALID)
    return sums_in_chunks(sums_of, outputs, TARGET, VALID, chunks=chunks, scale=4.0)


@pytest.mark.parametrize("factor", [1.0, 4.0, -0.5])
@pytest.mark.parametrize("chunks", [1, T])
def test_sums_in_chunks_and_their_gradients_equal_those_of_the_whole_batch(chunks, factor):
    def loss(weights, outputs, chunks):
        sums = sums_with(weights, outputs, chunks)
        return factor * sums.smoothed, sums

    (_, whole), expected = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(WEIGHTS, OUTPUTS, None)
    (_, parts), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(WEIGHTS, OUTPUTS, chunks)
    for sums in (parts, sums_with(WEIGHTS, OUTPUTS, chunks)):
        assert sums.tokens == whole.tokens and sums.correct == whole.correct
        np.testing.assert_allclose(sums.smoothed, whole.smoothed, rtol=1e-6)
        np.testing.assert_allclose(sums.cross_entropy, whole.cross_entropy, rtol=1e-6)
    for leaf, of_whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, of_whole, rtol=1e-5, atol=1e-6)


def test_sums_in_chunks_compute_no_logits_twice():
    def products(chunks):
        gradient = jax.grad(lambda weights, outputs: sums_with(weights, outputs, chunks).smoothed, argnums=(0, 1))
        return str(jax.make_jaxpr(gradient)(WEIGHTS, OUTPUTS)).count("dot_general[")

    assert products(T) == products(None) == 3


def test_in_chunks_the_scale_preserves_gradients_too_small_for_float16():
    def sums_of(outputs, target, valid):
        tiny = 1e-9 * jnp.sum(outputs.astype(jnp.float32))
        return LossSums(smoothed=tiny, cross_entropy=tiny, correct=tiny, tokens=tiny)

    def gradient(scale):
        def loss(outputs):
            return scale * sums_in_chunks(sums_of, outputs, TARGET, VALID, chunks=T, scale=scale).smoothed

        return jax.grad(loss)(OUTPUTS.astype(jnp.float16))

    assert gradient(1.0).dtype == jnp.float16 and not gradient(1.0).any()
    np.testing.assert_allclose(gradient(2.0**20), 2.0**20 * 1e-9, rtol=1e-3)
