import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.recurrence import SSRU
from flax_transformer.stacks import DecodingState

B, T, D, N = 3, 11, 7, 2
BEGINS = np.zeros((B, T), bool)
BEGINS[0, [0, 4, 5]] = BEGINS[1, 0] = BEGINS[2, 8:] = True


@pytest.fixture(scope="module")
def unit():
    """The module, and variables in which no bias is zero."""
    rng = np.random.default_rng(0)
    forget = {"kernel": rng.normal(size=(D, D)), "bias": rng.normal(size=D)}
    params = {"input": {"kernel": rng.normal(size=(D, D))}, "forget": forget}
    module, variables = SSRU(D), {"params": jax.tree.map(np.float32, params)}
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, D)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    return module, variables


def vectors(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def by_hand(variables, inputs, begins, before):
    """Outputs and last state of one row, by the formula in float64."""
    params = jax.tree.map(np.float64, variables["params"])
    state, outputs = np.float64(before), []
    for x, anew in zip(np.float64(inputs), begins, strict=True):
        forget = 1 / (1 + np.exp(-(x @ params["forget"]["kernel"] + params["forget"]["bias"])))
        state = forget * (0 if anew else state) + (1 - forget) * (x @ params["input"]["kernel"])
        outputs.append(np.maximum(state, 0))
    return np.array(outputs), state


def test_a_packed_row_equals_a_loop_over_its_sentences_in_float64(unit):
    module, variables = unit
    inputs = vectors(B, T, D)
    outputs, last = jax.jit(module.apply)(variables, inputs, BEGINS)
    for row in range(B):
        expected, state = by_hand(variables, inputs[row], BEGINS[row], np.zeros(D))
        np.testing.assert_allclose(outputs[row], expected, atol=1e-5)
        np.testing.assert_allclose(last[row, 0], state, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1,) * 5, (2, 3)])
def test_steps_of_several_hypotheses_continue_each_from_its_own_state(unit, chunks):
    module, variables = unit
    before, inputs = vectors(B, N, D, seed=2), vectors(B, sum(chunks), N, D, seed=3)
    state, outputs, start = before, [], 0
    for length in chunks:
        part = inputs[:, start : start + length].reshape(B, -1, D)
        found, state = jax.jit(module.apply)(variables, part, before=state)
        outputs.append(found.reshape(B, length, N, D))
        start += length
    for row, own in np.ndindex(B, N):
        expected, last = by_hand(variables, inputs[row, :, own], [False] * sum(chunks), before[row, own])
        np.testing.assert_allclose(np.concatenate(outputs, axis=1)[row, :, own], expected, atol=1e-5)
        np.testing.assert_allclose(state[row, own], last, atol=1e-5)


def test_what_overflows_in_one_sentence_does_not_reach_the_next_one_of_its_row(unit):
    module, variables = unit
    inputs = vectors(B, T, D)
    outputs, _ = jax.jit(module.apply)(variables, inputs, BEGINS)
    inputs[0, 1] = np.nan
    found, _ = jax.jit(module.apply)(variables, inputs, BEGINS)
    assert np.isnan(found[0, 1:4]).all() and np.array_equal(found[0, 4:], outputs[0, 4:])


def test_the_state_of_a_bfloat16_model_is_float32_and_does_not_grow_with_the_sentence():
    config = TransformerConfig.tiny(decoder_autoregression="ssru", dtype="bfloat16")
    sizes = {"batch": B, "hypotheses": N, "source_length": 5}
    short, long = (DecodingState.empty(config, max_length=length, **sizes) for length in (T, 9 * T))
    assert short.target == long.target == ()
    assert [(leaf.shape, str(leaf.dtype)) for leaf in long.recurrent] == [((B, N, 128), "float32")] * 4
    outputs, state = jax.eval_shape(SSRU(D, "bfloat16").init_with_output, jax.random.key(0), jnp.zeros((B, T, D)))[0]
    assert (outputs.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_sentence_that_begins_with_the_first_position_remembers_no_state_before_it(unit):
    module, variables = unit
    inputs, begins = vectors(B, 2, D), np.array([[True, False]] * B)
    alone = jax.jit(module.apply)(variables, inputs, begins)
    after_another = jax.jit(module.apply)(variables, inputs, begins, vectors(B, 1, D, seed=2))
    for one, other in zip(alone, after_another, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
