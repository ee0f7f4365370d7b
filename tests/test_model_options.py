from functools import cache, partial

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.dropout import Dropout
from flax_transformer.model import Transformer
from flax_transformer.positions import sinusoidal_positions
from flax_transformer.stacks import Encoder

B, S, T, D, V = 2, 5, 7, 16, 31
SMALL = {"d_model": D, "num_heads": 4, "d_ff": 24, "num_encoder_layers": 2, "num_decoder_layers": 2, "max_length": 9}
SOURCE = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]], "int32")
TARGET = np.array([[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 0, 0, 0]], "int32")
UNSEEN = 20  # an id that occurs in neither


def build(**changes):
    """A small model, and random variables: no bias is zero and no scale one, so that a forgotten one shows."""
    config = TransformerConfig(**{**SMALL, "source_vocab_size": V, "target_vocab_size": V, **changes})
    model = Transformer(config)
    shapes = jax.eval_shape(partial(model.init, deterministic=True), jax.random.key(0), SOURCE, TARGET)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return (rng.normal(scale=0.25, size=leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    return model, jax.tree.map_with_path(draw, shapes)


@cache
def jitted(model, **static):
    return jax.jit(partial(model.apply, **static))


def dropout_key(seed):
    """A random key whose bits compile in half the time that the usual kind takes."""
    return jax.random.key(seed, impl="unsafe_rbg")


def logits_of(model, variables):
    return np.asarray(jitted(model, deterministic=True)(variables, SOURCE, TARGET))


def with_leaf(variables, change, *path):
    """The variables with one leaf changed."""
    flat = flax.traverse_util.flatten_dict(variables)
    path = ("params", *path)
    flat[path] = change(np.copy(flat[path]))
    return flax.traverse_util.unflatten_dict(flat)


def double(token, leaf):
    """Doubles what belongs to one id, in a matrix with a row or a column for each id."""
    leaf[token if leaf.shape[1] == D else (slice(None), token)] *= 2
    return leaf


MATRICES = {
    # For each kind of tying: the matrices of the tree, and the path of the one that computes the logits.
    "three_way": ({"shared_embedding"}, ("shared_embedding", "embedding")),
    "decoder": ({"source_embedding", "target_embedding"}, ("target_embedding", "embedding")),
    "none": ({"source_embedding", "target_embedding", "output_kernel"}, ("output_kernel",)),
}


@pytest.mark.parametrize("tie_embeddings", MATRICES)
def test_tying_decides_which_matrices_there_are_and_which_makes_the_logits(tie_embeddings):
    matrices, output = MATRICES[tie_embeddings]
    model, variables = build(
        tie_embeddings=tie_embeddings, source_vocab_size=V if tie_embeddings == "three_way" else 29
    )
    params = variables["params"]
    assert set(params) == {"encoder", "decoder"} | matrices
    before = logits_of(model, variables)
    # Doubling an id's output vector doubles its logit, and changes no other logit if no token has that id.
    after = logits_of(model, with_leaf(variables, partial(double, UNSEEN), *output))
    doubled = np.where(np.arange(V) == UNSEEN, 2 * before, before)
    np.testing.assert_allclose(after, doubled, atol=1e-6)
    for matrix in matrices - {output[0]}:
        assert np.array_equal(
            logits_of(model, with_leaf(variables, partial(double, UNSEEN), matrix, "embedding")), before
        )


@pytest.mark.parametrize("tie_embeddings", MATRICES)
def test_each_language_uses_its_own_matrix_or_the_shared_one(tie_embeddings):
    model, variables = build(tie_embeddings=tie_embeddings)
    three_way = tie_embeddings == "three_way"
    source, target = ("shared_embedding",) * 2 if three_way else ("source_embedding", "target_embedding")
    encode = jitted(model, deterministic=True, method="encode")
    memory, logits = np.asarray(encode(variables, SOURCE)), logits_of(model, variables)

    in_first_source = with_leaf(variables, partial(double, 3), source, "embedding")
    moved = (np.asarray(encode(in_first_source, SOURCE)) != memory).any(-1)
    assert moved[0].all() and not moved[1].any()
    # Token 11 is only the second token of the second target, so it affects the logits of the third and later positions.
    in_second_target = with_leaf(variables, partial(double, 11), target, "embedding")
    assert np.array_equal(encode(in_second_target, SOURCE), memory)
    moved = logits_of(model, in_second_target)[..., UNSEEN] != logits[..., UNSEEN]
    assert moved[1, 2:4].all() and not moved[1, :2].any() and not moved[0].any()


def test_the_output_bias_is_added_to_the_logits_and_is_off_by_default():
    model, variables = build(output_bias=True)
    bias = variables["params"].pop("output_bias")
    plain, same_tree = build()
    assert jax.tree.structure(variables) == jax.tree.structure(same_tree)
    expected = logits_of(plain, variables) + bias
    variables["params"]["output_bias"] = bias
    np.testing.assert_allclose(logits_of(model, variables), expected, atol=1e-5)


def test_embeddings_are_multiplied_by_the_root_of_d_model():
    scaled, variables = build(tie_embeddings="none")
    unscaled, _ = build(tie_embeddings="none", scale_embeddings=False)
    expected = logits_of(scaled, variables)
    assert np.abs(logits_of(unscaled, variables) - expected).max() > 1e-2
    for side in ("source", "target"):
        variables = with_leaf(variables, lambda leaf: leaf * np.float32(D**0.5), f"{side}_embedding", "embedding")
    np.testing.assert_allclose(logits_of(unscaled, variables), expected, atol=1e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "sinusoidal_concatenated", "sinusoidal_tensor2tensor", "learned"])
def test_the_vectors_of_the_config_are_added_to_the_embeddings(positions):
    offset = 2 if positions == "sinusoidal_tensor2tensor" else 0
    model, variables = build(positions=positions, scale_embeddings=False, position_offset=offset)
    encoder, params = Encoder(model.config), variables["params"]["encoder"]
    vectors = {
        "sinusoidal": lambda places: sinusoidal_positions(places, D),
        "sinusoidal_concatenated": lambda places: sinusoidal_positions(places, D, interleaved=False),
        "sinusoidal_tensor2tensor": lambda places: sinusoidal_positions(
            places + offset, D, interleaved=False, endpoint=True
        ),
        "learned": lambda places: params["learned_positions"]["embedding"][places],
    }[positions]
    wanted = np.random.default_rng(3).normal(size=(B, S, D)).astype("float32")

    # Embeddings less the vectors of their positions: if those are what is added, the positions make no difference.
    @jax.jit
    def memory(embeddings, places):
        return encoder.apply({"params": params}, embeddings, places, jnp.zeros((1, 1, 1, 1)), deterministic=True)[0]

    one, other = jnp.array([[0, 1, 2, 3, 4]] * B), jnp.array([[8, 0, 3, 3, 1], [5, 6, 7, 0, 1]])
    first, second = (memory(wanted - vectors(places), places) for places in (one, other))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert np.abs(np.asarray(memory(wanted, one) - memory(wanted, other))).max() > 1e-2


def test_learned_positions_with_an_offset_are_an_error():
    with pytest.raises(ValueError, match="model.position_offset is 2, but learned positions begin at 0: set it to 0"):
        build(positions="learned", position_offset=2)


def test_with_zero_start_the_embedding_of_the_start_has_no_effect():
    learned, variables = build(tie_embeddings="decoder")
    zero, _ = build(tie_embeddings="decoder", zero_start=True)

    def with_start(value):
        def change(table):
            table[learned.config.start_id] = value
            return table

        return with_leaf(variables, change, "target_embedding", "embedding")

    def others(model, variables):  # the start's own logit is the product with its row
        return np.delete(logits_of(model, variables), model.config.start_id, axis=-1)

    np.testing.assert_array_equal(others(zero, with_start(1.0)), others(zero, with_start(-2.0)))
    np.testing.assert_array_equal(others(zero, variables), others(learned, with_start(0.0)))
    assert np.abs(others(zero, variables) - others(learned, variables)).max() > 1e-3


def test_too_few_learned_positions_are_an_error_with_a_remedy_also_under_jit():
    model, variables = build(positions="learned", max_length=T)
    longer = np.ones((B, T + 1), "int32")
    for arrays, options in [
        ((longer, TARGET), {"deterministic": True}),
        ((SOURCE, longer), {"deterministic": True}),
        ((longer,), {"deterministic": True, "method": "encode"}),
        ((SOURCE,), {"max_length": T + 1, "method": "start_decoding"}),
    ]:
        with pytest.raises(ValueError, match="8 positions, but model.max_length is 7: raise it"):
            jax.eval_shape(partial(model.apply, **options), variables, *arrays)
    jax.eval_shape(partial(model.apply, deterministic=True), variables, SOURCE, TARGET)


@pytest.mark.parametrize(("norm", "count"), [("post", 2 * 2 + 2 * 3), ("pre", 2 * 2 + 2 * 3 + 2)])
def test_every_norm_has_the_epsilon_of_the_config(norm, count):
    epsilons = {}

    def note(next_call, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm):
            epsilons[context.module.path] = context.module.epsilon
        return next_call(*args, **kwargs)

    for changes, epsilon in [({}, 1e-5), ({"norm_epsilon": 0.125}, 0.125)]:
        with nn.intercept_methods(note):
            build(norm=norm, **changes)
        assert len(epsilons) == count
        assert set(epsilons.values()) == {epsilon}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropout_applies_to_embeddings_with_positions_and_to_every_sub_layer(norm):
    model, variables = build(norm=norm, dropout_rate=0.25)
    noted = []

    def drop_everything(next_call, args, kwargs, context):
        if not isinstance(context.module, Dropout):
            return next_call(*args, **kwargs)
        if context.module.rate:
            noted.append((context.module.path, context.module.rate, kwargs["deterministic"]))
        return 0 * args[0]

    variables = jax.tree.map_with_path(lambda path, leaf: leaf * (path[-1].key != "bias"), variables)
    with nn.intercept_methods(drop_everything):
        apply = partial(model.apply, deterministic=False, rngs={"dropout": dropout_key(0)})
        logits = jax.jit(apply)(variables, SOURCE, TARGET)
    # If embeddings are dropped and nothing is added later, the norms of zeros are zeros.
    assert (np.asarray(logits) == 0).all()
    calls = [path for path, _, _ in noted]
    assert {(rate, deterministic) for _, rate, deterministic in noted} == {(0.25, False)}
    for stack, sub_layers in [("encoder", 2), ("decoder", 3)]:
        assert calls.count((stack, "dropout")) == 1
        for layer in ("layers_0", "layers_1"):
            assert calls.count((stack, layer, "dropout")) == sub_layers


def test_dropout_is_drawn_from_the_random_key_and_off_where_deterministic():
    shallow = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model, variables = build(dropout_rate=0.25, **shallow)
    apply = jitted(model, deterministic=False)
    first, again, other = (
        np.asarray(apply(variables, SOURCE, TARGET, rngs={"dropout": dropout_key(seed)})) for seed in (0, 0, 1)
    )
    plain, _ = build(dropout_rate=0.0, **shallow)
    assert np.array_equal(first, again)
    assert (np.abs(first - other) > 1e-3).any(-1).all()
    assert np.array_equal(logits_of(model, variables), logits_of(plain, variables))


def test_bfloat16_activations_keep_float32_parameters_and_logits():
    model, variables = build(dtype="bfloat16")
    full, _ = build()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    logits, expected = logits_of(model, variables), logits_of(full, variables)
    assert logits.dtype == np.float32
    # bfloat16 keeps 8 bits: the logits are near, and are not the same.
    difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < difference < 3e-2
    memory = jax.eval_shape(partial(model.apply, deterministic=True, method="encode"), variables, SOURCE)
    assert memory.dtype == jnp.bfloat16
    step_by_step = partial(model.apply, max_length=T, method="start_decoding")
    caches = jax.eval_shape(lambda *arrays: jax.tree.leaves(step_by_step(*arrays).target), variables, SOURCE)
    assert {cache.dtype for cache in caches} == {jnp.dtype("bfloat16")}


def test_remat_computes_each_layer_again_and_changes_no_output_and_no_gradient():
    results = []
    for remat in (False, True):
        model, variables = build(remat=remat, dropout_rate=0.25, num_encoder_layers=1, num_decoder_layers=1)

        def loss(variables, source, target, model=model):
            rngs = {"dropout": dropout_key(0)}
            logits = model.apply(variables, source, target, deterministic=False, rngs=rngs)
            return jnp.sin(logits).sum(), logits

        jaxpr = jax.make_jaxpr(loss)(variables, SOURCE, TARGET).jaxpr
        again = [equation for equation in jaxpr.eqns if equation.primitive.name in ("checkpoint", "remat", "remat2")]
        assert len(again) == (2 if remat else 0)
        results.append((variables, jax.jit(jax.value_and_grad(loss, has_aux=True))(variables, SOURCE, TARGET)))
    (variables, ((_, expected), gradients)), (same_variables, ((_, logits), same_gradients)) = results
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, same_variables))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for gradient, same in zip(jax.tree.leaves(gradients), jax.tree.leaves(same_gradients), strict=True):
        np.testing.assert_allclose(same, gradient, atol=1e-4 * max(1.0, float(np.abs(gradient).max())))


def test_initial_parameters_preserve_unit_variance():
    sizes = {"source_vocab_size": 500, "target_vocab_size": 500, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = Transformer(TransformerConfig.tiny(**sizes))
    variables = jax.jit(partial(model.init, deterministic=True))(jax.random.key(0), SOURCE, TARGET)
    for path, leaf in flax.traverse_util.flatten_dict(variables["params"]).items():
        leaf = np.asarray(leaf)
        if path[-1] == "kernel":
            bound = (6 / sum(leaf.shape)) ** 0.5  # Glorot's uniform distribution
            assert 0.95 * bound < np.abs(leaf).max() <= bound
        elif path[-1] == "embedding":
            np.testing.assert_allclose(leaf.std() * 128**0.5, 1, atol=0.02)
        else:
            assert (leaf == (path[-1] == "scale")).all()
