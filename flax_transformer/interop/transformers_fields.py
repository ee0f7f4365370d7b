"""Converts what the configurations of Marian, M2M100 and NLLB models in transformers have in common, and back.

`marian_fields.py` and `nllb_fields.py` add what differs. A field that is missing has its default in transformers.
"""

from typing import Any

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.downloaded import damaged
from flax_transformer.interop.fields import Fields, KnownFields, shown

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "quick_gelu": "quick_gelu", "swish": "swish", "silu": "swish"}
CONFIG = "config.json"
DEFAULT_MAX_LENGTH = 512
# Fields that can be converted only with the value given here; any other value asks for something that our model does
# not compute.
_FIXED = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "chunk_size_feed_forward": 0,
    "quantization_config": None,
    "prune_heads": None,
    "pruned_heads": None,
    "prefix": None,
}
# Settings of the search that would change translations, and that a model does not have here.
_SEARCH = {
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
FIELDS = KnownFields(fixed=_FIXED, search=_SEARCH, read=_READ, without_effect=_WITHOUT_EFFECT)


def read_fields(fields: Fields) -> TransformerConfig:
    """Makes our config, except for what each kind of model adds, and for what only the tensors determine.

    Args:
        fields: those of `config.json` and `generation_config.json` together.

    Raises:
        ValueError: a field's value cannot be converted; names the field and the value.
    """

    def both(part: str) -> int:
        first, second = fields.number(f"encoder_{part}"), fields.number(f"decoder_{part}")
        if first != second:
            raise ValueError(
                f"{CONFIG}: encoder_{part} is {first} and decoder_{part} is {second}, but they must be equal: choose "
                "another model"
            )
        return first

    # The limit of transformers includes the start token.
    limits = [fields.number("max_length", 1) - 1, fields.number("max_new_tokens", 0)]
    pad_id, eos_id = fields.number("pad_token_id"), fields.number("eos_token_id")
    start_id = fields.number("decoder_start_token_id", pad_id)
    banned, suppressed = _never_chosen(fields, {pad_id, start_id})
    if (forced := fields.get("forced_eos_token_id", eos_id)) != eos_id:
        raise ValueError(
            f"{CONFIG}: forced_eos_token_id is {shown(forced)}, but only eos_token_id = {eos_id} can be converted: "
            "choose another model"
        )
    try:
        return TransformerConfig(
            source_vocab_size=fields.number("vocab_size"),
            target_vocab_size=fields.number("decoder_vocab_size", fields.number("vocab_size")),
            d_model=fields.number("d_model"),
            num_heads=both("attention_heads"),
            d_ff=both("ffn_dim"),
            num_encoder_layers=fields.number("encoder_layers"),
            num_decoder_layers=fields.number("decoder_layers"),
            dropout_rate=fields.get("dropout", 0.1),
            attention_dropout_rate=fields.get("attention_dropout", 0.0),
            activation_dropout_rate=fields.get("activation_dropout", 0.0),
            activation=fields.choice("activation_function", "gelu", ACTIVATIONS),
            max_length=fields.number("max_position_embeddings", DEFAULT_MAX_LENGTH),
            max_output=min(filter(None, limits), default=0),
            scale_embeddings=fields.flag("scale_embedding"),
            tie_embeddings="none",  # until the tensors are compared
            pad_id=pad_id,
            start_id=start_id,
            eos_id=eos_id,
            banned_ids=banned,
            suppressed_ids=suppressed,
        )
    except TypeError as error:  # text in place of a number
        raise damaged(CONFIG, error) from error


def _never_chosen(fields: Fields, always: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The banned and the suppressed tokens; raises ValueError for sequences of several tokens, which cannot be banned.

    With `renormalize_logits` they are banned: their probability goes to the other tokens. Without, they are only not
    chosen, and padding and start (`always`) need not be named, because every search leaves them out.
    """
    bad_words = fields.get("bad_words_ids", [])

    def is_token(word: Any) -> bool:
        return isinstance(word, list) and len(word) == 1 and type(word[0]) is int and word[0] >= 0

    if not isinstance(bad_words, list) or not all(map(is_token, bad_words)):
        raise ValueError(
            f"{CONFIG}: bad_words_ids is {shown(bad_words)}, but only single tokens can be banned: choose another model"
        )
    never = {word[0] for word in bad_words}
    return (tuple(sorted(never)), ()) if fields.flag("renormalize_logits") else ((), tuple(sorted(never - always)))


def write_fields(config: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.json` that these models have in common, and those of `generation_config.json`."""
    special = {
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.eos_id,
        "forced_eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    fields = {
        "is_encoder_decoder": True,
        "vocab_size": config.source_vocab_size,
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
        "dtype": "float32",
    }
    searching = {
        "bad_words_ids": [[number] for number in config.never_chosen],
        "max_length": config.max_output + 1 if config.max_output else config.max_length,
        "num_beams": 4,
        "renormalize_logits": bool(config.banned_ids),
    }
    return fields | special, searching | special
