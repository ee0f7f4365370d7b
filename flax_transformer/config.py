"""Takes the numbers that describe a Transformer and leaves `TransformerConfig`, checked once and never changed.

Glossary: D is `d_model`, H is `num_heads`, K = D / H is the size of one head, F is `d_ff`, V is a vocabulary's size.
"""

import dataclasses
import difflib
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

CHOICES = {
    "norm": ("post", "pre"),
    "activation": ("relu", "gelu", "swish"),
    "positions": ("sinusoidal", "sinusoidal_concatenated", "learned"),
    "tie_embeddings": ("three_way", "decoder", "none"),
    "dtype": ("float32", "bfloat16", "float16"),
    "attention_implementation": ("auto", "xla", "cudnn"),
}

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What the model is; arguments of the methods say what it does now.

    The defaults are the paper's base model (table 3). A vocabulary size of 0 means "not known yet": training fills
    it in from the vocabulary, and a `Transformer` refuses it.

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
        norm: "post", the paper's LayerNorm(x + Sublayer(x)), or "pre", x + Sublayer(LayerNorm(x)) and a final norm.
        activation: "relu" (the paper's), "gelu" (exact, not the tanh approximation) or "swish".
        positions: "sinusoidal" (interleaved, section 3.5), "sinusoidal_concatenated" (sines in the first half, as
            Marian has them) or "learned".
        max_length: the number of learned positions; also the longest sentence, in tokens, that training keeps.
        scale_embeddings: whether embeddings are multiplied by sqrt(d_model) (section 3.4).
        tie_embeddings: "three_way" (source, target and output share one matrix, section 3.4), "decoder" (target and
            output do) or "none".
        output_bias: whether a bias is added to the logits; the paper has none.
        norm_epsilon: added to the variance in LayerNorm.
        pad_id: the id that fills up rows.
        start_id: the id that the decoder starts from.
        eos_id: the id that ends a sentence.
        banned_ids: ids that the model never says: all others share their probability, as in Marian, which says no
            padding.
        max_output: the longest translation that a search makes, in tokens with the end; 0 for no such limit.
        dtype: type of the activations; parameters, softmax and logits are float32 either way. bfloat16 is for TPUs and
            newer GPUs; float16, for older ones such as the T4, is trained with a loss scale.
        attention_implementation: "auto" (cuDNN's fused kernel where it can and should run, as
            `dot_product_attention` tells), "xla" (everywhere) or "cudnn" (an error where it cannot run; a translator
            takes it as "auto"). Equal but for rounding.
        remat: whether each layer's activations are computed again in the backward pass, to save memory.
    """

    source_vocab_size: int = 0
    target_vocab_size: int = 0
    d_model: int = 512
    num_heads: int = 8
    d_ff: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.0
    activation_dropout_rate: float = 0.0
    norm: str = "post"
    activation: str = "relu"
    positions: str = "sinusoidal"
    max_length: int = 256
    scale_embeddings: bool = True
    tie_embeddings: str = "three_way"
    output_bias: bool = False
    norm_epsilon: float = 1e-5
    pad_id: int = 0
    start_id: int = 1
    eos_id: int = 2
    banned_ids: Sequence[int] = ()
    max_output: int = 0
    dtype: str = "float32"
    attention_implementation: str = "auto"
    remat: bool = False

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _plain(f"model.{field.name}", value, field.type))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
            # A type of jax's or numpy's equals its name.
            object.__setattr__(self, name, next(choice for choice in allowed if choice == getattr(self, name)))
        for name in ("d_model", "num_heads", "d_ff", "num_encoder_layers", "num_decoder_layers", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("dropout_rate", "attention_dropout_rate", "activation_dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be at least 0 and less than 1")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model is {self.d_model}, which model.num_heads = {self.num_heads} does not divide: "
                "change one of them"
            )
        if self.d_model % 2 and self.positions != "learned":
            raise ValueError(f"model.d_model is {self.d_model}: sinusoidal positions need an even one")
        if self.tie_embeddings == "three_way" and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"model.source_vocab_size is {self.source_vocab_size} and model.target_vocab_size "
                f"{self.target_vocab_size}: three-way tying needs one joint vocabulary; "
                'set model.tie_embeddings to "decoder" or "none"'
            )

    @property
    def never_chosen(self) -> tuple[int, ...]:
        """The ids that no search chooses: `banned_ids`, padding and start, unless one of them ends a sentence."""
        return tuple(sorted({*self.banned_ids, self.pad_id, self.start_id} - {self.eos_id}))

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
        """4+4 layers, 128, 4 heads, 256: a laptop trains it in minutes."""
        tiny = cls(d_model=128, num_heads=4, d_ff=256, num_encoder_layers=4, num_decoder_layers=4)
        return dataclasses.replace(tiny, **changes)

    @classmethod
    def five_layer(cls, **changes: Any) -> "TransformerConfig":
        """5+5 layers, 512, 8 heads, d_ff = 3 * d_model = 1536: the Kannada-English tutorial's model."""
        five_layer = cls(d_ff=3 * 512, num_encoder_layers=5, num_decoder_layers=5)
        return dataclasses.replace(five_layer, **changes)


def _plain(name: str, value: Any, kind: Any) -> Any:
    """A setting as Python's own type, which JSON can hold: numpy's numbers are converted, other types refused."""
    wanted = {int: "a whole number", float: "a number", bool: "True or False", Sequence[int]: "whole numbers"}
    try:
        if kind is int and not isinstance(value, bool):
            return operator.index(value)
        if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
            return float(value)
        if kind is bool and value in (True, False):
            return bool(value)
        if kind == Sequence[int]:
            return tuple(map(operator.index, value))
    except TypeError:
        pass
    if kind is str:
        return value
    raise ValueError(f"{name} is {value!r}: it must be {wanted[kind]}")


def from_mapping(settings: Callable[..., Settings], mapping: Mapping[str, Any], section: str) -> Settings:
    """Builds a settings dataclass from a mapping that a person may have typed.

    Args:
        settings: the dataclass.
        mapping: field names to values; fields left out keep their defaults.
        section: how errors call the mapping, e.g. "model".

    Raises:
        ValueError: a key that is no field, naming the nearest one.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, settings))]
    for key in mapping:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            mend = f"did you mean {section}.{near[0]}?" if near else f"it has {', '.join(names)}"
            raise ValueError(f"{section}.{key} is not a setting: {mend}")
    return settings(**mapping)
