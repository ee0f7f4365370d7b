"""Converts the fields of a Marian model's configuration, as transformers stores it, to our config, and back.

A field that is missing has its default in transformers.
"""

from collections.abc import Mapping
from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.fields import KnownFields, read_flag, read_number

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "quick_gelu": "quick_gelu", "swish": "swish", "silu": "swish"}
# Fields that can be converted only with the value given here; any other value asks for something that our model does
# not compute.
_FIXED = {
    "model_type": "marian",
    "is_encoder_decoder": True,
    "is_decoder": False,
    "normalize_before": False,
    "normalize_embedding": False,
    "add_final_layer_norm": False,
    "static_position_embeddings": True,
    "force_bos_token_to_be_generated": False,
    "chunk_size_feed_forward": 0,
    "quantization_config": None,
    # Settings of the search.
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "do_sample": False,
    "min_length": 0,
    "prefix": None,
    "prune_heads": None,
    "pruned_heads": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
}
_READ = {
    "activation_dropout",
    "activation_function",
    "attention_dropout",
    "bad_words_ids",
    "d_model",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_layers",
    "decoder_start_token_id",
    "decoder_vocab_size",
    "dropout",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layers",
    "eos_token_id",
    "forced_eos_token_id",
    "max_length",
    "max_new_tokens",
    "max_position_embeddings",
    "pad_token_id",
    "renormalize_logits",
    "scale_embedding",
    "share_encoder_decoder_embeddings",
    "tie_word_embeddings",
    "vocab_size",
}
# Fields that have no effect on the model, or that set defaults of the search, for which this library has its own
# settings.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset",
    "_from_model_config",
    "_name_or_path",
    "_num_labels",
    "add_bias_logits",  # the bias is among the tensors
    "architectures",
    "bos_token_id",
    "classif_dropout",
    "classifier_dropout",
    "decoder_layerdrop",
    "dtype",
    "early_stopping",
    "encoder_layerdrop",
    "extra_pos_embeddings",
    "gradient_checkpointing",
    "id2label",
    "init_std",
    "label2id",
    "length_penalty",
    "num_beams",
    "num_hidden_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "problem_type",
    "remove_invalid_values",
    "return_dict",
    "return_dict_in_generate",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
}
FIELDS = KnownFields(fixed=_FIXED, read=_READ, without_effect=_WITHOUT_EFFECT)
DEFAULT_MAX_LENGTH = 512


