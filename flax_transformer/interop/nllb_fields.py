"""Converts the fields of an M2M100 or NLLB model's configuration, as transformers stores it, to our config, and back.

Most fields mean the same as in a Marian model, and `marian_fields.py` converts them; here is what differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop import marian_fields
from flax_transformer.interop.fields import KnownFields

_OF_MARIAN = {
    "model_type",
    "normalize_before",
    "normalize_embedding",
    "add_final_layer_norm",
    "static_position_embeddings",
    "force_bos_token_to_be_generated",
    "forced_bos_token_id",
}
FIELDS = KnownFields(
    fixed={name: value for name, value in marian_fields.FIELDS.fixed.items() if name not in _OF_MARIAN}
    | {"model_type": "m2m_100"},
    read={*marian_fields.FIELDS.read, "forced_bos_token_id"} - {"decoder_vocab_size"},
    without_effect=marian_fields.FIELDS.without_effect,
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


def read_fields(fields: Mapping[str, Any]) -> TransformerConfig:
    """Makes our config, except for the fields that only the tensors determine; arguments and errors as for Marian."""
    given = {name: value for name, value in fields.items() if value is not None}
    config = marian_fields.read_fields(_DEFAULTS | given)
    return dataclasses.replace(config, **_architecture(config))


def _architecture(config: TransformerConfig) -> dict[str, Any]:
    """What all these models have in common."""
    return {
        "norm": "pre",
        "norm_epsilon": 1e-5,
        "positions": "sinusoidal_tensor2tensor",
        "position_offset": config.pad_id + 1,
        "output_bias": False,
        "zero_start": False,
    }


def check_expressible(config: TransformerConfig) -> None:
    """Raises ValueError for an option of the model that M2M100 and NLLB do not have."""
    for name, wanted in _architecture(config).items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r}, but M2M100 and NLLB have {wanted!r}: only a model that "
                "came from-nllb can be converted back; convert to-ctranslate2 or to-stablehlo"
            )


def write_fields(config: TransformerConfig, target_language: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.json`, except those that only the tensors determine, and of `generation_config.json`.

    Args:
        config: the model's config.
        target_language: the id of the language into which it translates if none is named; `None` for no such language.
    """
    fields, searching = marian_fields.write_fields(config)
    del fields["decoder_vocab_size"]
    fields |= {"architectures": ["M2M100ForConditionalGeneration"], "model_type": "m2m_100", "bos_token_id": 0}
    return fields, searching | {"forced_bos_token_id": target_language}
