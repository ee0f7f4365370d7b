"""Converts the fields of a Marian model's configuration, as transformers stores it, to our config, and back."""

import dataclasses
from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop import transformers_fields
from flax_transformer.interop.fields import Fields, KnownFields, check_options

FIELDS = KnownFields(
    fixed={
        **transformers_fields.FIELDS.fixed,
        "model_type": "marian",
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "static_position_embeddings": True,
        "force_bos_token_to_be_generated": False,
        "forced_bos_token_id": None,
    },
    search=transformers_fields.FIELDS.search,
    read={*transformers_fields.FIELDS.read, "decoder_vocab_size"},
    without_effect=transformers_fields.FIELDS.without_effect,
)


def read_fields(fields: Fields, *, trained_positions: bool = False) -> TransformerConfig:
    """Makes our config, except for what only the tensors determine.

    Args:
        fields: those of `config.json` and `generation_config.json` together.
        trained_positions: whether to take Marian's positions and not those of transformers.

    Raises:
        ValueError: a field's value cannot be converted; names the field and the value.
    """
    positions = "sinusoidal_tensor2tensor" if trained_positions else "sinusoidal_concatenated"
    return dataclasses.replace(transformers_fields.read_fields(fields), norm="post", positions=positions)


def check_expressible(config: TransformerConfig) -> None:
    """Raises ValueError for an option of the model that Marian does not have in transformers."""
    needs = "transformers' Marian needs"
    check_options(
        config,
        {"decoder_autoregression": ["self_attention"]},
        needs,
        "train with that, or convert to-marian-native or to-stablehlo",
    )
    wanted: dict[str, list[Any]] = {
        "norm": ["post"],
        "norm_epsilon": [1e-5],
        "positions": ["sinusoidal", "sinusoidal_concatenated"],
        "position_offset": [0],
        "zero_start": [False],
    }
    check_options(config, wanted, needs, "train with that, or convert to-ctranslate2 or to-stablehlo")


def write_fields(config: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.json`, except those that only the tensors determine, and of `generation_config.json`."""
    fields, searching = transformers_fields.write_fields(config)
    fields |= {"architectures": ["MarianMTModel"], "model_type": "marian", "bos_token_id": None}
    return fields | {"decoder_vocab_size": config.target_vocab_size}, searching
