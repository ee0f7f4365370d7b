"""Converts the options of a model in Marian's own format (`special:model.yml` in its file) to our config, and back.

An option that is missing has Marian's default.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.fields import Fields, KnownFields, check_options, shown
from flax_transformer.interop.yaml_text import read_yaml

# Marian's name for quick_gelu is gelu: until version 1.12 that was the only one, and CTranslate2 reads it so, too.
ACTIVATIONS = {"relu": "relu", "swish": "swish", "gelu": "quick_gelu"}
AUTOREGRESSIONS = {"self-attention": "self_attention", "rnn": "ssru"}
# transformer-preprocess, -postprocess and -postprocess-top; d, which is dropout, may stand anywhere.
NORMS = {"post": ("", "an", ""), "pre": ("n", "a", "n")}
NORM_OPTIONS = ("transformer-preprocess", "transformer-postprocess", "transformer-postprocess-top")
NORM_EPSILON = 1e-6
MAX_LENGTH = 512  # Marian's positions have no end; longer sentences are split
FIELDS = KnownFields(
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


def read_options(text: bytes, place: str) -> TransformerConfig:
    """Makes our config from the text of `special:model.yml`, except for the ids of special tokens.

    Args:
        text: YAML.
        place: where it stands, for errors.

    Raises:
        ValueError: the text is no YAML, or an option is unknown or asks for what our models do not compute; names it.
    """
    values = read_yaml(text, place)
    if not isinstance(values, dict):
        raise ValueError(f"{place} has no options: download the file again")
    values = {name: _typed(value) for name, value in values.items()}
    for name in (*NORM_OPTIONS, "transformer-postprocess-emb"):
        default = "dan" if name == "transformer-postprocess" else ""
        values[name] = str(values.get(name, default)).replace("d", "")
    if values.get("input-types") == ["sequence", "sequence"]:  # the same as none
        values["input-types"] = []
    if values.get("transformer-decoder-ffn-depth") == 0:  # the same as the encoder's
        values["transformer-decoder-ffn-depth"] = 2
    FIELDS.check(place, values)
    options = Fields(place, values)
    sizes = options.get("dim-vocabs")
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int for size in sizes):
        raise ValueError(f"{place}: dim-vocabs is {shown(sizes)}, but must be the sizes of one source and one target")
    d_ff = options.number("transformer-dim-ffn", 2048)
    decoder_d_ff = options.number("transformer-decoder-dim-ffn", 0)
    if decoder_d_ff not in (0, d_ff):
        raise ValueError(
            f"{place}: transformer-decoder-dim-ffn is {decoder_d_ff} and transformer-dim-ffn is {d_ff}, but they must "
            "be equal: choose another model"
        )
    autoregression = options.choice("transformer-decoder-autoreg", "self-attention", AUTOREGRESSIONS)
    if autoregression == "ssru":
        options.choice("dec-cell", "gru", {"ssru": "ssru"})
    tied, shared = options.flag("tied-embeddings"), options.flag("tied-embeddings-src")
    if options.flag("tied-embeddings-all"):
        tied = shared = True
    return TransformerConfig(
        source_vocab_size=sizes[0],
        target_vocab_size=sizes[1],
        d_model=options.number("dim-emb", 512),
        num_heads=options.number("transformer-heads", 8),
        d_ff=d_ff,
        num_encoder_layers=options.number("enc-depth", 1),
        num_decoder_layers=options.number("dec-depth", 1),
        norm=_norm(options),
        norm_epsilon=NORM_EPSILON,
        activation=options.choice("transformer-ffn-activation", "swish", ACTIVATIONS),
        positions="sinusoidal_tensor2tensor",
        max_length=MAX_LENGTH,
        tie_embeddings=("three_way" if shared else "decoder") if tied else "none",
        output_bias=not options.flag("output-omit-bias"),
        zero_start=True,
        decoder_autoregression=autoregression,
    )


def _norm(options: Fields) -> str:
    found = tuple(options.get(name) for name in NORM_OPTIONS)
    for norm, wanted in NORMS.items():
        if found == wanted:
            return norm
    written = ", ".join(f"{name} {shown(value)}" for name, value in zip(NORM_OPTIONS, found, strict=True))
    raise ValueError(
        f"{options.place}: without the d of dropout it has {written}, but only '', 'an', '' (norm after each "
        "sub-layer) and 'n', 'a', 'n' (before, and at the end) can be converted: choose another model"
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
    options: dict[str, Any] = {
        "dec-cell": "ssru" if config.decoder_autoregression == "ssru" else "gru",
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
        "transformer-decoder-autoreg": _name_in_marian(AUTOREGRESSIONS, config.decoder_autoregression),
        "transformer-dim-ffn": config.d_ff,
        "transformer-ffn-activation": _name_in_marian(ACTIVATIONS, config.activation),
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


def _name_in_marian(ours_by_theirs: Mapping[str, str], ours: str) -> str:
    return next(theirs for theirs, other in ours_by_theirs.items() if other == ours)


def _check_expressible(config: TransformerConfig) -> None:
    wanted: dict[str, Collection[Any]] = {
        "norm_epsilon": [NORM_EPSILON],
        "activation": ACTIVATIONS.values(),
        "positions": ["sinusoidal_tensor2tensor"],
        "position_offset": [0],
        "scale_embeddings": [True],
        "zero_start": [True],
    }
    check_options(config, wanted, "Marian's own format needs", "train with that, or convert to-ctranslate2")
