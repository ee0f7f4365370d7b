"""Takes lengths, validity and segments and leaves a verdict: masks hold 0 and -inf where they should."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.masks import ancestor_mask, causal_mask, combine_masks, padding_mask, segment_mask

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
    "ancestors": (lambda: ancestor_mask(ANCESTORS, 2, 3), (2, 1, 6, 15)),
    "segments": (lambda: segment_mask(QUERY_SEGMENTS, MEMORY_SEGMENTS), (2, 1, 7, 5)),
    "combined": (
        lambda: combine_masks(padding_mask(VALID), segment_mask(QUERY_SEGMENTS, MEMORY_SEGMENTS)),
        (2, 1, 7, 5),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_float32_of_four_dimensions_and_holds_exactly_zero_and_minus_infinity(name):
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


def test_padding_is_hidden_and_nothing_else_is():
    assert jnp.array_equal(padding_mask(VALID)[:, 0, 0] == 0, VALID)


def test_a_segment_sees_itself_and_padding_neither_sees_nor_is_seen():
    visible = segment_mask(QUERY_SEGMENTS, MEMORY_SEGMENTS)[:, 0] == 0
    for row, queries in enumerate(QUERY_SEGMENTS.tolist()):
        for query, segment in enumerate(queries):
            expected = [segment == other and segment != 0 for other in MEMORY_SEGMENTS[row].tolist()]
            assert visible[row, query].tolist() == expected


def test_one_segment_for_every_token_that_is_not_padding_is_the_padding_mask():
    segments = VALID.astype(jnp.int32)
    seen_by_tokens = segment_mask(jnp.ones_like(segments), segments)
    assert jnp.array_equal(seen_by_tokens, jnp.broadcast_to(padding_mask(VALID), seen_by_tokens.shape))


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 5), (2, 1), (2, 3), (4, 1)])
def test_a_hypothesis_sees_at_each_position_up_to_its_own_what_its_ancestor_wrote_there(start, length):
    batch, hypotheses, room = ANCESTORS.shape
    mask = ancestor_mask(ANCESTORS, length, jnp.array(start))
    # Both sides are ordered by position, then by hypothesis.
    visible = np.asarray(mask == 0).reshape(batch, length, hypotheses, room, hypotheses)
    for sentence, query, hypothesis, position, writer in np.ndindex(visible.shape):
        own = position <= start + query and writer == ANCESTORS[sentence, hypothesis, position]
        assert visible[sentence, query, hypothesis, position, writer] == own


def test_the_only_hypothesis_of_a_sentence_sees_its_whole_past():
    alone = ancestor_mask(jnp.zeros((1, 1, 7), jnp.int32), 3, 2)
    assert jnp.array_equal(alone, causal_mask(7)[:, :, 2:5])


def test_combined_masks_allow_what_all_of_them_allow():
    segments = segment_mask(MEMORY_SEGMENTS, MEMORY_SEGMENTS)
    combined = combine_masks(causal_mask(5), segments, padding_mask(VALID))
    expected = (causal_mask(5) == 0) & (segments == 0) & (padding_mask(VALID) == 0)
    assert jnp.array_equal(combined == 0, expected)


def test_combining_passes_over_none():
    assert jnp.array_equal(combine_masks(None, causal_mask(3), None), causal_mask(3))
    assert combine_masks(None, None) is None
    assert combine_masks() is None
