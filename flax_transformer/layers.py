"""Takes sentences as vectors and leaves them one layer further: the encoder's and the decoder's layer (section 3.1).

Glossary: B batch, S source, T target, M memory positions, D d_model, F d_ff.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flax_transformer.attention import KVCache, MultiHeadAttention
from flax_transformer.config import TransformerConfig
from flax_transformer.dropout import Dropout
from flax_transformer.projections import dense_project

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda inputs: jax.nn.gelu(inputs, approximate=False),
    "swish": jax.nn.swish,
}


class FeedForward(nn.Module):
    """Two linear maps with an activation between, the same at each position (section 3.3, equation 2).

    Attributes:
        d_model: width of inputs and output.
        d_ff: inner width.
        activation: a name in `ACTIVATIONS`.
        dropout_rate: on the inner activations; the paper has none.
        dtype: of the activations.
    """

    d_model: int
    d_ff: int
    activation: str = "relu"
    dropout_rate: float = 0.0
    dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, inputs: Float[Array, "B S D"], *, deterministic: bool) -> Float[Array, "B S D"]:
        """Maps each position; `deterministic` switches dropout off."""
        options = {
            "dtype": self.dtype,
            "kernel_init": nn.initializers.xavier_uniform(),
            "dot_general": dense_project,
        }
        inner = nn.Dense(self.d_ff, name="inner", **options)(inputs)
        inner = ACTIVATIONS[self.activation](inner)
        inner = Dropout(self.dropout_rate)(inner, deterministic=deterministic)
        return nn.Dense(self.d_model, name="outer", **options)(inner)


def layer_norm(config: TransformerConfig) -> nn.LayerNorm:
    """The model's LayerNorm, computed in float32."""
    return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=config.dtype)


def _attention(config: TransformerConfig) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        config.attention_dropout_rate,
        config.dtype,
        config.attention_implementation,
    )


def _feed_forward(config: TransformerConfig) -> FeedForward:
    return FeedForward(config.d_model, config.d_ff, config.activation, config.activation_dropout_rate, config.dtype)


class _Layer(nn.Module):
    """What both layers share: how a sub-layer is wrapped."""

    config: TransformerConfig

    def _before(self, norm: nn.LayerNorm, inputs: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return norm(inputs) if self.config.norm == "pre" else inputs

    def _after(
        self, norm: nn.LayerNorm, inputs: Float[Array, "B S D"], outputs: Float[Array, "B S D"], deterministic: bool
    ) -> Float[Array, "B S D"]:
        """Dropout on the sub-layer's output, then the residual, then (post) the norm: sections 3.1 and 5.4."""
        summed = inputs + self.dropout(outputs, deterministic=deterministic)
        return norm(summed) if self.config.norm == "post" else summed


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward network, each with a residual and a LayerNorm (section 3.1).

    Attributes:
        config: the model's.
    """

    def setup(self):
        """The sub-layers, named as a checkpoint's reader would."""
        self.self_attention = _attention(self.config)
        self.self_attention_norm = layer_norm(self.config)
        self.feed_forward = _feed_forward(self.config)
        self.feed_forward_norm = layer_norm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(
        self,
        inputs: Float[Array, "B S D"],
        mask: Float[Array, "..."] | None = None,
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B H S S"] | None]:
        """Encodes one layer further.

        Args:
            inputs: one vector a source position.
            mask: which source positions see each other; broadcasts to [B, H, S, S].
            deterministic: true switches dropout off.
            return_weights: whether the attention weights are the second result; it is `None` otherwise.
        """
        queries = self._before(self.self_attention_norm, inputs)
        outputs, weights = self.self_attention(
            queries, queries, mask, deterministic=deterministic, return_weights=return_weights
        )
        inputs = self._after(self.self_attention_norm, inputs, outputs, deterministic)

        outputs = self._before(self.feed_forward_norm, inputs)
        outputs = self.feed_forward(outputs, deterministic=deterministic)
        return self._after(self.feed_forward_norm, inputs, outputs, deterministic), weights


class DecoderLayer(_Layer):
    """Masked self-attention, attention to the encoder's memory and a feed-forward network (section 3.1).

    Attributes:
        config: the model's.
    """

    def setup(self):
        """The sub-layers, named as a checkpoint's reader would."""
        self.self_attention = _attention(self.config)
        self.self_attention_norm = layer_norm(self.config)
        self.cross_attention = _attention(self.config)
        self.cross_attention_norm = layer_norm(self.config)
        self.feed_forward = _feed_forward(self.config)
        self.feed_forward_norm = layer_norm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def project_memory(self, memory: Float[Array, "B S D"]) -> KVCache:
        """The keys and values of the encoder's memory, computed once a sentence."""
        return self.cross_attention.project_memory(memory)

    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        memory: KVCache,
        self_mask: Float[Array, "..."] | None = None,
        memory_mask: Float[Array, "..."] | None = None,
        *,
        deterministic: bool,
        cache: KVCache | None = None,
        write_at: Int[Array, ""] | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache, tuple[Array | None, Array | None]]:
        """Decodes one layer further: a whole target at once, or with a cache the positions that come next.

        Args:
            inputs: one vector a target position; with a cache, of every hypothesis of the sentence.
            memory: keys and values of the encoder's memory, from `project_memory`.
            self_mask: which target positions see each other; broadcasts to [B, H, T, M].
            memory_mask: which source positions a target position sees; broadcasts to [B, H, T, S].
            deterministic: true switches dropout off.
            cache: keys and values of the target positions so far.
            write_at: where in the cache the inputs stand.
            return_weights: whether the attention weights come too.

        Returns:
            The outputs; the keys and values of the target so far; the weights of self- and of cross-attention,
            each `None` unless asked for.
        """
        options = {"deterministic": deterministic, "return_weights": return_weights}

        queries = self._before(self.self_attention_norm, inputs)
        keys_values = self.self_attention.project_memory(queries)
        if cache is not None:
            assert write_at is not None, "a cache is written somewhere"
            keys_values = cache.write(write_at, keys_values)
        outputs, self_weights = self.self_attention.attend(queries, keys_values, self_mask, **options)
        inputs = self._after(self.self_attention_norm, inputs, outputs, deterministic)

        queries = self._before(self.cross_attention_norm, inputs)
        outputs, cross_weights = self.cross_attention.attend(queries, memory, memory_mask, **options)
        inputs = self._after(self.cross_attention_norm, inputs, outputs, deterministic)

        outputs = self._before(self.feed_forward_norm, inputs)
        outputs = self.feed_forward(outputs, deterministic=deterministic)
        outputs = self._after(self.feed_forward_norm, inputs, outputs, deterministic)
        return outputs, keys_values, (self_weights, cross_weights)
