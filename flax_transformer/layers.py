"""One layer of the encoder and one of the decoder (section 3.1), made of attention and feed-forward sub-layers.

Glossary: B batch, S source, T target, M memory positions, N hypotheses of each sentence, D d_model, F d_ff.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.attention import KVCache, MultiHeadAttention
from flax_transformer.config import TransformerConfig
from flax_transformer.dropout import Dropout
from flax_transformer.projections import dense
from flax_transformer.recurrence import SSRU

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda inputs: jax.nn.gelu(inputs, approximate=False),
    "quick_gelu": lambda inputs: inputs * jax.nn.sigmoid(1.702 * inputs),
    "swish": jax.nn.swish,
}


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, the same at each position (section 3.3, equation 2).

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
        """Transforms each position on its own; `deterministic` switches dropout off."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: give the name of one of {', '.join(ACTIVATIONS)}")
        inner = dense(self.d_ff, self.dtype, name="inner")(inputs)
        inner = ACTIVATIONS[self.activation](inner)
        inner = Dropout(self.dropout_rate)(inner, deterministic=deterministic)
        return dense(self.d_model, self.dtype, name="outer")(inner)


def layer_norm(config: TransformerConfig) -> nn.LayerNorm:
    """The model's LayerNorm, computed in float32."""
    return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=config.dtype)


def _attention(config: TransformerConfig) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model, config.num_heads, config.attention_dropout_rate, config.dtype, config.attention_implementation
    )


