"""`TransformerConfig`, the sizes and options that describe a Transformer; they are checked once and cannot be changed.

Glossary: D is `d_model`, H is `num_heads`, K = D / H is the size of one head, F is `d_ff`, V is a vocabulary's size.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from flax_transformer.ranges import COUNT, SHARE, SIZE, Range, check, setting, setting_fields

LAYERS = Range(at_least=1, at_most=10_000)

# The kinds of sinusoidal positions, and the options of `sinusoidal_positions` that compute them.
WAVES: dict[str, dict[str, bool]] = {
    "sinusoidal": {},
    "sinusoidal_concatenated": {"interleaved": False},
    "sinusoidal_tensor2tensor": {"interleaved": False, "endpoint": True},
}
DTYPES = ("float32", "bfloat16", "float16")

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Describes the model. What a single call does is an argument of that call, e.g. `deterministic`.

    The defaults are the paper's base model (table 3). A vocabulary size of 0 means "not known yet": training fills
    it in from the vocabulary, and a `Transformer` does not accept it.

    Attributes:
        source_vocab_size: number of source token ids.
        target_vocab_size: number of target token ids; equal to the source's when embeddings are tied three ways.
        d_model: width of every sub-layer's output.
        num_heads: parallel attention heads; divides `d_model`.
        d_ff: inner width of the feed-forward network (section 3.3).
        num_encoder_layers: depth of the encoder.
        num_decoder_layers: depth of the decoder.
        dropout_rate: on each sub-layer's output before the residual and the norm, and on the embeddings (section 5.4);
            this rate and the two below are rounded to 1/256.
        attention_dropout_rate: on the attention weights; the paper has none.
        activation_dropout_rate: on the feed-forward network's inner activations; the paper has none.
        decoder_autoregression: how a target position learns of those before it: "self_attention" (the paper's) or
            "ssru", a recurrent unit that makes each step of a search cheaper (`recurrence.SSRU`; Marian's option
            `transformer-decoder-autoreg: rnn`).
        norm: "post", the paper's LayerNorm(x + Sublayer(x)), or "pre", x + Sublayer(LayerNorm(x)) and a final norm.
        activation: "relu" (the paper's), "gelu" (exact, not the tanh approximation), "quick_gelu" (x times
            sigmoid(1.702 x), which Marian calls gelu) or "swish".
        positions: "sinusoidal" (interleaved, section 3.5), "sinusoidal_concatenated" (the same waves, sines in the
            first half, as in transformers' MarianMTModel), "sinusoidal_tensor2tensor" (sines in the first half, and
            wavelengths that end exactly at 10000 times 2 pi, as in tensor2tensor, fairseq and Marian) or "learned".
        position_offset: the position of a sentence's first token; 2 in M2M100 and NLLB. Learned positions begin at 0.
        max_length: the number of learned positions; also the maximum length of a sentence in tokens. Training leaves
            out pairs with a longer sentence; a translator splits it.
        scale_embeddings: whether embeddings are multiplied by sqrt(d_model) (section 3.4).
        tie_embeddings: "three_way" (source, target and output share one matrix, section 3.4), "decoder" (target and
            output do) or "none".
        output_bias: whether a bias is added to the logits; the paper has none.
        norm_epsilon: added to the variance in LayerNorm.
        pad_id: the id of padding.
        start_id: the id from which the decoder starts.
        zero_start: whether the decoder starts from a vector of zeros, as in Marian, in place of the embedding of
            `start_id`.
        eos_id: the id that ends a sentence.
        banned_ids: ids that the model never generates; their probability goes to all others, as Marian does with
            padding.
        suppressed_ids: further ids that no search chooses, but that keep their probability, as the unknown token does
            in Marian.
        max_output: maximum length of a translation in tokens, including the end of sentence; 0 for no limit.
        dtype: type of the activations; parameters, softmax and logits are always float32. bfloat16 is for TPUs and
            newer GPUs; float16, for older GPUs such as the T4, is trained with a loss scale.
        attention_implementation: "auto" (cuDNN's fused kernel where it can run and there are enough queries, see
            `dot_product_attention`), "xla" (runs everywhere) or "cudnn" (an error where it cannot run; a translator
            treats it as "auto"). All give the same results except for rounding.
        remat: whether to compute each layer's activations again in the backward pass, to save memory.
    """

    source_vocab_size: int = setting(0, COUNT)
    target_vocab_size: int = setting(0, COUNT)
    d_model: int = setting(512, SIZE)
    num_heads: int = setting(8, SIZE)
    d_ff: int = setting(2048, SIZE)
    num_encoder_layers: int = setting(6, LAYERS)
    num_decoder_layers: int = setting(6, LAYERS)
    dropout_rate: float = setting(0.1, SHARE)
    attention_dropout_rate: float = setting(0.0, SHARE)
    activation_dropout_rate: float = setting(0.0, SHARE)
    decoder_autoregression: str = setting("self_attention", ("self_attention", "ssru"))
    norm: str = setting("post", ("post", "pre"))
    activation: str = setting("relu", ("relu", "gelu", "quick_gelu", "swish"))
    positions: str = setting("sinusoidal", (*WAVES, "learned"))
    position_offset: int = setting(0, COUNT)
    max_length: int = setting(256, SIZE)
    scale_embeddings: bool = True
    tie_embeddings: str = setting("three_way", ("three_way", "decoder", "none"))
    output_bias: bool = False
    norm_epsilon: float = setting(1e-5, Range(at_least=0, at_most=1))
    pad_id: int = setting(0, COUNT)
    start_id: int = setting(1, COUNT)
    zero_start: bool = False
    eos_id: int = setting(2, COUNT)
    banned_ids: Sequence[int] = setting((), COUNT)
    suppressed_ids: Sequence[int] = setting((), COUNT)
    max_output: int = setting(0, COUNT)
    dtype: str = setting("float32", DTYPES)
    attention_implementation: str = setting("auto", ("auto", "xla", "cudnn"))
    remat: bool = False

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, its value and the values that it may have."""
        if isinstance(self.dtype, type | np.dtype) or hasattr(self.dtype, "dtype"):  # jnp.bfloat16, for example
            object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        check(self, "model")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model is {self.d_model}, which model.num_heads = {self.num_heads} does not divide: "
                "change one of them"
            )
        if self.d_model % 2 and self.positions != "learned":
            raise ValueError(f"model.d_model is {self.d_model}: sinusoidal positions need an even one")
        if self.position_offset and self.positions == "learned":
            raise ValueError(
                f"model.position_offset is {self.position_offset}, but learned positions begin at 0: set it to 0"
            )
        if self.eos_id in self.banned_ids:
            raise ValueError(
                f"model.banned_ids has model.eos_id = {self.eos_id}: no sentence could end, so leave it out"
            )
        if self.tie_embeddings == "three_way" and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"model.source_vocab_size is {self.source_vocab_size} and model.target_vocab_size "
                f"{self.target_vocab_size}: three-way tying needs one joint vocabulary; "
                'set model.tie_embeddings to "decoder" or "none"'
            )

    @property
    def never_chosen(self) -> tuple[int, ...]:
        """The ids that no search chooses: banned and suppressed ones, `pad_id` and `start_id`, but not `eos_id`."""
        return tuple(sorted({*self.banned_ids, *self.suppressed_ids, self.pad_id, self.start_id} - {self.eos_id}))

    @classmethod
    def base(cls, **changes: Any) -> "TransformerConfig":
        """The paper's base model (table 3): 6+6 layers, 512, 8 heads, 2048."""
        return dataclasses.replace(cls(), **changes)

    @classmethod
    def big(cls, **changes: Any) -> "TransformerConfig":
        """The paper's big model (table 3): 6+6 layers, 1024, 16 heads, 4096, dropout 0.3."""
        return dataclasses.replace(cls(d_model=1024, num_heads=16, d_ff=4096, dropout_rate=0.3), **changes)

    @classmethod
    def tiny(cls, **changes: Any) -> "TransformerConfig":
        """4+4 layers, 128, 4 heads, 256: small enough to train on a CPU, for Multi30k in some two hours."""
        tiny = cls(d_model=128, num_heads=4, d_ff=256, num_encoder_layers=4, num_decoder_layers=4)
        return dataclasses.replace(tiny, **changes)

    @classmethod
    def five_layer(cls, **changes: Any) -> "TransformerConfig":
        """5+5 layers, 512, 8 heads, d_ff = 3 * d_model = 1536: the Kannada-English tutorial's model."""
        five_layer = cls(d_ff=3 * 512, num_encoder_layers=5, num_decoder_layers=5)
        return dataclasses.replace(five_layer, **changes)


def from_mapping(settings: Callable[..., Settings], mapping: Mapping[str, Any], section: str) -> Settings:
    """Builds a settings dataclass from a mapping that a person may have typed.

    Args:
        settings: the dataclass.
        mapping: field names to values, which may be mappings again; fields left out keep their defaults.
        section: the name of the mapping in errors, e.g. "model".

    Raises:
        ValueError: a key is not a field; names the nearest one.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cast(Any, settings))}
    # Also the settings in sections of this section, by the last part of their names.
    known = {name.rpartition(".")[2]: name for name in [*setting_fields(cast(Any, settings)), *fields]}
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {section}.{known[near[0]]}?" if near else f"it has {', '.join(known.values())}"
            raise ValueError(f"{section}.{key} is not a setting: {remedy}")

    def built(name: str, value: Any) -> Any:
        is_section = dataclasses.is_dataclass(fields[name]) and isinstance(value, Mapping)
        return from_mapping(cast(Any, fields[name]), value, f"{section}.{name}") if is_section else value

    return settings(**{name: built(name, value) for name, value in mapping.items()})
