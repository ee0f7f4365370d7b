"""Scaled dot-product attention and multi-head attention (sections 3.2.1 and 3.2.2).

Glossary: B batch, Q query positions, M memory positions, H heads, K size of one head, D = H * K.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.dropout import dropout
from flax_transformer.masks import check_mask, count_seen
from flax_transformer.projections import dense

# Minimum number of queries for which "auto" selects cuDNN: one tile of its kernel. Steps of a search have fewer.
TILE = 64


def dot_product_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B M H K"],
    value: Float[Array, "B M H K"],
    mask: Float[Array, "#B #H #Q #M"] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    return_weights: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B Q H K"] | tuple[Float[Array, "B Q H K"], Float[Array, "B H Q M"]]:
    """softmax(query key^T / sqrt(K) + mask) value, equation 1 of the paper; the softmax is float32.

    A query that may see nothing (its row of the mask is all -inf) gives zeros and has zero gradients.

    "cudnn" is the fused kernel of jax.nn.dot_product_attention, which never holds the weights of all pairs (Dao, 2023).
    It needs an NVIDIA GPU of compute capability 8.0 or more (Ampere) as jax's default device, bfloat16 or float16, a
    head size that is a multiple of 8 up to 128, and even lengths if there is a mask; it can neither drop weights nor
    return them. "auto" selects it where all of that holds and there are at least 64 queries, and "xla" elsewhere. The
    choice is made while tracing: a program that is traced on such a machine for another device must use "xla".

    Args:
        query: one vector for each query and head.
        key: one vector for each memory position and head.
        value: one vector for each memory position and head.
        mask: 0 where a query may see a memory position, -inf where it may not; `None` hides nothing. Anything else,
            such as the 1 and 0 of `flax.linen.make_causal_mask` or a finite bias, is an error where the values are
            known, and inside `jit`, where they are not, makes the result of its query NaN.
        dropout_rate: share of the weights that are set to zero; 0 in the paper.
        dropout_rng: random key; `None` drops nothing.
        return_weights: whether to return the weights too, float32, before dropout.
        implementation: "auto", "xla" or "cudnn".

    Returns:
        The weighted sum of the values for each query, in the query's type; with `return_weights` a pair of it and the
        weights.

    Raises:
        ValueError: query, key and value do not have these four dimensions, or are not floats; the mask does not have
            four dimensions that broadcast, is boolean or of integers, or is known to hold anything but 0 and -inf; or
            "cudnn" is asked for where it cannot run.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_inputs(query, key, value)
    if mask is not None:
        check_mask(mask)
        full = (*query.shape[:1], query.shape[2], query.shape[1], key.shape[1])
        if any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
            raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to [B, H, Q, M], here {full}")
    if dropout_rng is None:
        dropout_rate = 0.0
    if _takes_cudnn(implementation, query, key, mask, dropout_rate, return_weights):
        return _cudnn_attention(query, key, value, mask)
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhk,bmhk->bhqm", query * scale, key, preferred_element_type=jnp.float32)
    if mask is None:
        weights = jax.nn.softmax(logits)
    else:
        seen = count_seen(mask)
        # The softmax of a row that is all -inf is NaN, and so is its gradient: such rows are masked afterwards instead.
        weights = jax.nn.softmax(logits + jnp.where(seen > 0, mask, 0.0))
        weights = jnp.where(seen > 0, weights, seen)
    kept = weights
    if dropout_rng is not None and dropout_rate > 0:
        kept = dropout(weights, dropout_rate, dropout_rng)
    gathered = jnp.einsum("bhqm,bmhk->bhqk", kept.astype(value.dtype), value).swapaxes(1, 2).astype(query.dtype)
    return (gathered, weights) if return_weights else gathered


def _check_inputs(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = query.shape, key.shape, value.shape
    is_right = all(len(shape) == 4 for shape in shapes) and key.shape == value.shape
    if not (is_right and (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])):
        raise ValueError(
            f"query, key and value have shapes {', '.join(map(str, shapes))}: give [B, Q, H, K] and twice "
            "[B, M, H, K]; MultiHeadAttention makes them from [B, Q, D] and [B, M, D]"
        )
    types = query.dtype, key.dtype, value.dtype
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in types):
        raise ValueError(f"query, key and value are {', '.join(map(str, types))}: convert them to floats")


def _cudnn_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B M H K"],
    value: Float[Array, "B M H K"],
    mask: Float[Array, "#B #H #Q #M"] | None,
) -> Float[Array, "B Q H K"]:
    if mask is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    seen = count_seen(mask)
    # What the kernel does with a row that sees nothing is not defined: such rows see everything and are set to zero
    # afterwards. The kernel takes a boolean mask as a 16-bit bias, and from jax 0.11.1 on computes no gradient for it.
    # It broadcasts B and H by itself, but not the lengths.
    allowed = jnp.broadcast_to((mask == 0) | ~(seen > 0), (*mask.shape[:2], query.shape[1], key.shape[1]))
    gathered = jax.nn.dot_product_attention(query, key, value, mask=allowed, implementation="cudnn")
    seen = seen.swapaxes(1, 2)
    return jnp.where(seen > 0, gathered, seen.astype(gathered.dtype))


