"""Takes queries, keys, values and an additive mask and leaves what each query gathered (sections 3.2.1 and 3.2.2).

Glossary: B batch, Q query positions, M memory positions, H heads, K size of one head, D = H * K.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.dropout import dropout


def dot_product_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B M H K"],
    value: Float[Array, "B M H K"],
    mask: Float[Array, "#B #H #Q #M"] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    return_weights: bool = False,
) -> Float[Array, "B Q H K"] | tuple[Float[Array, "B Q H K"], Float[Array, "B H Q M"]]:
    """softmax(query key^T / sqrt(K) + mask) value, equation 1 of the paper; the softmax is float32.

    A query that may see nothing (its row of the mask is all -inf) returns zeros and passes back zero gradients.

    Args:
        query: one vector a query and head.
        key: one vector a memory position and head.
        value: one vector a memory position and head.
        mask: 0 where a query may see a memory position, -inf where it may not; `None` hides nothing.
        dropout_rate: share of the weights that are set to zero; the paper drops none.
        dropout_rng: random key; `None` drops nothing.
        return_weights: whether the weights come too, float32, before dropout.

    Returns:
        What each query gathered, in the query's type; with `return_weights` a pair of it and the weights.

    Raises:
        ValueError: the mask has not four dimensions, or is boolean.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhk,bmhk->bhqm", query * scale, key, preferred_element_type=jnp.float32)
    if mask is None:
        weights = jax.nn.softmax(logits)
    else:
        if mask.ndim != 4:
            raise ValueError(f"mask has shape {mask.shape}: give it four dimensions that broadcast to [B, H, Q, M]")
        if mask.dtype == bool:
            raise ValueError("mask is boolean: give 0 and -inf, e.g. jnp.where(allowed, 0.0, -jnp.inf)")
        sees_something = jnp.any(mask > -jnp.inf, axis=-1, keepdims=True)
        # The softmax of a row that is all -inf is NaN, and so is its gradient: such a row is masked after it instead.
        weights = jax.nn.softmax(logits + jnp.where(sees_something, mask, 0.0))
        weights = jnp.where(sees_something, weights, 0.0)
    kept = weights
    if dropout_rng is not None and dropout_rate > 0:
        kept = dropout(weights, dropout_rate, dropout_rng)
    gathered = jnp.einsum("bhqm,bmhk->bhqk", kept.astype(value.dtype), value).swapaxes(1, 2)
    return (gathered, weights) if return_weights else gathered


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of memory positions: of a whole memory, or of the target positions decoded so far.

    They lie as matrix products want them, so that no step of a search has to transpose the whole past.

    Attributes:
        key: the keys of every head.
        value: the values of every head.
    """

    key: Float[Array, "B H K M"]
    value: Float[Array, "B H M K"]

    def write(self, position: Int[Array, ""], new: "KVCache") -> "KVCache":
        """The cache with `new` at `position` and after it; `new` must fit (`Decoder.step` sees to it)."""
        return KVCache(
            key=jax.lax.dynamic_update_slice_in_dim(self.key, new.key, position, axis=3),
            value=jax.lax.dynamic_update_slice_in_dim(self.value, new.value, position, axis=2),
        )


class MultiHeadAttention(nn.Module):
    """Attention of several heads at once, each on its own projection (section 3.2.2).

    Attributes:
        d_model: width of inputs and output, D.
        num_heads: H, which divides it.
        dropout_rate: on the attention weights.
        dtype: of the activations.
    """

    d_model: int
    num_heads: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = "float32"

    def setup(self):
        """Four projections, [D, D] each; raises ValueError where the heads do not divide D."""
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model is {self.d_model}, which num_heads = {self.num_heads} does not divide")
        self.query = self._projection()
        self.key = self._projection()
        self.value = self._projection()
        self.out = self._projection()

    def _projection(self) -> nn.Dense:
        return nn.Dense(self.d_model, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())

    def _split_heads(self, inputs: Float[Array, "B P D"]) -> Float[Array, "B P H K"]:
        return inputs.reshape(*inputs.shape[:2], self.num_heads, self.d_model // self.num_heads)

    def project_memory(self, memory: Float[Array, "B M D"]) -> KVCache:
        """Keys and values of a memory, to attend to once or many times."""
        key, value = self._split_heads(self.key(memory)), self._split_heads(self.value(memory))
        return KVCache(key=key.transpose(0, 2, 3, 1), value=value.swapaxes(1, 2))

    def attend(
        self,
        inputs: Float[Array, "B Q D"],
        memory: KVCache,
        mask: Float[Array, "..."] | None = None,
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q M"] | None]:
        """Attends to keys and values that are there already; arguments as in `__call__`."""
        dropout_rng = None if deterministic or self.dropout_rate == 0 else self.make_rng("dropout")
        query = self._split_heads(self.query(inputs))
        gathered = dot_product_attention(
            query,
            memory.key.transpose(0, 3, 1, 2),
            memory.value.swapaxes(1, 2),
            mask,
            dropout_rate=self.dropout_rate,
            dropout_rng=dropout_rng,
            return_weights=return_weights,
        )
        gathered, weights = gathered if isinstance(gathered, tuple) else (gathered, None)
        return self.out(gathered.reshape(inputs.shape)), weights

    def __call__(
        self,
        inputs: Float[Array, "B Q D"],
        memory: Float[Array, "B M D"],
        mask: Float[Array, "..."] | None = None,
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q M"] | None]:
        """Lets `inputs` gather from `memory`; give both the same array for self-attention.

        Args:
            inputs: what asks.
            memory: what is asked.
            mask: 0 and -inf, broadcasts to [B, H, Q, M].
            deterministic: true switches dropout off.
            return_weights: whether the attention weights are the second result; it is `None` otherwise.
        """
        keys_values = self.project_memory(memory)
        return self.attend(inputs, keys_values, mask, deterministic=deterministic, return_weights=return_weights)
