import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.attention import KVCache, MultiHeadAttention, dot_product_attention
from flax_transformer.masks import causal_mask, combine_masks, padding_mask, segment_mask

B, Q, M, H, K = 2, 5, 7, 3, 4
SEGMENTS = jnp.array([[1, 1, 2, 2, 2], [1, 2, 3, 3, 3]]), jnp.array([[1, 1, 1, 2, 2, 2, 0], [3, 2, 1, 1, 3, 3, 3]])
MASKS = {
    "none": None,
    "causal": causal_mask(M)[..., :Q, :],
    "padding": padding_mask(jnp.arange(M) < jnp.array([[M], [3]])),
    "segments": segment_mask(*SEGMENTS),
    "each head its own": jnp.where(jnp.arange(M) < jnp.arange(1, H + 1)[:, None, None], 0.0, -jnp.inf)[None],
}
# Sees nothing: row 0's query 1, and every query of row 1.
BLIND = segment_mask(jnp.array([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), jnp.array([[1] * M, [0] * M]))


def random_inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, length, H, K)), dtype) for length in (Q, M, M))


def test_minus_infinity_before_the_softmax_leaves_rows_that_sum_to_one_and_zeros_after_it_do_not():
    mask = np.asarray(MASKS["causal"])
    weights = np.asarray(dot_product_attention(*random_inputs(), MASKS["causal"], return_weights=True)[1])
    unmasked = np.asarray(dot_product_attention(*random_inputs(), return_weights=True)[1])
    zeroed = np.where(mask == 0, unmasked, 0.0)

    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (zeroed.sum(-1) < 0.999).all()
    # Zeros after the softmax lack the division by the remaining sum.
    np.testing.assert_allclose(weights, zeroed / zeroed.sum(-1, keepdims=True), atol=1e-6)
    assert (np.where(mask == 0, 0.0, weights) == 0).all()


@pytest.mark.parametrize("name", MASKS)
def test_attention_equals_jax_with_ordinary_masks(name):
    mask = MASKS[name]
    seen = None if mask is None else mask == 0
    np.testing.assert_allclose(
        dot_product_attention(*random_inputs(), mask),
        jax.nn.dot_product_attention(*random_inputs(), mask=seen),
        atol=1e-6,
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_that_sees_nothing_gives_zeros_and_passes_back_zero_gradients(dtype, jit):
    inputs = random_inputs(dtype)
    directions = np.random.default_rng(1).normal(size=(B, Q, H, K)).astype("float32")

    def gathered_and_loss(inputs, directions):
        gathered, weights = dot_product_attention(*inputs, BLIND, return_weights=True)
        return (gathered * directions).sum(), (gathered, weights)

    value_and_grad = jax.value_and_grad(gathered_and_loss, has_aux=True)
    value_and_grad = jax.jit(value_and_grad) if jit else value_and_grad
    (_, outputs), gradients = jax.device_get(value_and_grad(inputs, directions))
    (gathered, weights), (query_grad, key_grad, value_grad) = outputs, gradients
    blind = ~(np.asarray(BLIND) == 0).any(-1)[:, 0]

    for array in (*outputs, *gradients):
        assert np.isfinite(array).all()
    assert (gathered[blind] == 0).all()
    assert (weights.swapaxes(1, 2)[blind] == 0).all()
    assert (query_grad[blind] == 0).all()
    assert (key_grad[1] == 0).all() and (value_grad[1] == 0).all()
    # The outputs and gradients of the other queries are as if this query did not exist.
    for array in (gathered[~blind], query_grad[~blind], key_grad[0], value_grad[0]):
        assert (array != 0).all()
    _, without = value_and_grad(inputs, np.where(blind[..., None, None], np.float32(0), directions))
    for gradient, expected in zip(gradients, without, strict=True):
        assert np.array_equal(gradient, expected)


def test_the_softmax_is_float32_under_bfloat16():
    half = random_inputs("bfloat16")
    gathered, weights = dot_product_attention(*half, MASKS["causal"], return_weights=True)
    full = [array.astype(jnp.float32) for array in half]
    _, expected = dot_product_attention(*full, MASKS["causal"], return_weights=True)
    assert gathered.dtype == jnp.bfloat16
    assert weights.dtype == jnp.float32
    # 1 / sqrt(4) loses nothing in bfloat16, so the logits are the same, and a bfloat16 softmax would be 1e-3 off.
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_dropout_on_the_weights_keeps_their_expected_value():
    rate, draws = 0.25, 400
    query, key, _ = random_inputs()
    # With M unit vectors as memory, the output equals the weights.
    units = jnp.asarray(np.broadcast_to(np.eye(M)[:, None], (B, M, H, M)), "float32")
    wider = [jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, M - K))) for array in (query, key)]

    def kept(rng):
        return dot_product_attention(*wider, units, dropout_rate=rate, dropout_rng=rng, return_weights=True)

    draw, weights = jax.device_get(jax.jit(jax.vmap(kept))(jax.random.split(jax.random.key(2), draws)))
    draw, weights = draw.swapaxes(2, 3), weights[0]
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)  # they come before dropout
    np.testing.assert_allclose(draw, np.where(draw == 0, 0.0, weights / (1 - rate)), atol=1e-6)
    standard_error = weights * (rate / (1 - rate) / draws) ** 0.5
    assert (np.abs(draw.mean(0) - weights) < 5 * standard_error).all()


