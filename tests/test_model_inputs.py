"""Tests that invalid token ids, segments and positions are refused, or give NaN where they cannot be checked."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.model import Transformer
from flax_transformer.positions import LearnedPositions
from flax_transformer.tokens import look_up

V = 7
MODEL = Transformer(
    TransformerConfig(
        source_vocab_size=V, target_vocab_size=V, d_model=8, num_heads=2, d_ff=8, num_encoder_layers=1,
        num_decoder_layers=1,
    )
)  # fmt: skip
TOKENS = jnp.array([[3, 4, 5], [6, 3, 0]])


@pytest.fixture(scope="module")
def variables():
    return jax.jit(partial(MODEL.init, deterministic=True))(jax.random.key(0), TOKENS, TOKENS)


CALLS = {
    "source": lambda model, wrong: model(wrong, TOKENS, deterministic=True),
    "target": lambda model, wrong: model(TOKENS, wrong, deterministic=True),
    "encode": lambda model, wrong: model.encode(wrong, deterministic=True),
    "decode": lambda model, wrong: model.decode(jnp.ones((2, 3, 8)), TOKENS, wrong, deterministic=True),
    "start_decoding": lambda model, wrong: model.start_decoding(wrong, max_length=2),
    "decode_step": lambda model, wrong: model.decode_step(model.start_decoding(TOKENS, max_length=3), wrong),
}


@pytest.mark.parametrize("call", CALLS)
def test_each_call_refuses_an_id_that_the_vocabulary_lacks(variables, call):
    for wrong in (-1, V):
        with pytest.raises(ValueError, match=f"has the token id {wrong}, the vocabulary has 7"):
            tokens = TOKENS.at[1, 1].set(wrong)
            jax.eval_shape(partial(nn.apply(CALLS[call], MODEL), wrong=tokens), variables)


def test_an_invalid_id_inside_jit_makes_only_its_own_sentence_nan(variables):
    @jax.jit
    def logits(source, target):
        return MODEL.apply(variables, source, target, deterministic=True)

    for wrong in (-100, -1, V, 2**30):
        for places in ((0,), (1,), (0, 1)):
            pair = [TOKENS.at[1, 1].set(wrong) if side in places else TOKENS for side in (0, 1)]
            found = logits(*pair)
            assert np.isfinite(found[0]).all() and np.isnan(found[1, -1]).all()


def test_look_up_gives_the_same_rows_and_gradients_as_indexing():
    embedding, table = nn.Embed(V, 4), {"params": {"embedding": jnp.arange(4.0 * V).reshape(V, 4)}}

    def loss(table, vectors_of):
        vectors = vectors_of(table)
        return (vectors**2).sum(), vectors

    ours = jax.grad(loss, has_aux=True)(table, lambda table: nn.apply(look_up, embedding)(table, TOKENS))
    theirs = jax.grad(loss, has_aux=True)(table, lambda table: table["params"]["embedding"][TOKENS])
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_a_negative_learned_position_is_refused_or_nan():
    module, positions = LearnedPositions(5, 4), jnp.array([[0, 1, -1]])
    variables = module.init(jax.random.key(0), positions[:, :2])
    with pytest.raises(ValueError, match="positions has -1: count positions from 0"):
        module.apply(variables, positions)
    vectors = jax.jit(module.apply)(variables, positions)
    assert np.isfinite(vectors[:, :2]).all() and np.isnan(vectors[:, 2]).all()


@pytest.mark.parametrize("name", ["start_id", "eos_id"])
def test_a_token_that_every_output_needs_outside_the_target_vocabulary_is_refused(name):
    model = Transformer(dataclasses.replace(MODEL.config, **{name: V}))
    with pytest.raises(ValueError, match=f"model.{name} is {V}, model.target_vocab_size 7"):
        jax.eval_shape(partial(model.init, deterministic=True), jax.random.key(0), TOKENS, TOKENS)
