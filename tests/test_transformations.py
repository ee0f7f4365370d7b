"""Tests that jax transforms the public modules in every way that it transforms flax's own."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import flax_transformer
from flax_transformer import MultiHeadAttention, Transformer, TransformerConfig, causal_mask, dot_product_attention
from flax_transformer.recurrence import SSRU

B, S, D, V = 4, 3, 8, 11
CONFIG = TransformerConfig(
    source_vocab_size=V, target_vocab_size=V, d_model=D, num_heads=2, d_ff=10, num_encoder_layers=1,
    num_decoder_layers=1, activation="gelu",
)  # fmt: skip
VECTORS = jax.random.normal(jax.random.key(0), (B, S, D))
TOKENS = jax.random.randint(jax.random.key(1), (B, S), 3, V).at[1, 2].set(0)


def stepwise(model, variables, tokens):
    """The logits after the first token, as a search gets them."""
    state = model.apply(variables, tokens, max_length=2, method="start_decoding")
    return model.apply(variables, state, tokens[:, :1], method="decode_step")[1]


def attend(module, variables, inputs):
    return module.apply(variables, inputs, inputs, causal_mask(S), deterministic=True)[0]


def attend_by_hand(module, variables, inputs):
    query = module.apply(variables, inputs).reshape(*inputs.shape[:2], 2, -1)
    return dot_product_attention(query, query, query, causal_mask(S))


def recur(module, variables, inputs):
    """The outputs for whole rows, each of two sentences, and those for the same vectors as a continuation."""
    begins = jnp.broadcast_to(jnp.arange(S) % 2 == 0, inputs.shape[:2])
    outputs, state = module.apply(variables, inputs, begins)
    return jnp.concatenate([outputs, module.apply(variables, inputs, before=state)[0]], axis=1)


def translate(model, variables, tokens):
    return model.apply(variables, tokens, tokens, deterministic=True)


MODEL, REMAT, RECURRENT = (
    Transformer(TransformerConfig(**{**vars(CONFIG), **changes}))
    for changes in ({}, {"remat": True}, {"decoder_autoregression": "ssru", "remat": True})
)
# The module, its inputs, those it begins with, and what is differentiated.
CASES = {
    "dot_product_attention": (nn.Dense(D), (VECTORS,), attend_by_hand),
    "MultiHeadAttention": (MultiHeadAttention(d_model=D, num_heads=2), (VECTORS, VECTORS), attend),
    "SSRU": (SSRU(d_model=D), (VECTORS,), recur),
    "Transformer": (MODEL, (TOKENS, TOKENS), translate),
    "Transformer, layers computed again": (REMAT, (TOKENS, TOKENS), translate),
    "Transformer, step by step": (MODEL, (TOKENS, TOKENS), stepwise),
    "recurrent Transformer": (RECURRENT, (TOKENS, TOKENS), translate),
    "recurrent Transformer, step by step": (RECURRENT, (TOKENS, TOKENS), stepwise),
}


def test_every_public_module_is_tested():
    public = {name: getattr(flax_transformer, name) for name in flax_transformer.__all__}
    modules = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert modules <= set(CASES)


FURTHER = set(list(CASES)[4:])  # left to `make test-slow`


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in FURTHER else name for name in CASES], scope="module"
)
def case(request):
    """A loss of parameters and inputs, parameters, a direction for them, and the inputs; all outputs as a function."""
    module, inputs, call = CASES[request.param]
    options = {} if isinstance(module, nn.Dense | SSRU) else {"deterministic": True}
    variables = jax.jit(partial(module.init, **options))(jax.random.key(3), *inputs)
    leaves, structure = jax.tree.flatten(variables)
    rngs = jax.random.split(jax.random.key(4), len(leaves))
    noise = [jax.random.normal(rng, leaf.shape) for rng, leaf in zip(rngs, leaves, strict=True)]
    # Biases begin at zero.
    variables = jax.tree.unflatten(structure, [leaf + 0.1 * add for leaf, add in zip(leaves, noise, strict=True)])

    def outputs(variables, inputs):
        return call(module, variables, inputs)

    def loss(variables, inputs):
        return jnp.mean(outputs(variables, inputs) ** 2)

    return outputs, loss, variables, jax.tree.unflatten(structure, noise), inputs[0]


def close(found, expected):
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-5)


def test_forward_mode_linearizing_and_the_gradient_agree(case):
    _, loss, variables, direction, inputs = case

    @jax.jit
    def in_each_way(variables, direction):
        def at(variables):
            return loss(variables, inputs)

        gradient = jax.grad(at)(variables)
        dots = jax.tree.map(jnp.vdot, gradient, direction)
        _, linear = jax.linearize(at, variables)
        again = jax.grad(jax.checkpoint(at))(variables)
        forward = jax.jvp(at, (variables,), (direction,))[1]
        return forward, linear(direction), jax.tree.reduce(jnp.add, dots), gradient, again

    forward, linear, reverse, gradient, again = in_each_way(variables, direction)
    assert abs(forward) > 1e-4
    close([forward, linear], [reverse, reverse])
    close(again, gradient)


@pytest.mark.parametrize(
    "case", [*list(CASES)[:3], pytest.param(list(CASES)[3], marks=pytest.mark.slow)], indirect=True, scope="module"
)
def test_the_hessian_is_symmetric_and_equals_the_gradient_of_the_gradient(case):
    _, loss, variables, direction, inputs = case

    def along(steps):
        """The loss after some steps in this direction and in another one."""
        moved = jax.tree.map(lambda leaf, to: leaf + steps[0] * to + steps[1] * jnp.sin(9 * to), variables, direction)
        return loss(moved, inputs)

    ways = jax.hessian(along), jax.jacrev(jax.grad(along))
    hessian, reverse = jax.jit(lambda steps: [way(steps) for way in ways])(jnp.zeros(2))
    assert np.abs(hessian).min() > 1e-5
    close([hessian, hessian], [hessian.T, reverse])


@pytest.mark.parametrize("case", list(CASES)[:4], indirect=True, scope="module")
def test_vmap_over_examples_equals_the_batch(case):
    outputs, _, variables, _, inputs = case
    mapped = jax.jit(jax.vmap(outputs, (None, 0)))(variables, inputs[:, None])[:, 0]
    close(mapped, jax.jit(outputs)(variables, inputs))


@pytest.mark.parametrize("case", list(CASES)[:4], indirect=True, scope="module")
def test_gradients_inside_shard_map_with_default_checks_equal_those_of_the_whole(case):
    _, loss, variables, _, inputs = case
    mesh = jax.make_mesh((B,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:B])
    whole, rows = PartitionSpec(), PartitionSpec("rows")

    def of_own_rows(variables, inputs):
        value, gradient = jax.value_and_grad(loss)(variables, inputs)
        # The variables are the same on all devices, so their gradient is already summed.
        return jax.lax.pmean(value, "rows"), jax.tree.map(lambda leaf: leaf / B, gradient)

    sharded = jax.shard_map(of_own_rows, mesh=mesh, in_specs=(whole, rows), out_specs=(whole, whole))
    found = jax.jit(sharded)(variables, inputs)
    close(found, jax.jit(jax.value_and_grad(loss))(variables, inputs))