def test_without_a_random_key_nothing_is_dropped():
    dropped = dot_product_attention(*random_inputs(), dropout_rate=0.9)
    assert np.array_equal(dropped, dot_product_attention(*random_inputs()))


def test_a_mask_of_three_dimensions_is_an_error():
    # In tests the shape check raises first; without it a user sees this error.
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5, 7\): give it four dimensions"):
        inspect.unwrap(dot_product_attention)(*random_inputs(), jnp.zeros((B, Q, M)))


def test_writing_to_a_cache_replaces_only_the_given_positions():
    _, key, value = random_inputs()  # [B, M, H, K]

    def lie(key, value):
        return KVCache(key=key.transpose(0, 2, 3, 1), value=value.transpose(0, 2, 1, 3))

    written = jax.jit(KVCache.write)(lie(key, value), jnp.array(3), lie(1 + key[:, :2], 2 + value[:, :2]))
    expected = lie(key.at[:, 3:5].set(1 + key[:, :2]), value.at[:, 3:5].set(2 + value[:, :2]))
    assert np.array_equal(written.key, expected.key) and np.array_equal(written.value, expected.value)


def multi_head_attention(dropout_rate=0.0):
    module = MultiHeadAttention(d_model=H * K, num_heads=H, dropout_rate=dropout_rate)
    rng = np.random.default_rng(3)
    inputs, memory = (jnp.asarray(rng.normal(size=(B, length, H * K)), "float32") for length in (Q, M))
    variables = jax.jit(partial(module.init, deterministic=True))(jax.random.key(4), inputs, memory)
    # Biases start at zero, so a forgotten one would not show.
    variables = jax.tree.map(lambda leaf: leaf + rng.normal(scale=0.3, size=leaf.shape).astype("float32"), variables)
    return module, variables, inputs, memory


def test_each_head_uses_its_own_part_of_the_projections():
    module, variables, inputs, memory = multi_head_attention()
    mask = MASKS["segments"]
    outputs, weights = module.apply(variables, inputs, memory, mask, deterministic=True, return_weights=True)
    params = {
        name: (np.float64(layer["kernel"]), np.float64(layer["bias"])) for name, layer in variables["params"].items()
    }

    def project(name, array):
        kernel, bias = params[name]
        return np.float64(array) @ kernel + bias

    query, key, value = project("query", inputs), project("key", memory), project("value", memory)
    gathered = np.zeros((B, Q, H * K))
    for head in range(H):
        part = slice(head * K, (head + 1) * K)
        logits = query[..., part] @ key[..., part].swapaxes(1, 2) / np.sqrt(K) + np.asarray(mask)[:, 0]
        exponentials = np.exp(logits)
        expected = exponentials / exponentials.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights[:, head], expected, atol=1e-6)
        gathered[..., part] = expected @ value[..., part]
    np.testing.assert_allclose(outputs, project("out", gathered), atol=1e-5)


