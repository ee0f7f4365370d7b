"""Takes the parameters of one of our Transformers and leaves the same model in two peers: transformers and CTranslate2.

Ours must be one that both can express: post-norm, `sinusoidal_concatenated` positions, scaled embeddings and an output
bias, as Marian's models are. In CTranslate2 a token's spelling is its id.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import ctranslate2
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from ctranslate2.converters.converter import Converter
from ctranslate2.specs import common_spec
from ctranslate2.specs.transformer_spec import TransformerSpec
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.model import Transformer
from flax_transformer.positions import sinusoidal_positions

REQUIRED = {"norm": "post", "positions": "sinusoidal_concatenated", "scale_embeddings": True, "output_bias": True}


def random_params(
    config: TransformerConfig,
    seed: int,
    *,
    gain: float,
    end_at: float,
    end_slope: float,
    end_bias: float = 0.0,
    follow_source: bool = False,
) -> PyTree:
    """Parameters drawn at random, biases and norms included, but for what makes outputs end.

    Untrained models repeat themselves forever; in this one the logit of the end of sentence rises with the position.

    Args:
        config: the model's.
        seed: of the draws.
        gain: matrices have this over the square root of their inner width as their standard deviation; well above 1,
            the model is sure of itself and says different things of different sources.
        end_at: the position at which that logit passes zero; outputs end near it.
        end_slope: how steeply it rises there; the more, the less their lengths differ.
        end_bias: added to it: a slow rise and a large bias let lengths differ the most.
        follow_source: whether it passes zero later the longer the source is, at `end_at` where the source is as long.
    """
    tokens, rng = jnp.ones((1, 2), jnp.int32), np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(Transformer(config).init, deterministic=True), jax.random.key(0), tokens, tokens)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return rng.normal(float(path[-1].key == "scale"), 0.1, leaf.shape).astype("float32")
        inner = leaf.shape[1] if path[-1].key == "embedding" else leaf.shape[0]
        return rng.normal(0.0, gain * inner**-0.5, leaf.shape).astype("float32")

    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    clock = _slow_coordinates(config, np.pi / 4 / end_at)
    source, target, output = _embeddings(config, params)
    target[:, clock] = output[:, clock] = output[config.eos_id] = 0.0
    # The difference of a sine and its cosine: no mean that a norm takes off changes it.
    output[config.eos_id, clock] = end_slope, -end_slope
    _let_pass(params["decoder"], clock, gain)
    if follow_source:
        # The mean position of a source is half its length, so its clock runs twice as fast.
        source_clock = _slow_coordinates(config, np.pi / 2 / end_at)
        source[:, source_clock] = 0.0
        _let_pass(params["encoder"], source_clock, gain)
        _put_back(_layers(params["decoder"])[0]["cross_attention"], clock, source_clock, config)
    params["output_bias"][config.eos_id] = end_bias
    # A banned token keeps its probability in some engines and loses it in others: here it has none.
    params["output_bias"][config.pad_id] = -1e4
    return jax.tree.map(jnp.asarray, params)


def _slow_coordinates(config: TransformerConfig, radians: float) -> list[int]:
    """Where the positions have the sine that is nearest to so many radians a position, and its cosine."""
    available = 10000.0 ** (-2 * np.arange(config.d_model // 2) / config.d_model)
    sine = int(np.argmin(np.abs(available - radians)))
    return [sine, sine + config.d_model // 2]


def _let_pass(stack: PyTree, clock: list[int], gain: float) -> None:
    """Lets coordinates through a stack: nothing is added to them, and norms give back what they take, about."""
    for layer in _layers(stack):
        for name, part in layer.items():
            if name.endswith("_norm"):
                part["scale"][clock], part["bias"][clock] = (1 + 0.9 * gain**4) ** 0.5, 0.0
            else:
                last = part["outer" if name == "feed_forward" else "out"]
                last["kernel"][:, clock] = last["bias"][clock] = 0.0


def _put_back(attention: PyTree, clock: list[int], source_clock: list[int], config: TransformerConfig) -> None:
    """Takes the mean of the source's clock off the target's: a head that looks at all of the source alike."""
    head = slice(0, config.d_model // config.num_heads)
    attention["query"]["kernel"][:, head] = attention["query"]["bias"][head] = 0.0
    attention["value"]["kernel"][:, 0] = attention["value"]["bias"][0] = attention["out"]["kernel"][0] = 0.0
    attention["value"]["kernel"][source_clock, 0] = 1.0, -1.0
    # So much makes outputs of 6+6 layers as long as their sources; it was tried, as norms give back only about enough.
    attention["out"]["kernel"][0, clock] = -3.0, 3.0


def marian_model(config: TransformerConfig, params: PyTree) -> transformers.MarianMTModel:
    """The model in transformers, float32 and in evaluation mode; ValueError for what Marian cannot express."""
    _check(config)
    model = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=config.source_vocab_size,
            decoder_vocab_size=config.target_vocab_size,
            max_position_embeddings=config.max_length,
            encoder_layers=config.num_encoder_layers,
            decoder_layers=config.num_decoder_layers,
            encoder_ffn_dim=config.d_ff,
            decoder_ffn_dim=config.d_ff,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            activation_function=config.activation,
            d_model=config.d_model,
            scale_embedding=True,
            pad_token_id=config.pad_id,
            eos_token_id=config.eos_id,
            decoder_start_token_id=config.start_id,
            forced_eos_token_id=None,
            share_encoder_decoder_embeddings=config.tie_embeddings == "three_way",
            tie_word_embeddings=config.tie_embeddings != "none",
        )
    )
    state = {name: torch.tensor(np.asarray(array)) for name, array in _marian_state(config, params)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    # transformers works its positions out; whatever else was left over would stay as it was initialised.
    assert not unexpected and all("embed_positions" in name for name in missing), (missing, unexpected)
    return model.eval()


def _marian_state(config: TransformerConfig, params: PyTree) -> Iterator[tuple[str, jax.Array]]:
    source, target, output = _embeddings(config, params)
    if config.tie_embeddings == "three_way":
        yield "model.shared.weight", source
    yield "model.encoder.embed_tokens.weight", source
    yield "model.decoder.embed_tokens.weight", target
    yield "lm_head.weight", output
    yield "final_logits_bias", params["output_bias"][None]
    attentions = {"self_attention": ("self_attn", "self_attn_layer_norm")}
    attentions["cross_attention"] = ("encoder_attn", "encoder_attn_layer_norm")
    for stack in ("encoder", "decoder"):
        for number, layer in enumerate(_layers(params[stack])):
            prefix = f"model.{stack}.layers.{number}"
            for ours, (theirs, norm) in attentions.items():
                if ours in layer:
                    for part in ("query", "key", "value", "out"):
                        name = f"{prefix}.{theirs}.{part if part == 'out' else part[0]}_proj"
                        yield from _torch_linear(name, layer[ours][part])
                    yield from _torch_norm(f"{prefix}.{norm}", layer[f"{ours}_norm"])
            yield from _torch_linear(f"{prefix}.fc1", layer["feed_forward"]["inner"])
            yield from _torch_linear(f"{prefix}.fc2", layer["feed_forward"]["outer"])
            yield from _torch_norm(f"{prefix}.final_layer_norm", layer["feed_forward_norm"])


def _torch_linear(name: str, dense: PyTree) -> Iterator[tuple[str, jax.Array]]:
    yield f"{name}.weight", dense["kernel"].T
    yield f"{name}.bias", dense["bias"]


def _torch_norm(name: str, norm: PyTree) -> Iterator[tuple[str, jax.Array]]:
    yield f"{name}.weight", norm["scale"]
    yield f"{name}.bias", norm["bias"]


class _FromParams(Converter):
    """Fills CTranslate2's description of a Transformer."""

    def __init__(self, config: TransformerConfig, params: PyTree):
        self.config = config
        self.params = params

    def _load(self) -> TransformerSpec:
        config, params = self.config, self.params
        activation = {"relu": "RELU", "gelu": "GELU", "swish": "SWISH"}[config.activation]
        spec = TransformerSpec.from_config(
            (config.num_encoder_layers, config.num_decoder_layers),
            config.num_heads,
            pre_norm=False,
            activation=common_spec.Activation[activation],
        )
        spec.config.layer_norm_epsilon = config.norm_epsilon
        spec.config.bos_token = spec.config.decoder_start_token = str(config.start_id)
        spec.config.unk_token = str(config.pad_id)
        spec.config.eos_token = str(config.eos_id)
        spec.register_source_vocabulary([str(token) for token in range(config.source_vocab_size)])
        spec.register_target_vocabulary([str(token) for token in range(config.target_vocab_size)])

        source, target, output = (np.array(matrix) for matrix in _embeddings(config, params))
        spec.encoder.embeddings[0].weight = source
        spec.decoder.embeddings.weight = target
        spec.decoder.projection.weight = output
        spec.decoder.projection.bias = np.array(params["output_bias"])
        # The table that CTranslate2 makes where none is given starts from position 1, with other wavelengths.
        positions = np.array(sinusoidal_positions(jnp.arange(config.max_length), config.d_model, interleaved=False))
        spec.encoder.position_encodings.encodings = positions
        spec.decoder.position_encodings.encodings = positions
        for theirs, ours in zip(spec.encoder.layer, _layers(params["encoder"]), strict=True):
            _fill_layer(theirs, ours)
        for theirs, ours in zip(spec.decoder.layer, _layers(params["decoder"]), strict=True):
            _fill_layer(theirs, ours)
            query, key, value, out = (ours["cross_attention"][part] for part in ("query", "key", "value", "out"))
            for linear, parts in zip(theirs.attention.linear, ([query], [key, value], [out]), strict=True):
                _fill_linear(linear, parts)
            _fill_norm(theirs.attention.layer_norm, ours["cross_attention_norm"])
        return spec


