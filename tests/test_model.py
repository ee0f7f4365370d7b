from functools import cache, partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens

B, S, T, D, H, V = 2, 5, 7, 16, 4, 31
SMALL = {"d_model": D, "num_heads": H, "d_ff": 24, "num_encoder_layers": 2, "num_decoder_layers": 2, "max_length": 16}
SOURCE = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]], "int32")
TARGET = np.array([[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 0, 0, 0]], "int32")
FULL_TARGET = np.where(TARGET == 0, 14, TARGET)


@cache
def build(source_vocab_size=V, **changes):
    """A small model, and random variables: no bias is zero and no scale one, so that a forgotten one shows."""
    config = TransformerConfig(source_vocab_size=source_vocab_size, target_vocab_size=V, **{**SMALL, **changes})
    model = Transformer(config)
    shapes = jax.eval_shape(partial(model.init, deterministic=True), jax.random.key(0), SOURCE, TARGET)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return (rng.normal(scale=0.25, size=leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    return model, jax.tree.map_with_path(draw, shapes)


@cache
def jitted(model, method="__call__", **static):
    return jax.jit(partial(model.apply, method=method, **static))


def logits_of(model, variables, source=SOURCE, target=TARGET):
    return np.asarray(jitted(model, deterministic=True)(variables, source, target))


def changed(ids, where):
    """The token ids with others at `where`."""
    return np.where(where, (ids + 11) % V, ids).astype("int32")


def tokens_of(ids, real):
    """One sentence in each row, whose tokens are those that are `real`."""
    return Tokens(ids, np.int32(real), np.tile(np.arange(ids.shape[1], dtype="int32"), (len(ids), 1)))


OPTIONS = [
    {},
    {"norm": "pre", "positions": "learned", "activation": "gelu"},
    {"decoder_autoregression": "ssru", "zero_start": True},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["paper", "pre-norm, learned", "recurrent"])


@every_option
def test_a_changed_target_token_changes_later_logits_and_no_earlier_one_by_a_bit(options):
    model, variables = build(**options)
    before = logits_of(model, variables, target=FULL_TARGET)
    for position in range(T):
        after = logits_of(model, variables, target=changed(FULL_TARGET, np.arange(T) == position))
        assert np.array_equal(after[:, : position + 1], before[:, : position + 1])
        assert (after[:, position + 1 :] != before[:, position + 1 :]).any(-1).all()


@every_option
def test_the_content_of_padding_changes_nothing_by_a_bit(options):
    model, variables = build(**options)
    source, target = (tokens_of(ids, ids != 0) for ids in (SOURCE, TARGET))
    before = logits_of(model, variables, source, target)
    not_given = logits_of(model, variables)  # ids alone have these segments and positions
    np.testing.assert_allclose(before[TARGET != 0], not_given[TARGET != 0], atol=1e-5)
    after = logits_of(
        model,
        variables,
        source.replace(ids=changed(SOURCE, SOURCE == 0)),
        target.replace(ids=changed(TARGET, TARGET == 0)),
    )
    assert np.array_equal(after[TARGET != 0], before[TARGET != 0])
    source_moved = logits_of(model, variables, source.replace(ids=changed(SOURCE, SOURCE != 0)), target)
    assert (source_moved[TARGET != 0] != before[TARGET != 0]).any(-1).all()


PAIRS = [([3, 4, 5], [6, 7]), ([8, 9], [10, 11, 12, 13]), ([14], [15]), ([16, 17, 18, 19], [20, 21, 22]), ([23], [24])]


def packed(rows, width):
    """Each row's sentences one after another, with their segments and positions."""
    tokens, segments, positions = np.zeros((3, len(rows), width), "int32")
    for row, sentences in enumerate(rows):
        start = 0
        for segment, sentence in enumerate(sentences, 1):
            place = slice(start, start + len(sentence))
            tokens[row, place], segments[row, place], positions[row, place] = sentence, segment, range(len(sentence))
            start += len(sentence)
    return Tokens(tokens, segments, positions)


def packed_batch():
    """The pairs in two rows: three in the first, two in the second."""
    rows = PAIRS[:3], PAIRS[3:]
    source = packed([[pair[0] for pair in row] for row in rows], 8)
    target = packed([[pair[1] for pair in row] for row in rows], 9)
    return source, target


@every_option
def test_packed_sentences_have_the_same_logits_as_alone(options):
    model, variables = build(**options)
    source, target = packed_batch()
    together = logits_of(model, variables, source, target)
    alone_source, alone_target = (packed([[pair[side]] for pair in PAIRS], 5).ids for side in (0, 1))
    alone = logits_of(model, variables, alone_source, alone_target)
    for index, (_, sentence) in enumerate(PAIRS):
        row, segment = (0, index + 1) if index < 3 else (1, index - 2)
        there = together[row][target.segments[row] == segment]
        np.testing.assert_allclose(there, alone[index, : len(sentence)], atol=1e-5)


@every_option
def test_another_segment_changes_nothing_by_a_bit(options):
    model, variables = build(**options)
    sides = packed_batch()
    before = logits_of(model, variables, *sides)
    for segment in (1, 2, 3):
        others = [~np.isin(side.segments, [0, segment]) for side in sides]
        moved = [side.replace(ids=changed(side.ids, where)) for side, where in zip(sides, others, strict=True)]
        after = logits_of(model, variables, *moved)
        same = sides[1].segments == segment
        assert np.array_equal(after[same], before[same])
        assert (after[others[1]] != before[others[1]]).any(-1).all()


@pytest.mark.parametrize(
    ("options", "hypotheses", "chunks"),
    [
        (OPTIONS[0], 1, (1,) * T),
        (OPTIONS[0], 3, (2, 5)),
        (OPTIONS[1], 1, (3, 4)),
        (OPTIONS[1], 3, (1,) * T),
        (OPTIONS[2], 3, (1, 1, 3, 2)),
    ],
)
def test_step_by_step_logits_equal_those_of_one_pass(options, hypotheses, chunks):
    model, variables = build(**options)
    # Each hypothesis is a different translation of its sentence; the second sentence has padding.
    targets = np.random.default_rng(2).integers(3, V, (B * hypotheses, T), "int32")
    expected = logits_of(model, variables, np.repeat(SOURCE, hypotheses, axis=0), targets)

    start = jitted(model, "start_decoding", max_length=T, hypotheses=hypotheses)
    state = start(variables, SOURCE)
    tokens = np.concatenate([np.full((B * hypotheses, 1), model.config.start_id, "int32"), targets[:, :-1]], axis=1)
    for stop, length in zip(np.cumsum(chunks), chunks, strict=True):
        state, logits = jitted(model, "decode_step")(variables, state, tokens[:, stop - length : stop])
        np.testing.assert_allclose(logits, expected[:, stop - length : stop], atol=1e-5)
    assert np.array_equal(state.position, [T] * B)


@every_option
@pytest.mark.parametrize("chunks", [(1,) * T, (2, 1, 3, 1)])
def test_a_hypothesis_that_follows_another_continues_with_its_past(options, chunks):
    model, variables = build(**options)
    hypotheses, rng = 3, np.random.default_rng(3)
    state = jitted(model, "start_decoding", max_length=T, hypotheses=hypotheses)(variables, SOURCE)
    said = np.zeros((B, hypotheses, 0), "int32")
    for step, length in enumerate(chunks):
        tokens = rng.integers(3, V, (B, hypotheses, length), "int32")
        if step == 0:
            tokens[:, :, 0] = model.config.start_id
        said = np.concatenate([said, tokens], axis=2)
        state, logits = jitted(model, "decode_step")(variables, state, tokens.reshape(-1, length))
        begun = np.concatenate([said[:, :, 1:], np.full((B, hypotheses, T + 1 - said.shape[2]), 3)], axis=2)
        afresh = logits_of(
            model, variables, np.repeat(SOURCE, hypotheses, axis=0), begun.reshape(-1, T).astype("int32")
        )
        stop = said.shape[2]
        np.testing.assert_allclose(logits, afresh[:, stop - length : stop], atol=1e-5)
        # Some are followed by several, some by none; each sentence has its own parents, and new ones each time.
        parents = np.array([[2, 0, 2], [1, 1, 0]], "int32") if step % 2 else rng.integers(0, 3, (B, 3), "int32")
        state = state.follow(jnp.asarray(parents))
        said = np.take_along_axis(said, parents[..., None], axis=1)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 2)])