def _takes_cudnn(
    implementation: str,
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B M H K"],
    mask: Float[Array, "#B #H #Q #M"] | None,
    dropout_rate: float,
    return_weights: bool,
) -> bool:
    """Whether to use cuDNN; raises ValueError where it is asked for and cannot run."""
    if implementation == "xla":
        return False
    if implementation not in ("auto", "cudnn"):
        raise ValueError(f"implementation is {implementation!r}: choose one of auto, xla, cudnn")
    (_, queries, _, size), memory = query.shape, key.shape[1]
    obstacle = None
    if not _gpu_has_cudnn():
        device = get_default_device().device_kind
        obstacle = f"it needs an NVIDIA GPU of compute capability 8.0 or more, jax runs on {device}"
    elif query.dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"activations are {query.dtype}: make them bfloat16 or float16"
    elif dropout_rate > 0:
        obstacle = f"the dropout rate on the weights is {dropout_rate}: make it 0"
    elif return_weights:
        obstacle = "the weights are asked for, which it never holds: do without"
    elif size % 8 or size > 128:
        obstacle = f"the head size is {size}: make it a multiple of 8, at most 128"
    elif mask is not None and (queries % 2 or memory % 2):
        # Only gradients need even lengths, but it is not known here whether there will be one.
        obstacle = f"there are {queries} queries and {memory} memory positions under a mask: make both even"
    if implementation == "auto":
        return obstacle is None and queries >= TILE
    if obstacle is not None:
        raise ValueError(f'implementation is "cudnn" and {obstacle}; or choose "auto" or "xla"')
    return True


def _gpu_has_cudnn() -> bool:
    """Whether jax's default device is a GPU of Ampere or later; its CUDA backend does not start without cuDNN."""
    device = get_default_device()
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of a whole memory, or of the target positions decoded so far.

    Their layouts are those that matrix products need, so that no step of a search transposes the whole cache.

    Attributes:
        key: keys of all heads.
        value: values of all heads.
    """

    key: Float[Array, "B H K M"]
    value: Float[Array, "B H M K"]

    def write(self, position: Int[Array, ""], new: "KVCache") -> "KVCache":
        """The cache with `new` written at `position`; `new` must fit, which `Decoder.step` checks."""
        return KVCache(
            key=jax.lax.dynamic_update_slice_in_dim(self.key, new.key, position, axis=3),
            value=jax.lax.dynamic_update_slice_in_dim(self.value, new.value, position, axis=2),
        )


class MultiHeadAttention(nn.Module):
    """Attention with several heads in parallel, each with its own projections (section 3.2.2).

    Attributes:
        d_model: width of inputs and output, D.
        num_heads: H, which divides it.
        dropout_rate: on the attention weights.
        dtype: of the activations.
        implementation: as in `dot_product_attention`.
    """

    d_model: int
    num_heads: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = "float32"
    implementation: str = "auto"

    def setup(self):
        """Makes four projections, [D, D] each; raises ValueError if the number of heads does not divide D."""
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model is {self.d_model}, which num_heads = {self.num_heads} does not divide")
        self.query = dense(self.d_model, self.dtype)
        self.key = dense(self.d_model, self.dtype)
        self.value = dense(self.d_model, self.dtype)
        self.out = dense(self.d_model, self.dtype)

    def _split_heads(self, inputs: Float[Array, "B P D"]) -> Float[Array, "B P H K"]:
        if inputs.ndim != 3:
            raise ValueError(f"inputs or memory have shape {inputs.shape}: give [B, positions, D], e.g. x[None]")
        return inputs.reshape(*inputs.shape[:2], self.num_heads, self.d_model // self.num_heads)

    def project_memory(self, memory: Float[Array, "B M D"]) -> KVCache:
        """The keys and values of a memory, which can then be attended to any number of times."""
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
        """Attends to projected keys and values; other arguments, results and errors as in `__call__`."""
        if inputs.shape[-1] != self.d_model:
            raise ValueError(f"inputs have shape {inputs.shape}, and d_model is {self.d_model}: give [B, Q, d_model]")
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
            # Parameters do not depend on it, so a model can be initialised and loaded on any machine.
            implementation="xla" if self.is_initializing() else self.implementation,
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
        """Attends from `inputs` to `memory`; for self-attention both are the same array.

        Args:
            inputs: the vectors that queries are made of.
            memory: the vectors that keys and values are made of.
            mask: 0 and -inf, broadcasts to [B, H, Q, M].
            deterministic: true switches dropout off.
            return_weights: whether to return the attention weights, too.

        Returns:
            The gathered vectors [B, Q, D], and the weights [B, H, Q, M], float32, or `None`.

        Raises:
            ValueError: inputs or memory have another shape, or the mask is wrong (see `dot_product_attention`).
        """
        keys_values = self.project_memory(memory)
        return self.attend(inputs, keys_values, mask, deterministic=deterministic, return_weights=return_weights)
