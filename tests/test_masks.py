"""Tests that masks have 0 and -inf where they should, and that masks of other conventions are refused."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.masks import (
    ancestor_mask,
    causal_mask,
    check_mask,
    combine_masks,
    count_seen,
    padding_mask,
    segment_mask,
)

VALID = jnp.array([[True, True, True, True, True], [True, True, False, False, False]])
QUERY_SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 0]])
MEMORY_SEGMENTS = jnp.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]])

# Of 2 sentences, for each of 3 hypotheses, who wrote what it has at each of 5 positions.
ANCESTORS = jnp.array(
    [[[0, 1, 1, 0, 0], [0, 2, 1, 1, 1], [0, 1, 2, 2, 2]], [[2, 0, 0, 0, 0], [2, 1, 1, 1, 1], [2] * 5]]
)

MASKS = {
    "causal": (lambda: causal_mask(7), (1, 1, 7, 7)),
    "padding": (lambda: padding_mask(VALID), (2, 1, 1, 5)),
    "ancestors": (lambda: ancestor_mask(ANCESTORS, 2, jnp.array([3, 3]), jnp.array(3)), (2, 1, 6, 15)),
    "segments": (lambda: segment_mask(QUERY_SEGMENTS, MEMORY_SEGMENTS), (2, 1, 7, 5)),
    "combined": (
        lambda: combine_masks(padding_mask(VALID), segment_mask(QUERY_SEGMENTS, MEMORY_SEGMENTS)),
        (2, 1, 7, 5),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_four_dimensional_float32_of_exactly_zero_and_minus_infinity(name):
    make, shape = MASKS[name]
    mask = make()
    assert mask.shape == shape
    assert mask.dtype == jnp.float32
    assert set(np.unique(mask)) == {0.0, -np.inf}


def test_a_position_sees_itself_and_the_past():
    mask = causal_mask(7)[0, 0]
    for query in range(7):
        for key in range(7):
            assert (mask[query, key] == 0) == (key <= query)


def test_padding_masks_hide_only_padding():
    assert jnp.array_equal(padding_mask(VALID)[:, 0, 0] == 0, VALID)


def test_a_segment_sees_only_itself_and_padding_neither_sees_nor_is_seen():
    visible = segment_mask(QUERY_SEGMENTS, MEMORY_SEGMENTS)[:, 0] == 0
    for row, queries in enumerate(QUERY_SEGMENTS.tolist()):
        for query, segment in enumerate(queries):
            expected = [segment == other and segment != 0 for other in MEMORY_SEGMENTS[row].tolist()]
            assert visible[row, query].tolist() == expected


def test_a_segment_mask_with_one_segment_equals_the_padding_mask():
    segments = VALID.astype(jnp.int32)
    seen_by_tokens = segment_mask(jnp.ones_like(segments), segments)
    assert jnp.array_equal(seen_by_tokens, jnp.broadcast_to(padding_mask(VALID), seen_by_tokens.shape))


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 5), (2, 1), (2, 3), (4, 1)])
def test_a_hypothesis_sees_what_its_ancestors_wrote_up_to_its_own_position(start, length):
    batch, hypotheses, room = ANCESTORS.shape
    mask = ancestor_mask(ANCESTORS, length, jnp.full(batch, start), jnp.array(start))
    # Both sides are ordered by position, then by hypothesis.
    visible = np.asarray(mask == 0).reshape(batch, length, hypotheses, room, hypotheses)
    for sentence, query, hypothesis, position, writer in np.ndindex(visible.shape):
        own = position <= start + query and writer == ANCESTORS[sentence, hypothesis, position]
        assert visible[sentence, query, hypothesis, position, writer] == own


def test_the_only_hypothesis_of_a_sentence_sees_its_whole_past():
    alone = ancestor_mask(jnp.zeros((1, 1, 7), jnp.int32), 3, jnp.array([2]), jnp.array(2))
    assert jnp.array_equal(alone, causal_mask(7)[:, :, 2:5])


def test_in_the_ring_a_sentence_sees_as_many_of_the_last_places_as_it_has_tokens():
    """Three sentences, which began 0, 2 and 6 steps before a query that is written to place 1 of 7."""
    position = jnp.array([0, 2, 6])
    mask = ancestor_mask(jnp.zeros((3, 1, 7), jnp.int32), 1, position, jnp.array(1))
    assert [set(np.flatnonzero(row == 0).tolist()) for row in mask[:, 0, 0]] == [{1}, {6, 0, 1}, set(range(7))]


def test_combined_masks_allow_only_what_all_of_them_allow():
    segments = segment_mask(MEMORY_SEGMENTS, MEMORY_SEGMENTS)
    combined = combine_masks(causal_mask(5), segments, padding_mask(VALID))
    expected = (causal_mask(5) == 0) & (segments == 0) & (padding_mask(VALID) == 0)
    assert jnp.array_equal(combined == 0, expected)


def test_combining_ignores_none():
    assert jnp.array_equal(combine_masks(None, causal_mask(3), None), causal_mask(3))
    assert combine_masks(None, None) is None
    assert combine_masks() is None


WRONG = [
    (jnp.ones((2, 1, 7, 7), bool), "mask is boolean: give 0 and -inf"),
    (jnp.ones((2, 1, 7, 7), jnp.int32), "mask is int32: give 0 and -inf"),
    (np.zeros((2, 1, 7, 7), "int8"), "mask is int8: give 0 and -inf"),
    (jnp.zeros((2, 7, 7)), r"mask has shape \(2, 7, 7\): give it four dimensions"),
    (nn.make_causal_mask(jnp.ones((2, 7))), r"mask holds 1\.0: give 0 where"),
    (np.asarray(nn.make_causal_mask(jnp.ones((2, 7)))), r"mask holds 1\.0: give 0 where"),
    (jnp.where(causal_mask(7) == 0, 0.0, -1e9), "mask holds -1000000000.0: give 0 where"),
    (jnp.where(causal_mask(7) == 0, 0.0, jnp.finfo("bfloat16").min).astype("bfloat16"), "mask holds -3.38"),
    (causal_mask(7).at[0, 0, 6, 2].set(jnp.nan), "mask holds nan"),
    (causal_mask(7) - 0.5 * jnp.abs(jnp.arange(7) - jnp.arange(7)[:, None]), r"mask holds -0\.5"),
]


@pytest.mark.parametrize(("mask", "message"), WRONG)
def test_a_mask_of_another_convention_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(combine_masks)(causal_mask(7), mask)


@pytest.mark.parametrize("mask", [causal_mask(7), np.asarray(causal_mask(7)), causal_mask(7).astype("bfloat16")])
def test_additive_masks_of_any_origin_are_accepted(mask):
    check_mask(mask)
    # If a traced function closes over it, its values can be checked outside the program.
    assert not jax.make_jaxpr(lambda: check_mask(mask))().eqns


@pytest.mark.parametrize("length", [1, 40])
def test_count_seen_counts_zeros_and_gives_nan_for_other_values(length):
    no = -jnp.inf
    rows = jnp.array([[0, no], [no, no], [0, 0], [1, no], [no, 1], [-1e9, 0], [0, -1e9], [-1e9, no], [jnp.nan, 0]])
    rows = jnp.repeat(rows, length, axis=1)[:, None, None]
    expected = [length, 0, 2 * length] + [np.nan] * 6
    for function in (count_seen, jax.jit(count_seen)):
        np.testing.assert_array_equal(function(rows)[:, 0, 0, 0], expected)


NOT_VALIDITY = {
    "lengths": jnp.array([3, 2]),
    "integers": jnp.ones((2, 5), jnp.int32),
    "floats": jnp.ones((2, 5)),
    "one row": jnp.ones(5, bool),
    "three dimensions": np.ones((2, 5, 1), bool),
}


@pytest.mark.parametrize("name", NOT_VALIDITY)
def test_validity_must_be_boolean_with_two_dimensions(name):
    with pytest.raises(ValueError, match="give booleans .* true where there is a token"):
        inspect.unwrap(padding_mask)(NOT_VALIDITY[name])


@pytest.mark.parametrize("segments", [VALID, VALID.astype("float32"), jnp.array([3, 2])])
def test_segments_must_be_integers_with_two_dimensions(segments):
    for pair in ((segments, MEMORY_SEGMENTS), (QUERY_SEGMENTS, segments)):
        with pytest.raises(ValueError, match="_segments are .*: give one integer for each position, 0 for padding"):
            inspect.unwrap(segment_mask)(*pair)