def test_a_step_past_the_end_of_the_cache_gives_nan(chunks):
    model, variables = build()
    state = jitted(model, "start_decoding", max_length=3)(variables, SOURCE)
    for length in chunks:
        state, logits = jitted(model, "decode_step")(variables, state, np.full((B, length), 3, "int32"))
        assert np.isnan(logits).all() if state.position[0] > 3 else np.isfinite(logits).all()


def test_encode_decode_and_logits_compose_to_a_call():
    model, variables = build()
    encode, decode = (jitted(model, method, deterministic=True) for method in ("encode", "decode"))
    for source, target in ((SOURCE, TARGET), packed_batch()):
        memory = encode(variables, source)
        hidden = decode(variables, memory, source, target)
        logits = jitted(model, "logits")(variables, hidden)
        ids = [side.ids if isinstance(side, Tokens) else side for side in (source, target)]
        assert memory.shape == (*ids[0].shape, D) and hidden.shape == (*ids[1].shape, D)
        np.testing.assert_allclose(logits, logits_of(model, variables, source, target), atol=1e-5)


def test_the_decoder_starts_from_the_start_id_of_the_config():
    model, variables = build()
    other, _ = build(start_id=4)
    swapped = jax.tree.map(np.copy, variables)
    table = variables["params"]["shared_embedding"]["embedding"]
    # If ids 1 and 4 are exchanged in the model, its input and its output, nothing else changes.
    swapped["params"]["shared_embedding"]["embedding"] = table[np.array([0, 4, 2, 3, 1, *range(5, V)])]
    tokens = 5 + np.arange(S, dtype="int32")[None]
    logits = logits_of(other, swapped, tokens, tokens)
    expected = logits_of(model, variables, tokens, tokens)
    assert np.abs(logits_of(other, variables, tokens, tokens) - expected).max() > 1e-3
    np.testing.assert_allclose(logits[..., 5:], expected[..., 5:], atol=1e-5)


