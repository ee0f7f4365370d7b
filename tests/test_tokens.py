"""Tests of `Tokens`: its defaults, the shift to the right, and what is refused."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from flax_transformer.tokens import Tokens, check_tokens, look_up

B, S, V = 2, 5, 31
IDS = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]], "int32")


@pytest.mark.parametrize(("pad_id", "positions"), [(0, [[0, 1, 2, 3, 4]] * B), (3, [[0, 0, 1, 2, 3]])])
def test_ids_alone_are_one_sentence_in_each_row(pad_id, positions):
    tokens = Tokens.from_ids(IDS, pad_id)
    assert np.array_equal(tokens.ids, IDS)
    assert np.array_equal(tokens.segments, IDS != pad_id)
    assert tokens.positions.tolist()[: len(positions)] == positions
    assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(tokens))


def test_rows_without_places_have_no_positions():
    assert Tokens.from_ids(np.zeros((2, 0), "int32"), 0).positions.shape == (2, 0)


def test_positions_start_again_with_each_segment():
    segments = np.array([[1, 1, 2, 2, 2], [1, 2, 3, 3, 0]], "int32")
    tokens = Tokens.from_segments(IDS, segments)
    assert tokens.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]


def test_a_row_with_one_segment_has_the_positions_of_ids_alone():
    segments = np.ones((1, S), "int32")
    assert Tokens.from_segments(IDS[:1], segments).positions.tolist() == [[0, 1, 2, 3, 4]]


def test_ids_are_shifted_right_within_each_sentence():
    positions = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]], "int32")
    tokens = Tokens(IDS, np.ones_like(IDS), positions)
    shifted = tokens.shift_right(1)
    assert shifted.ids.tolist() == [[1, 3, 4, 1, 6], [1, 8, 9, 1, 1]]
    assert np.array_equal(shifted.positions, positions) and np.array_equal(shifted.segments, tokens.segments)


@pytest.mark.parametrize("field", ["ids", "segments", "positions"])
def test_arrays_of_different_shapes_are_an_error(field):
    arrays = {name: np.ones((B, S + (name == field)), "int32") for name in ("ids", "segments", "positions")}
    with pytest.raises(jaxtyping.TypeCheckError):
        Tokens(**arrays)


@pytest.mark.parametrize(
    ("field", "wrong"), [("segments", (B, S + 1)), ("positions", (B, S, 1)), ("segments", None), ("positions", None)]
)
def test_segments_and_positions_must_be_one_integer_for_each_token(field, wrong):
    """Without the checks of types and shapes that tests have, as in a program of a user."""
    array = np.ones((B, S), "float32") if wrong is None else np.ones(wrong, "int32")
    tokens = Tokens.from_ids(IDS, 0)
    object.__setattr__(tokens, field, array)
    with pytest.raises(ValueError, match=rf"source\.{field} is .* one integer for each token"):
        check_tokens("source", tokens, V)


@pytest.mark.parametrize("wrong", [-1, V, V + 7])
@pytest.mark.parametrize("side", [IDS, Tokens.from_ids(IDS, 0)], ids=["ids", "tokens"])
def test_a_known_id_outside_the_vocabulary_is_an_error(side, wrong):
    check_tokens("target", side, V)
    ids = IDS.copy()
    ids[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"target has the token id {wrong}, the vocabulary has {V}"):
        check_tokens("target", side.replace(ids=ids) if isinstance(side, Tokens) else ids, V)


@pytest.mark.parametrize(
    "ids", [np.ones(S, "int32"), np.ones((B, S), "float32"), np.ones((B, S), bool), np.ones((B, S, 1), "int32")]
)
def test_ids_of_another_shape_or_type_are_an_error(ids):
    with pytest.raises(ValueError, match=rf"source is {ids.dtype} of shape .* give token ids, integers \[B, S\]"):
        check_tokens("source", ids, V)


@pytest.mark.parametrize("ids", [jax.numpy.asarray(IDS), IDS.astype("uint8"), IDS[:, :0]], ids=["jax", "uint8", "none"])
def test_ids_of_any_integer_type_and_of_none_are_accepted(ids):
    check_tokens("source", ids, V)


def test_ids_that_are_traced_or_on_another_process_are_not_checked():
    jax.jit(lambda ids: check_tokens("source", ids, 2))(IDS)
    check_tokens("source", SimpleNamespace(dtype=IDS.dtype, ndim=2, is_fully_addressable=False), 2)


def test_an_id_outside_the_table_becomes_nan():
    embedding = nn.Embed(V, 4)
    ids = jnp.array([[0, V - 1, V, -1]])
    variables = embedding.init(jax.random.key(0), ids)
    vectors = embedding.apply(variables, ids, method=look_up)
    assert jnp.isnan(vectors).all(-1).tolist() == [[False, False, True, True]]