def test_a_projected_memory_gives_the_same_result_as_the_memory():
    module, variables, inputs, memory = multi_head_attention()
    projected = module.apply(variables, memory, method="project_memory")
    attended, _ = module.apply(variables, inputs, projected, deterministic=True, method="attend")
    outputs, weights = module.apply(variables, inputs, memory, deterministic=True)
    assert np.array_equal(attended, outputs)
    assert weights is None


def test_the_module_drops_weights_only_if_not_deterministic():
    module, variables, inputs, memory = multi_head_attention(dropout_rate=0.5)
    whole, _ = module.apply(variables, inputs, memory, deterministic=True)
    dropped, _ = module.apply(variables, inputs, memory, deterministic=False, rngs={"dropout": jax.random.key(7)})
    assert (np.abs(np.asarray(dropped) - whole) > 1e-3).any(-1).all()
    never, variables, inputs, memory = multi_head_attention()
    assert np.array_equal(never.apply(variables, inputs, memory, deterministic=False)[0], whole)


def test_a_combined_mask_hides_everything_from_padding():
    padded = combine_masks(causal_mask(Q), padding_mask(jnp.zeros((B, Q), bool)))
    query, key, value = random_inputs()
    gathered = dot_product_attention(query, key[:, :Q], value[:, :Q], padded)
    assert (np.asarray(gathered) == 0).all()


def test_a_boolean_mask_is_an_error_that_says_what_to_give():
    inputs = jnp.ones((B, Q, 2, 4))
    visible = jnp.ones((1, 1, Q, Q), bool)
    with pytest.raises(ValueError, match="mask is boolean: give 0 and -inf"):
        inspect.unwrap(dot_product_attention)(inputs, inputs, inputs, visible)


@pytest.mark.parametrize("shape", [(3, 1, 1, M), (B, H + 1, Q, M), (B, 1, M, Q), (B, Q, H, M)])
def test_a_mask_that_does_not_broadcast_is_an_error(shape):
    with pytest.raises(ValueError, match=r"which does not broadcast to \[B, H, Q, M\], here \(2, 3, 5, 7\)"):
        inspect.unwrap(dot_product_attention)(*random_inputs(), jnp.zeros(shape))


def test_the_result_has_the_query_s_type_and_arrays_of_numpy_need_no_warning():
    query, key, value = random_inputs()
    mixed = dot_product_attention(query.astype("bfloat16"), key, value)
    assert mixed.dtype == jnp.bfloat16
    wide = (np.float64(array) for array in (query, key, value))
    assert np.array_equal(inspect.unwrap(dot_product_attention)(*wide), dot_product_attention(query, key, value))


@pytest.mark.parametrize("which", range(3))
def test_integers_are_an_error_and_are_not_averaged_to_zero(which):
    inputs = list(random_inputs())
    inputs[which] = jnp.ones_like(inputs[which], dtype="int32")
    with pytest.raises(ValueError, match=r"query, key and value are .*int32.*: convert them to floats"):
        inspect.unwrap(dot_product_attention)(*inputs)


def test_inputs_of_another_width_than_the_module_s_are_an_error():
    module = MultiHeadAttention(d_model=4, num_heads=2)
    with pytest.raises(ValueError, match=r"inputs have shape \(2, 5, 8\), and d_model is 4"):
        module.init(jax.random.key(0), jnp.ones((B, Q, 8)), jnp.ones((B, M, 8)), deterministic=True)