def test_the_parameter_tree_has_the_documented_names():
    _, variables = build()
    affine, norm = ("kernel", "bias"), ("scale", "bias")
    projections = [f"{name}/{leaf}" for name in ("query", "key", "value", "out") for leaf in affine]
    expected = {"shared_embedding/embedding"}
    for stack, attentions in [("encoder", ["self"]), ("decoder", ["self", "cross"])]:
        for layer in (f"{stack}/layers_0", f"{stack}/layers_1"):
            for attention in (f"{layer}/{name}_attention" for name in attentions):
                expected |= {f"{attention}/{name}" for name in projections}
                expected |= {f"{attention}_norm/{leaf}" for leaf in norm}
            expected |= {f"{layer}/feed_forward/{name}/{leaf}" for name in ("inner", "outer") for leaf in affine}
            expected |= {f"{layer}/feed_forward_norm/{leaf}" for leaf in norm}
    assert set(variables) == {"params"}
    assert set(flax.traverse_util.flatten_dict(variables["params"], sep="/")) == expected
    _, variables = build(norm="pre", positions="learned", output_bias=True, dtype="bfloat16")
    for stack in ("encoder", "decoder"):
        expected |= {f"{stack}/norm/{leaf}" for leaf in norm} | {f"{stack}/learned_positions/embedding"}
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    assert set(flat) == expected | {"output_bias"}
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype("float32")}

    _, variables = build(decoder_autoregression="ssru")
    found = set(flax.traverse_util.flatten_dict(variables["params"]["decoder"]["layers_1"], sep="/"))
    paper = {name.removeprefix("decoder/layers_1/") for name in expected if name.startswith("decoder/layers_1/")}
    assert paper - found == {name for name in paper if name.startswith("self_attention")}
    unit = {"input/kernel", "forget/kernel", "forget/bias"}
    assert found - paper == {f"recurrence/{name}" for name in unit} | {f"recurrence_norm/{leaf}" for leaf in norm}


