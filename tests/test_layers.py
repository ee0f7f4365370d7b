import inspect
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.dropout import Dropout
from flax_transformer.layers import DecoderLayer, EncoderLayer, FeedForward, layer_norm
from flax_transformer.masks import causal_mask, padding_mask

B, S, T, D, F = 2, 5, 7, 16, 24
SOURCE_MASK = padding_mask(jnp.arange(S) < jnp.array([[S], [3]]))

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
}


def config(**changes):
    return TransformerConfig(d_model=D, num_heads=4, d_ff=F, **changes)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def scattered(variables):
    """Variables whose biases and scales are not zeros and ones, so that a forgotten one shows."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.normal(scale=0.2, size=leaf.shape).astype("float32"), variables)


def encoder_layer(**changes):
    layer = EncoderLayer(config(**changes))
    inputs = random(B, S, D)
    variables = jax.jit(partial(layer.init, deterministic=True))(jax.random.key(0), inputs, SOURCE_MASK)
    return layer, scattered(variables), inputs


def decoder_layer(**changes):
    layer = DecoderLayer(config(**changes))
    inputs, vectors = random(B, T, D), random(B, S, D, seed=2)

    def init_all(layer):
        return layer(inputs, layer.project_memory(vectors), deterministic=True)

    variables = scattered(jax.jit(nn.init(init_all, layer))(jax.random.key(0)))
    return layer, variables, inputs, layer.apply(variables, vectors, method="project_memory")


def run_decoder_layer(layer, variables, inputs, memory, **options):
    outputs, _, _ = layer.apply(variables, inputs, memory, causal_mask(T), SOURCE_MASK, **options)
    return outputs


DROPPED = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}


@pytest.mark.parametrize("activation", FORMULAS)
def test_feed_forward_is_equation_2_with_its_activation(activation):
    module = FeedForward(D, F, activation)
    inputs = random(B, S, D)
    variables = scattered(jax.jit(partial(module.init, deterministic=True))(jax.random.key(0), inputs))
    inner, outer = (variables["params"][name] for name in ("inner", "outer"))
    hidden = np.float64(inputs) @ inner["kernel"] + inner["bias"]
    expected = np.vectorize(FORMULAS[activation])(hidden) @ outer["kernel"] + outer["bias"]
    np.testing.assert_allclose(module.apply(variables, inputs, deterministic=True), expected, atol=1e-5)


@pytest.mark.parametrize("layer", [EncoderLayer, DecoderLayer])
def test_a_layer_passes_the_config_to_its_feed_forward_network(layer):
    part = layer(config(activation="swish", activation_dropout_rate=0.25)).bind({}).feed_forward
    assert (part.activation, part.dropout_rate, part.d_model, part.d_ff) == ("swish", 0.25, D, F)


def test_activation_dropout_applies_to_the_inner_activations():
    rate = 0.5
    module = FeedForward(D, D, dropout_rate=rate)
    inputs = random(B, S, D)
    variables = scattered(jax.jit(partial(module.init, deterministic=True))(jax.random.key(0), inputs))
    # If the outer map is the identity, the output is the inner activations.
    variables["params"]["outer"] = {"kernel": jnp.eye(D), "bias": jnp.zeros(D)}
    whole = np.asarray(module.apply(variables, inputs, deterministic=True))
    dropped = np.asarray(module.apply(variables, inputs, **DROPPED))
    gone = (dropped == 0) & (whole > 0)
    assert 0.3 < gone.sum() / (whole > 0).sum() < 0.7
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0.0, whole / (1 - rate)), rtol=1e-6)


@pytest.mark.parametrize("norm_epsilon", [1e-5, 0.1])
def test_layer_norm_adds_the_epsilon_of_the_config_to_the_variance(norm_epsilon):
    norm = layer_norm(config(norm_epsilon=norm_epsilon))
    inputs = 0.01 * random(B, S, D)  # its variance is near the smaller epsilon
    variables = norm.init(jax.random.key(0), inputs)
    exact = np.float64(inputs)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + norm_epsilon)
    np.testing.assert_allclose(norm.apply(variables, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_encoder_layer_is_two_sub_layers_each_with_residual_and_norm(norm):
    layer, variables, inputs = encoder_layer(norm=norm)
    outputs, _ = layer.apply(variables, inputs, SOURCE_MASK, deterministic=True)
    part = layer.bind(variables)
    norm_1, norm_2 = part.self_attention_norm, part.feed_forward_norm

    def attend(x):
        return part.self_attention(x, x, SOURCE_MASK, deterministic=True)[0]

    feed_forward = partial(part.feed_forward, deterministic=True)
    if norm == "post":
        between = norm_1(inputs + attend(inputs))
        expected = norm_2(between + feed_forward(between))
    else:
        between = inputs + attend(norm_1(inputs))
        expected = between + feed_forward(norm_2(between))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.parametrize("autoregression", ["self_attention", "ssru"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_decoder_layer_is_three_sub_layers_each_with_residual_and_norm(norm, autoregression):
    layer, variables, inputs, memory = decoder_layer(norm=norm, decoder_autoregression=autoregression)
    outputs = run_decoder_layer(layer, variables, inputs, memory, deterministic=True)
    part = layer.bind(variables)
    recurrent = autoregression == "ssru"
    norm_1 = part.recurrence_norm if recurrent else part.self_attention_norm
    norm_2, norm_3 = part.cross_attention_norm, part.feed_forward_norm

    def look_back(x):
        if recurrent:
            return part.recurrence(x)[0]
        return part.self_attention(x, x, causal_mask(T), deterministic=True)[0]

    def ask_memory(x):
        return part.cross_attention.attend(x, memory, SOURCE_MASK, deterministic=True)[0]

    feed_forward = partial(part.feed_forward, deterministic=True)
    if norm == "post":
        first = norm_1(inputs + look_back(inputs))
        second = norm_2(first + ask_memory(first))
        expected = norm_3(second + feed_forward(second))
    else:
        first = inputs + look_back(norm_1(inputs))
        second = first + ask_memory(norm_2(first))
        expected = second + feed_forward(norm_3(second))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def drop_everything(next_call, args, kwargs, context):
    """Makes each Dropout of the layer return zeros, whatever its rate."""
    return 0 * args[0] if isinstance(context.module, Dropout) else next_call(*args, **kwargs)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropout_comes_before_the_residual_and_the_norm(norm):
    # If all of Sublayer(x) is dropped, x remains: LayerNorm(x) with the paper's norm, x itself with the other.
    layer, variables, inputs = encoder_layer(norm=norm)
    part = layer.bind(variables)
    norms = (part.self_attention_norm, part.feed_forward_norm)
    expected = norms[1](norms[0](inputs)) if norm == "post" else inputs
    with nn.intercept_methods(drop_everything):
        outputs, _ = layer.apply(variables, inputs, SOURCE_MASK, deterministic=True)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)

    layer, variables, inputs, memory = decoder_layer(norm=norm)
    part = layer.bind(variables)
    norms = (part.self_attention_norm, part.cross_attention_norm, part.feed_forward_norm)
    expected = norms[2](norms[1](norms[0](inputs))) if norm == "post" else inputs
    with nn.intercept_methods(drop_everything):
        outputs = run_decoder_layer(layer, variables, inputs, memory, deterministic=True)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


def constant_sub_layers(variables, *last_maps):
    """Variables with which each sub-layer, whatever it is given, returns ones."""
    params = variables["params"]
    for sub_layer, last_map in last_maps:
        shapes = params[sub_layer][last_map]
        params[sub_layer][last_map] = {"kernel": 0 * shapes["kernel"], "bias": 1 + 0 * shapes["bias"]}
    return variables


def test_each_sub_layer_drops_different_values_and_scales_the_others():
    # In pre-norm the outputs less the inputs are the sum of what the sub-layers gave after dropout: 0 or 2 each.
    layer, variables, inputs = encoder_layer(norm="pre", dropout_rate=0.5)
    variables = constant_sub_layers(variables, ("self_attention", "out"), ("feed_forward", "outer"))
    outputs, _ = layer.apply(variables, inputs, SOURCE_MASK, **DROPPED)
    given = np.round(np.asarray(outputs - inputs), 4)
    assert set(given.ravel()) == {0, 2, 4}
    assert 1.5 < given.mean() < 2.5

    layer, variables, inputs, memory = decoder_layer(norm="pre", dropout_rate=0.5)
    last_maps = ("self_attention", "out"), ("cross_attention", "out"), ("feed_forward", "outer")
    outputs = run_decoder_layer(layer, constant_sub_layers(variables, *last_maps), inputs, memory, **DROPPED)
    given = np.round(np.asarray(outputs - inputs), 4)
    assert set(given.ravel()) == {0, 2, 4, 6}
    assert 2.5 < given.mean() < 3.5


@pytest.mark.parametrize("rate", ["attention_dropout_rate", "activation_dropout_rate"])
def test_attention_and_activation_dropout_are_off_by_default_and_on_when_set(rate):
    layer, variables, inputs = encoder_layer(dropout_rate=0.0)
    whole, _ = layer.apply(variables, inputs, SOURCE_MASK, deterministic=True)
    same, _ = layer.apply(variables, inputs, SOURCE_MASK, **DROPPED)
    assert np.array_equal(whole, same)
    layer, _, _ = encoder_layer(**{"dropout_rate": 0.0, rate: 0.5})
    other, _ = layer.apply(variables, inputs, SOURCE_MASK, **DROPPED)
    assert (np.abs(np.asarray(other) - whole) > 1e-3).any(-1).all()
    again, _ = layer.apply(variables, inputs, SOURCE_MASK, deterministic=True)
    assert np.array_equal(whole, again)


def test_a_cache_adds_the_next_positions():
    layer, variables, inputs, memory = decoder_layer()
    whole = run_decoder_layer(layer, variables, inputs, memory, deterministic=True)
    _, seen, _ = layer.apply(variables, inputs, memory, deterministic=True)
    cache = jax.tree.map(jnp.zeros_like, seen)
    parts = []
    for start, stop in [(0, 3), (3, 4), (4, T)]:
        outputs, cache, _ = layer.apply(
            variables,
            inputs[:, start:stop],
            memory,
            causal_mask(T)[..., start:stop, :],
            SOURCE_MASK,
            deterministic=True,
            cache=cache,
            write_at=jnp.array(start),
        )
        parts.append(outputs)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_what_a_caller_of_a_layer_forgets_is_an_error_that_names_the_mend():
    layer, variables, inputs, memory = decoder_layer()
    apply = partial(layer.apply, variables, inputs, deterministic=True)
    with pytest.raises(ValueError, match=r"memory is an array: give layer\.project_memory\(memory\)"):
        inspect.unwrap(DecoderLayer.__call__)(layer, inputs, inputs, deterministic=True)
    with pytest.raises(ValueError, match="needs a cache of keys and values, and write_at"):
        apply(memory, cache=memory)
    layer, variables, inputs, memory = decoder_layer(decoder_autoregression="ssru")
    with pytest.raises(ValueError, match="a recurrent unit has a state"):
        layer.apply(variables, inputs, memory, deterministic=True, cache=memory)
    with pytest.raises(ValueError, match="activation is 'tanh': give the name of one of relu, gelu"):
        FeedForward(D, F, "tanh").init(jax.random.key(0), inputs, deterministic=True)