def _fill_layer(theirs, ours: PyTree) -> None:
    query, key, value, out = (ours["self_attention"][part] for part in ("query", "key", "value", "out"))
    _fill_linear(theirs.self_attention.linear[0], [query, key, value])
    _fill_linear(theirs.self_attention.linear[1], [out])
    _fill_norm(theirs.self_attention.layer_norm, ours["self_attention_norm"])
    _fill_linear(theirs.ffn.linear_0, [ours["feed_forward"]["inner"]])
    _fill_linear(theirs.ffn.linear_1, [ours["feed_forward"]["outer"]])
    _fill_norm(theirs.ffn.layer_norm, ours["feed_forward_norm"])


def _fill_linear(theirs: common_spec.LinearSpec, parts: Iterable[PyTree]) -> None:
    theirs.weight = np.concatenate([np.asarray(part["kernel"]).T for part in parts])
    theirs.bias = np.concatenate([np.asarray(part["bias"]) for part in parts])


def _fill_norm(theirs: common_spec.LayerNormSpec, ours: PyTree) -> None:
    theirs.gamma, theirs.beta = np.array(ours["scale"]), np.array(ours["bias"])


def ctranslate2_model(
    config: TransformerConfig, params: PyTree, directory: str, *, threads: int, device: str = "cpu"
) -> ctranslate2.Translator:
    """The model in CTranslate2, float32 on a CPU, written to a directory that it may delete first.

    Raises:
        ValueError: for what Marian cannot express.
    """
    _check(config)
    _FromParams(config, params).convert(directory, force=True)
    return ctranslate2.Translator(
        directory, device=device, compute_type="float32", inter_threads=1, intra_threads=threads
    )


def spell(rows: Iterable[Sequence[int]]) -> list[list[str]]:
    """Token ids as CTranslate2 reads them here."""
    return [[str(int(token)) for token in row] for row in rows]


def _check(config: TransformerConfig) -> None:
    for name, value in REQUIRED.items():
        if getattr(config, name) != value:
            raise ValueError(f"model.{name} is {getattr(config, name)!r}: the peers have {value!r}")


def _embeddings(config: TransformerConfig, params: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """Source, target and output matrix, each [V, D]."""
    if config.tie_embeddings == "three_way":
        shared = params["shared_embedding"]["embedding"]
        return shared, shared, shared
    source, target = params["source_embedding"]["embedding"], params["target_embedding"]["embedding"]
    return source, target, params["output_kernel"].T if config.tie_embeddings == "none" else target


def _layers(stack: PyTree) -> list[PyTree]:
    return [stack[f"layers_{number}"] for number in range(sum(name.startswith("layers_") for name in stack))]
