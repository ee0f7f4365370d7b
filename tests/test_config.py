import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.model import Transformer


@pytest.mark.parametrize(
    ("preset", "layers", "d_model", "d_ff", "num_heads", "dropout_rate"),
    [
        # The rows "base" and "big" of the paper's table 3.
        (TransformerConfig.base, 6, 512, 2048, 8, 0.1),
        (TransformerConfig.big, 6, 1024, 4096, 16, 0.3),
        (TransformerConfig.tiny, 4, 128, 256, 4, 0.1),
        # The Kannada-English tutorial: five layers, an inner width of three times 512.
        (TransformerConfig.five_layer, 5, 512, 1536, 8, 0.1),
    ],
)
def test_presets(preset, layers, d_model, d_ff, num_heads, dropout_rate):
    config = preset()
    assert (config.num_encoder_layers, config.num_decoder_layers) == (layers, layers)
    assert (config.d_model, config.d_ff, config.num_heads) == (d_model, d_ff, num_heads)
    assert config.dropout_rate == dropout_rate
    assert preset(norm="pre", d_ff=7) == dataclasses.replace(config, norm="pre", d_ff=7)


def test_the_defaults_are_the_papers_choices():
    config = TransformerConfig()
    assert config == TransformerConfig.base()
    assert (config.norm, config.activation, config.positions) == ("post", "relu", "sinusoidal")
    assert (config.scale_embeddings, config.tie_embeddings, config.output_bias) == (True, "three_way", False)
    assert (config.attention_dropout_rate, config.activation_dropout_rate) == (0.0, 0.0)
    assert config.norm_epsilon == 1e-5
    assert (config.dtype, config.attention_implementation) == ("float32", "auto")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("decoder_autoregression", "self_attention, ssru"),
        ("norm", "post, pre"),
        ("activation", "relu, gelu, quick_gelu, swish"),
        ("positions", "sinusoidal, sinusoidal_concatenated, sinusoidal_tensor2tensor, learned"),
        ("tie_embeddings", "three_way, decoder, none"),
        ("dtype", "float32, bfloat16, float16"),
        ("attention_implementation", "auto, xla, cudnn"),
    ],
)
def test_an_unknown_choice_is_an_error_that_lists_the_choices(name, choices):
    with pytest.raises(ValueError, match=f"model.{name} is 'sideways': choose one of {choices}"):
        TransformerConfig(**{name: "sideways"})


@pytest.mark.parametrize(
    "name", ["d_model", "num_heads", "d_ff", "num_encoder_layers", "num_decoder_layers", "max_length"]
)
def test_a_size_is_at_least_one(name):
    with pytest.raises(ValueError, match=f"model.{name} is 0: it must be at least 1"):
        TransformerConfig(**{name: 0})


@pytest.mark.parametrize("name", ["dropout_rate", "attention_dropout_rate", "activation_dropout_rate"])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_dropout_rate_is_at_least_zero_and_below_one(name, rate):
    with pytest.raises(ValueError, match=f"model.{name} is {rate}: it must be at least 0 and below 1"):
        TransformerConfig(**{name: rate})
    assert getattr(TransformerConfig(**{name: 0.0}), name) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 18, "num_heads": 4}, "model.d_model is 18, which model.num_heads = 4 does not divide"),
        ({"eos_id": 5, "banned_ids": (4, 5)}, "model.banned_ids has model.eos_id = 5: no sentence could end"),
        ({"d_model": 9, "num_heads": 3}, "model.d_model is 9: sinusoidal positions need an even one"),
        (
            {"source_vocab_size": 29, "target_vocab_size": 31},
            'source_vocab_size is 29 and model.target_vocab_size 31: .* model.tie_embeddings to "decoder" or "none"',
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)


def test_settings_that_fit_together_are_accepted():
    assert TransformerConfig(d_model=9, num_heads=3, positions="learned").d_model == 9
    two_sided = TransformerConfig(source_vocab_size=29, target_vocab_size=31, tie_embeddings="decoder")
    assert (two_sided.source_vocab_size, two_sided.target_vocab_size) == (29, 31)


def test_a_config_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().d_model = 16
    assert hash(TransformerConfig()) == hash(TransformerConfig())


def test_from_mapping_fills_in_the_defaults():
    changes = {"d_model": 64, "norm": "pre"}
    assert from_mapping(TransformerConfig, changes, "model") == TransformerConfig(**changes)


@pytest.mark.parametrize(
    ("key", "near"), [("d_modle", "d_model"), ("num_head", "num_heads"), ("tied_embeddings", "tie_embeddings")]
)
def test_from_mapping_names_the_nearest_setting(key, near):
    with pytest.raises(ValueError, match=rf"model.{key} is not a setting: did you mean model.{near}\?"):
        from_mapping(TransformerConfig, {key: 1}, "model")


def test_from_mapping_lists_the_settings_if_none_is_near():
    with pytest.raises(ValueError, match="model.xyz is not a setting: it has source_vocab_size, .*, remat"):
        from_mapping(TransformerConfig, {"xyz": 1}, "model")


@pytest.mark.parametrize("size", ["base", "big"])
def test_the_number_of_parameters_equals_the_hand_calculation(size):
    config = getattr(TransformerConfig, size)(source_vocab_size=37000, target_vocab_size=37000)
    tokens = jnp.zeros((1, 1), jnp.int32)
    model = Transformer(config)
    tree = jax.eval_shape(lambda rng: model.init(rng, tokens, tokens, deterministic=True), jax.random.key(0))
    counted = sum(leaf.size for leaf in jax.tree.leaves(tree))

    d_model, d_ff = {"base": (512, 2048), "big": (1024, 4096)}[size]
    attention = 4 * (d_model * d_model + d_model)  # query, key, value, out; each a kernel and a bias
    feed_forward = (d_model * d_ff + d_ff) + (d_ff * d_model + d_model)
    norm = d_model + d_model  # scale and bias
    encoder_layer = attention + feed_forward + 2 * norm
    decoder_layer = 2 * attention + feed_forward + 3 * norm
    embedding = 37000 * d_model  # one matrix for source, target and output
    assert counted == embedding + 6 * encoder_layer + 6 * decoder_layer
    # The same on paper: 18,944,000 + 6 * 3,152,384 + 6 * 4,204,032 and 37,888,000 + 6 * 12,596,224 + 6 * 16,796,672.
    assert counted == {"base": 63_082_496, "big": 214_245_376}[size]


def unchecked(**settings):
    """A config as a user makes it, without the type checks of tests, which would raise before its own errors."""
    config = object.__new__(TransformerConfig)
    inspect.unwrap(TransformerConfig.__init__)(config, **settings)
    return config


def test_numbers_and_types_of_numpy_and_jax_become_python_ones():
    config = unchecked(
        d_model=np.int64(8), num_heads=np.uint8(2), dropout_rate=np.float32(0.5), norm=np.str_("pre"),
        attention_dropout_rate=0, scale_embeddings=np.bool_(False), banned_ids=np.array([3, 4]),
        dtype=jnp.dtype("bfloat16"),
    )  # fmt: skip
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_mapping(TransformerConfig, settings, "model") == config
    assert (config.d_model, config.scale_embeddings, config.banned_ids, config.dtype) == (8, False, (3, 4), "bfloat16")
    assert {type(value) for value in vars(config).values()} == {int, float, bool, str, tuple}
