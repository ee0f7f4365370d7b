"""Converts the options of a model in Marian's own format (`special:model.yml` in its file) to our config, and back.

An option that is missing has Marian's default.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.fields import KnownFields, read_flag, read_number, shown
from flax_transformer.interop.marian_items import SETTINGS
from flax_transformer.interop.yaml_text import read_yaml

# Marian's name for quick_gelu is gelu: until version 1.12 that was the only one, and CTranslate2 reads it so, too.
ACTIVATIONS = {"relu": "relu", "swish": "swish", "gelu": "quick_gelu"}
# transformer-preprocess, -postprocess and -postprocess-top; d, which is dropout, may stand anywhere.
NORMS = {"post": ("", "an", ""), "pre": ("n", "a", "n")}
NORM_OPTIONS = ("transformer-preprocess", "transformer-postprocess", "transformer-postprocess-top")
NORM_EPSILON = 1e-6
MAX_LENGTH = 512  # Marian's positions have no end; longer sentences are split
OPTIONS = KnownFields(
    fixed={
        "type": "transformer",
        "factors-dim-emb": 0,
        "input-types": [],
        "lemma-dependency": "",
        "lemma-dim-emb": 0,
        "right-left": False,
        "special-vocab": [],
        "transformer-decoder-ffn-depth": 2,
        "transformer-ffn-depth": 2,
        "transformer-no-affine": False,
        "transformer-no-bias": False,
        "transformer-no-projection": False,
        "transformer-pool": False,
        "transformer-postprocess-emb": "",
        "transformer-rnn-projection": False,
        "transformer-tied-layers": [],
        "transformer-train-position-embeddings": False,
        "transformer-train-positions": False,
        "ulr": False,
    },
    read={
        *NORM_OPTIONS,
        "dec-cell",
        "dec-depth",
        "dim-emb",
        "dim-vocabs",
        "enc-depth",
        "output-omit-bias",
        "tied-embeddings",
        "tied-embeddings-all",
        "tied-embeddings-src",
        "transformer-decoder-autoreg",
        "transformer-decoder-dim-ffn",
        "transformer-dim-ffn",
        "transformer-ffn-activation",
        "transformer-heads",
    },
    without_effect={
        # Of other kinds of models than Transformers.
        "bert-train-type-embeddings",
        "bert-type-vocab-size",
        "dec-cell-base-depth",
        "dec-cell-high-depth",
        "dim-rnn",
        "enc-cell",
        "enc-cell-depth",
        "enc-type",
        "layer-normalization",
        "skip",
        "ulr-dim-emb",
        "ulr-trainable-transformation",
        # Of average attention, which transformer-decoder-autoreg would ask for.
        "transformer-aan-activation",
        "transformer-aan-depth",
        "transformer-aan-nogate",
        "transformer-dim-aan",
        # Of training, of factors, which these vocabularies do not have, and of a faster search.
        "factors-combine",
        "output-approx-knn",
        "transformer-depth-scaling",
        "transformer-guided-alignment-layer",
        "version",
    },
)


def read_options(settings: bytes, place: object) -> TransformerConfig:
    """Makes our config from the text of `special:model.yml`, except for the ids of special tokens.

    Args:
        settings: the text.
        place: the file in which it stands, for errors.

    Raises:
        ValueError: the text is no YAML, or an option is unknown or asks for what our models do not compute; names it.
    """
    place = f"{SETTINGS} of {place}"
    options = read_yaml(settings, place)
    if not isinstance(options, dict):
        raise ValueError(f"{place} has no options: download the file again")
    options = {name: _typed(value) for name, value in options.items()}
    for name in (*NORM_OPTIONS, "transformer-postprocess-emb"):
        default = "dan" if name == "transformer-postprocess" else ""
        options[name] = str(options.get(name, default)).replace("d", "")
    if options.get("input-types") == ["sequence", "sequence"]:  # the same as none
        options["input-types"] = []
    if options.get("transformer-decoder-ffn-depth") == 0:  # the same as the encoder's
        options["transformer-decoder-ffn-depth"] = 2
    OPTIONS.check(place, options)

    def number(name: str, default: int) -> int:
        return read_number(place, options, name, default=default)

    def flag(name: str) -> bool:
        return read_flag(place, options, name, default=False)

    def choice(name: str, default: str, choices: Mapping[str, str]) -> str:
        value = options.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{place}: {name} is {shown(value)}, but only {', '.join(choices)} can be converted")
        return choices[value]

    sizes = options.get("dim-vocabs")
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int for size in sizes):
        raise ValueError(f"{place}: dim-vocabs is {shown(sizes)}, but must be the sizes of one source and one target")
    d_ff = number("transformer-dim-ffn", 2048)
    if number("transformer-decoder-dim-ffn", 0) not in (0, d_ff):
        raise ValueError(
            f"{place}: transformer-decoder-dim-ffn is {options['transformer-decoder-dim-ffn']} and transformer-dim-ffn "
            f"is {d_ff}, but they must be equal"
        )
    kinds = {"self-attention": "self_attention", "rnn": "ssru"}
    autoregression = choice("transformer-decoder-autoreg", "self-attention", kinds)
    if autoregression == "ssru":
        choice("dec-cell", "gru", {"ssru": "ssru"})
    tied = flag("tied-embeddings-all") or flag("tied-embeddings")
    shared = flag("tied-embeddings-all") or flag("tied-embeddings-src")
    return TransformerConfig(
        source_vocab_size=sizes[0],
        target_vocab_size=sizes[1],
        d_model=number("dim-emb", 512),
        num_heads=number("transformer-heads", 8),
        d_ff=d_ff,
        num_encoder_layers=number("enc-depth", 1),
        num_decoder_layers=number("dec-depth", 1),
        norm=_norm(place, options),
        norm_epsilon=NORM_EPSILON,
        activation=choice("transformer-ffn-activation", "swish", ACTIVATIONS),
        positions="sinusoidal_tensor2tensor",
        max_length=MAX_LENGTH,
        tie_embeddings=("three_way" if shared else "decoder") if tied else "none",
        output_bias=not flag("output-omit-bias"),
        zero_start=True,
        decoder_autoregression=autoregression,
    )


def _norm(place: object, options: Mapping[str, Any]) -> str:
    found = tuple(options[name] for name in NORM_OPTIONS)
    for norm, wanted in NORMS.items():
        if found == wanted:
            return norm
    written = ", ".join(f"{name} {shown(value)}" for name, value in zip(NORM_OPTIONS, found, strict=True))
    raise ValueError(
        f"{place}: without the d of dropout it has {written}, but only '', 'an', '' (norm after each sub-layer) and "
        "'n', 'a', 'n' (before, and at the end) can be converted"
    )


def _typed(value: Any) -> Any:
    """A plain value of YAML as what it means."""
    if isinstance(value, list):
        return [_typed(each) for each in value]
    if value in ("true", "false"):
        return value == "true"
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value) else value


def write_options(config: TransformerConfig, sizes: tuple[int, int], *, bias: bool) -> str:
    """The text of `special:model.yml`.

    Args:
        config: the model's config.
        sizes: the sizes of the vocabularies in Marian's files.
        bias: whether there is a bias on the logits.

    Raises:
        ValueError: Marian does not have an option of the model; names it.
    """
    _check_expressible(config)
    norms = dict(zip(NORM_OPTIONS, NORMS[config.norm], strict=True))
    ssru = config.decoder_autoregression == "ssru"
    options: dict[str, Any] = {
        "dec-cell": "ssru" if ssru else "gru",
        "dec-depth": config.num_decoder_layers,
        "dim-emb": config.d_model,
        "dim-vocabs": list(sizes),
        "enc-depth": config.num_encoder_layers,
        "input-types": [],
        "lemma-dim-emb": 0,
        "output-omit-bias": not bias,
        "right-left": False,
        "tied-embeddings": config.tie_embeddings == "decoder",
        "tied-embeddings-all": config.tie_embeddings == "three_way",
        "tied-embeddings-src": False,
        "transformer-decoder-autoreg": "rnn" if ssru else "self-attention",
        "transformer-dim-ffn": config.d_ff,
        "transformer-ffn-activation": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "transformer-ffn-depth": 2,
        "transformer-guided-alignment-layer": "last",
        "transformer-heads": config.num_heads,
        "transformer-no-projection": False,
        "transformer-pool": False,
        **norms,
        "transformer-postprocess": norms["transformer-postprocess"].replace("a", "da"),
        "transformer-postprocess-emb": "d",
        "transformer-tied-layers": [],
        "transformer-train-position-embeddings": False,
        "type": "transformer",
        "ulr": False,
    }
    # Numbers, lists, words and quoted strings look the same in JSON and in YAML.
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items())


def _check_expressible(config: TransformerConfig) -> None:
    wanted = {
        "norm_epsilon": (NORM_EPSILON,),
        "activation": tuple(ACTIVATIONS.values()),
        "positions": ("sinusoidal_tensor2tensor",),
        "position_offset": (0,),
        "scale_embeddings": (True,),
        "zero_start": (True,),
    }
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r}, but Marian's own format needs "
                f"{' or '.join(map(repr, values))}: train with that, or convert to-ctranslate2"
            )
