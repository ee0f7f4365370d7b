"""Converts the fields of an M2M100 or NLLB model's configuration in transformers to our config, and back."""

import dataclasses
from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop import transformers_fields
from flax_transformer.interop.fields import Fields, KnownFields, check_options

FIELDS = KnownFields(
    fixed={**transformers_fields.FIELDS.fixed, "model_type": "m2m_100"},
    search=transformers_fields.FIELDS.search,
    read={*transformers_fields.FIELDS.read, "forced_bos_token_id"},
    without_effect=transformers_fields.FIELDS.without_effect,
)
# What transformers' M2M100Config has for a field that is missing.
_DEFAULTS = {
    "vocab_size": 128112,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "activation_function": "relu",
    "attention_dropout": 0.1,
    "scale_embedding": True,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
} | {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in (("layers", 12), ("ffn_dim", 4096), ("attention_heads", 16))
}


def read_fields(fields: Fields) -> TransformerConfig:
    """Makes our config, except for what only the tensors determine.

    Args:
        fields: those of `config.json` and `generation_config.json` together.

    Raises:
        ValueError: a field's value cannot be converted; names the field and the value.
    """
    given = {name: value for name, value in fields.values.items() if value is not None}
    config = transformers_fields.read_fields(Fields(fields.place, _DEFAULTS | given))
    return dataclasses.replace(config, **_architecture(config))


def _architecture(config: TransformerConfig) -> dict[str, Any]:
    """What all these models have in common."""
    return {
        "decoder_autoregression": "self_attention",
        "norm": "pre",
        "norm_epsilon": 1e-5,
        "positions": "sinusoidal_tensor2tensor",
        "position_offset": config.pad_id + 1,
        "output_bias": False,
        "zero_start": False,
    }


def check_expressible(config: TransformerConfig) -> None:
    """Raises ValueError for an option of the model that M2M100 and NLLB do not have."""
    check_options(
        config,
        {name: [value] for name, value in _architecture(config).items()},
        "M2M100 and NLLB have",
        "only a model that came from-nllb can be converted back; convert to-ctranslate2",
    )


def write_fields(config: TransformerConfig, target_language: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.json`, except those that only the tensors determine, and of `generation_config.json`.

    Args:
        config: the model's config.
        target_language: the id of the language into which it translates if none is named; `None` for no such language.
    """
    fields, searching = transformers_fields.write_fields(config)
    fields |= {"architectures": ["M2M100ForConditionalGeneration"], "model_type": "m2m_100", "bos_token_id": 0}
    return fields, searching | {"forced_bos_token_id": target_language}