def test_each_layer_returns_weights_whose_rows_sum_to_one_or_to_zero_for_padding():
    model, variables = build()
    logits, weights = jitted(model, deterministic=True, return_weights=True)(variables, SOURCE, TARGET)
    np.testing.assert_allclose(logits, logits_of(model, variables), atol=1e-5)
    for layers, queries, memory in [
        (weights.encoder, SOURCE, SOURCE),
        (weights.decoder, TARGET, TARGET),
        (weights.cross, TARGET, SOURCE),
    ]:
        assert len(layers) == 2
        for layer in map(np.asarray, layers):
            assert layer.shape == (B, H, queries.shape[1], memory.shape[1])
            there = np.broadcast_to((queries != 0)[:, None], layer.shape[:3])
            np.testing.assert_allclose(layer.sum(-1), there, atol=1e-6)
            assert (layer.swapaxes(1, 3)[memory == 0] == 0).all()
    for layer in weights.decoder:
        assert np.array_equal(layer, np.tril(layer))
    model, variables = build(decoder_autoregression="ssru")
    _, weights = jax.eval_shape(
        partial(model.apply, deterministic=True, return_weights=True), variables, SOURCE, TARGET
    )
    assert weights.decoder == () and len(weights.encoder) == len(weights.cross) == 2


@pytest.mark.parametrize("shapes", [[(S,), (B, T)], [(B, S), (B + 1, T)]])
def test_a_wrong_shape_is_an_error(shapes):
    model, variables = build()
    source, target = (np.ones(shape, "int32") for shape in shapes)
    with pytest.raises(jaxtyping.TypeCheckError, match="source|target"):
        jax.eval_shape(partial(model.apply, deterministic=True), variables, source, target)


def test_a_vocabulary_size_that_is_not_set_is_an_error():
    model = Transformer(TransformerConfig(**SMALL))
    with pytest.raises(ValueError, match="model.source_vocab_size is 0, model.target_vocab_size 0: set both"):
        model.init(jax.random.key(0), SOURCE, TARGET, deterministic=True)


def test_padding_in_front_gives_the_same_logits_as_behind():
    model, variables = build()
    source, target = SOURCE.copy(), TARGET.copy()
    source[:, 3:] = target[:, 5:] = model.config.pad_id
    behind = logits_of(model, variables, source, target)
    in_front = logits_of(model, variables, np.roll(source, 2, axis=1), np.roll(target, 1, axis=1))
    np.testing.assert_allclose(in_front[:, 1 : 1 + 5], behind[:, :5], atol=1e-5)
    start = jitted(model, "start_decoding", max_length=T)
    first = np.full((B, 1), model.config.start_id, "int32")
    _, logits = jitted(model, "decode_step")(variables, start(variables, np.roll(source, 2, axis=1)), first)
    np.testing.assert_allclose(logits[:, 0], behind[:, 0], atol=1e-5)


def test_a_step_with_too_few_rows_is_an_error_that_says_how_many():
    model, variables = build()
    state = jitted(model, "start_decoding", max_length=T, hypotheses=3)(variables, SOURCE)
    with pytest.raises(ValueError, match=rf"tokens have {B} rows, the state has {B} sentences with 3 .*\[{3 * B}, Q\]"):
        jitted(model, "decode_step")(variables, state, np.full((B, 1), 3, "int32"))


def test_padding_that_is_no_token_is_an_error():
    model = Transformer(TransformerConfig(**SMALL, source_vocab_size=V, target_vocab_size=V, pad_id=V))
    with pytest.raises(ValueError, match=f"model.pad_id is {V}, .* padding is a token of both vocabularies"):
        model.init(jax.random.key(0), SOURCE, TARGET, deterministic=True)


def test_padding_may_go_beyond_the_learned_positions_where_decoding_starts():
    model, variables = build(positions="learned")  # 16 positions
    wide = np.concatenate([SOURCE, np.zeros((B, 20), "int32")], axis=1)
    start = jitted(model, "start_decoding", max_length=T)
    states = [start(variables, source) for source in (SOURCE, wide)]
    first = np.full((B, 1), model.config.start_id, "int32")
    one, other = (jitted(model, "decode_step")(variables, state, first)[1] for state in states)
    np.testing.assert_allclose(one, other, atol=1e-5)