class _Layer(nn.Module):
    """What both layers have: a feed-forward network, and the connection around every sub-layer."""

    config: TransformerConfig

    def setup(self):
        """Attribute names become checkpoint paths."""
        config = self.config
        self.feed_forward = FeedForward(
            config.d_model, config.d_ff, config.activation, config.activation_dropout_rate, config.dtype
        )
        self.feed_forward_norm = layer_norm(config)
        self.dropout = Dropout(config.dropout_rate)

    def _add_self_attention(self) -> None:
        self.self_attention = _attention(self.config)
        self.self_attention_norm = layer_norm(self.config)

    def _connect(
        self,
        sub_layer: Callable[[Array], tuple[Array, Any]],
        norm: nn.LayerNorm,
        inputs: Float[Array, "B S D"],
        deterministic: bool,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """LayerNorm(x + Dropout(sub_layer(x))), or x + Dropout(sub_layer(LayerNorm(x))): sections 3.1 and 5.4.

        A sub-layer returns its outputs and anything else, such as attention weights, which is passed on.
        """
        pre = self.config.norm == "pre"
        outputs, extra = sub_layer(norm(inputs) if pre else inputs)
        summed = inputs + self.dropout(outputs, deterministic=deterministic)
        return summed if pre else norm(summed), extra

    def _connect_feed_forward(self, inputs: Float[Array, "B S D"], deterministic: bool) -> Float[Array, "B S D"]:
        outputs, _ = self._connect(
            lambda x: (self.feed_forward(x, deterministic=deterministic), None),
            self.feed_forward_norm,
            inputs,
            deterministic,
        )
        return outputs


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward network, each with a residual and a LayerNorm (section 3.1).

    Attributes:
        config: that of the model.
    """

    def setup(self):
        """Attribute names become checkpoint paths."""
        super().setup()
        self._add_self_attention()

    def __call__(
        self,
        inputs: Float[Array, "B S D"],
        mask: Float[Array, "..."] | None = None,
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B H S S"] | None]:
        """Applies the layer.

        Args:
            inputs: one vector for each source position.
            mask: which source positions see each other; broadcasts to [B, H, S, S].
            deterministic: true switches dropout off.
            return_weights: whether to return the attention weights, too.

        Returns:
            The outputs [B, S, D], and the weights of the self-attention [B, H, S, S], float32, or `None`.

        Raises:
            ValueError: the inputs or the mask are wrong (see `MultiHeadAttention`).
        """
        hidden, weights = self._connect(
            lambda x: self.self_attention(x, x, mask, deterministic=deterministic, return_weights=return_weights),
            self.self_attention_norm,
            inputs,
            deterministic,
        )
        return self._connect_feed_forward(hidden, deterministic), weights


class DecoderLayer(_Layer):
    """Masked self-attention, attention to the encoder's memory and a feed-forward network (section 3.1).

    With `decoder_autoregression="ssru"` a recurrent unit takes the place of the self-attention.

    Attributes:
        config: that of the model.
    """

    def setup(self):
        """Attribute names become checkpoint paths."""
        super().setup()
        if self.config.decoder_autoregression == "ssru":
            self.recurrence = SSRU(self.config.d_model, self.config.dtype)
            self.recurrence_norm = layer_norm(self.config)
        else:
            self._add_self_attention()
        self.cross_attention = _attention(self.config)
        self.cross_attention_norm = layer_norm(self.config)

    def project_memory(self, memory: Float[Array, "B S D"]) -> KVCache:
        """Keys and values of the encoder's memory, computed once for each sentence."""
        return self.cross_attention.project_memory(memory)

    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        memory: KVCache,
        self_mask: Float[Array, "..."] | None = None,
        memory_mask: Float[Array, "..."] | None = None,
        begins: Bool[Array, "B T"] | None = None,
        *,
        deterministic: bool,
        cache: KVCache | Float[Array, "B N D"] | None = None,
        write_at: Int[Array, ""] | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | Float[Array, "B N D"], tuple[Array | None, Array | None]]:
        """Applies the layer to a whole target at once or, with a cache, to the next positions.

        Args:
            inputs: one vector for each target position; with a cache, of every hypothesis of the sentence.
            memory: keys and values of the encoder's memory, from `project_memory`.
            self_mask: which target positions see each other; broadcasts to [B, H, T, M]. Self-attention alone needs it.
            memory_mask: which source positions a target position sees; broadcasts to [B, H, T, S].
            begins: where a sentence begins in a row of several sentences. The recurrent unit alone needs it.
            deterministic: true switches dropout off.
            cache: what the layer keeps of the target positions so far: their keys and values, or the state of its
                recurrent unit for each hypothesis.
            write_at: the place of the inputs in a cache of keys and values.
            return_weights: whether to return the attention weights too.

        Returns:
            The outputs, the cache after these positions, and the weights of self-attention and cross-attention, which
            are `None` unless asked for; a recurrent unit has none.

        Raises:
            ValueError: `memory` is not from `project_memory`, or the cache is not this layer's or has no `write_at`.
        """
        if not isinstance(memory, KVCache):
            raise ValueError("memory is an array: give layer.project_memory(memory), its keys and values")
        options = {"deterministic": deterministic, "return_weights": return_weights}

        def attend(x: Array) -> tuple[Array, Any]:
            keys_values = self.self_attention.project_memory(x)
            overflows = None
            if cache is not None:
                if self.config.dtype == "float16":
                    # Hypotheses of a sentence share the cache, and a mask does not hide NaN: 0 * NaN is NaN. So only
                    # the outputs of the position that overflows become NaN.
                    finite = jnp.isfinite(keys_values.key).all((1, 2)) & jnp.isfinite(keys_values.value).all((1, 3))
                    overflows = ~finite[..., None]
                    keys_values = jax.tree.map(lambda new: jnp.where(jnp.isfinite(new), new, 0), keys_values)
                if not isinstance(cache, KVCache) or write_at is None:
                    raise ValueError("self-attention needs a cache of keys and values, and write_at, a place in it")
                keys_values = cache.write(write_at, keys_values)
            outputs, weights = self.self_attention.attend(x, keys_values, self_mask, **options)
            if overflows is not None:
                outputs = jnp.where(overflows, jnp.nan, outputs)
            return outputs, (keys_values, weights)

        def recur(x: Array) -> tuple[Array, Any]:
            if isinstance(cache, KVCache):
                raise ValueError("a recurrent unit has a state [B, N, D], but cache has keys and values")
            outputs, state = self.recurrence(x, begins, cache)
            return outputs, (state, None)

        if self.config.decoder_autoregression == "ssru":
            sub_layer, norm = recur, self.recurrence_norm
        else:
            sub_layer, norm = attend, self.self_attention_norm
        hidden, (kept, self_weights) = self._connect(sub_layer, norm, inputs, deterministic)
        hidden, cross_weights = self._connect(
            lambda x: self.cross_attention.attend(x, memory, memory_mask, **options),
            self.cross_attention_norm,
            hidden,
            deterministic,
        )
        outputs = self._connect_feed_forward(hidden, deterministic)
        return outputs, kept, (self_weights, cross_weights)