def join_fields(fields: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the fields of `config.json` and `generation_config.json`; the latter overrides settings of the search."""
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        both = [file[name] for file in (fields, generation) if file.get(name) is not None]
        if len(both) == 2 and both[0] != both[1]:
            raise ValueError(
                f"{name} is {both[0]!r} in config.json and {both[1]!r} in generation_config.json: download both again"
            )
    return dict(fields) | {name: value for name, value in generation.items() if value is not None}


def read_fields(fields: Mapping[str, Any], *, trained_positions: bool = False) -> TransformerConfig:
    """Makes our config, except for the fields that only the tensors determine.

    Args:
        fields: the fields of `config.json`, merged with those of `generation_config.json` if there is one.
        trained_positions: whether to take Marian's positions and not those of transformers.

    Raises:
        ValueError: a field's value cannot be converted; names the field and the value.
    """

    def whole(name: str, default: int | None = None) -> int:
        return read_number("config.json", fields, name, default=default)

    def flag(name: str) -> bool:
        return read_flag("config.json", fields, name, default=False)

    def both(part: str) -> int:
        first, second = whole(f"encoder_{part}"), whole(f"decoder_{part}")
        if first != second:
            raise ValueError(
                f"config.json: encoder_{part} is {first} and decoder_{part} is {second}, but they must be equal"
            )
        return first

    activation = fields.get("activation_function", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json: activation_function is {activation!r}, but only {', '.join(ACTIVATIONS)} can be converted"
        )
    # The limit of transformers includes the start token.
    longest = [whole("max_length", 1) - 1, whole("max_new_tokens", 0)]
    eos_id = whole("eos_token_id")
    if fields.get("forced_eos_token_id") not in (None, eos_id):
        raise ValueError(
            f"config.json: forced_eos_token_id is {fields['forced_eos_token_id']!r}, but only eos_token_id = {eos_id} "
            "can be converted"
        )
    try:
        return TransformerConfig(
            source_vocab_size=whole("vocab_size"),
            target_vocab_size=whole("decoder_vocab_size", whole("vocab_size")),
            d_model=whole("d_model"),
            num_heads=both("attention_heads"),
            d_ff=both("ffn_dim"),
            num_encoder_layers=whole("encoder_layers"),
            num_decoder_layers=whole("decoder_layers"),
            dropout_rate=fields.get("dropout", 0.1),
            attention_dropout_rate=fields.get("attention_dropout", 0.0),
            activation_dropout_rate=fields.get("activation_dropout", 0.0),
            activation=ACTIVATIONS[activation],
            positions="sinusoidal_tensor2tensor" if trained_positions else "sinusoidal_concatenated",
            max_length=whole("max_position_embeddings", DEFAULT_MAX_LENGTH),
            max_output=min(filter(None, longest), default=0),
            scale_embeddings=flag("scale_embedding"),
            tie_embeddings="none",  # set when the tensors are compared
            pad_id=whole("pad_token_id"),
            start_id=whole("decoder_start_token_id", whole("pad_token_id")),
            eos_id=eos_id,
            banned_ids=_banned(fields, renormalize=flag("renormalize_logits")),
        )
    except TypeError as error:  # a string instead of a number
        raise ValueError(f"config.json is damaged ({error}): download it again") from error


def _banned(fields: Mapping[str, Any], *, renormalize: bool) -> tuple[int, ...]:
    """The tokens that are never generated; raises ValueError for sequences of several tokens, which cannot be banned.

    Padding and start alone are left out, because every search bans them anyway, unless `renormalize_logits` gives their
    probability to the other tokens.
    """
    bad_words = fields.get("bad_words_ids") or []

    def is_token(word: Any) -> bool:
        return isinstance(word, list) and len(word) == 1 and type(word[0]) is int and word[0] >= 0

    if not isinstance(bad_words, list) or not all(map(is_token, bad_words)):
        raise ValueError(f"config.json: bad_words_ids is {bad_words!r}, but only single tokens can be banned")
    banned = {word[0] for word in bad_words}
    always = {fields["pad_token_id"], fields.get("decoder_start_token_id", fields["pad_token_id"])}
    return tuple(sorted(banned)) if renormalize or not banned <= always else ()


def check_expressible(config: TransformerConfig) -> None:
    """Raises ValueError for an option of the model that Marian does not have."""
    for name, wanted in (("norm", "post"), ("norm_epsilon", 1e-5), ("position_offset", 0)):
        if getattr(config, name) != wanted:
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r}, but transformers' Marian needs {wanted!r}: train with "
                "that, or convert to-marian-native, to-ctranslate2 or to-stablehlo"
            )
    if config.positions not in ("sinusoidal", "sinusoidal_concatenated"):
        raise ValueError(
            f"model.positions is {config.positions!r}, but transformers computes the paper's sinusoidal ones: train "
            "with those, or convert to-marian-native or to-ctranslate2"
        )


def write_fields(config: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.json`, except those that only the tensors determine, and of `generation_config.json`."""
    searching = {
        "bad_words_ids": [[number] for number in config.never_chosen],
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.eos_id,
        "forced_eos_token_id": config.eos_id,
        "max_length": config.max_output + 1 if config.max_output else config.max_length,
        "num_beams": 4,
        "pad_token_id": config.pad_id,
        "renormalize_logits": bool(config.banned_ids),
    }
    fields = {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "is_encoder_decoder": True,
        "vocab_size": config.source_vocab_size,
        "decoder_vocab_size": config.target_vocab_size,
        "d_model": config.d_model,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.d_ff,
        "activation_function": config.activation,
        "scale_embedding": config.scale_embeddings,
        "max_position_embeddings": config.max_length,
        "dropout": config.dropout_rate,
        "attention_dropout": config.attention_dropout_rate,
        "activation_dropout": config.activation_dropout_rate,
        "bos_token_id": None,
        "dtype": "float32",
    } | {
        name: searching[name]
        for name in ("decoder_start_token_id", "eos_token_id", "forced_eos_token_id", "pad_token_id")
    }
    return fields, searching
