"""Takes token ids and leaves logits: the Transformer of "Attention Is All You Need" in pure Flax.

Importing it loads jax, flax and jaxtyping, no more; data, training and translating load when they are used.
"""

from flax_transformer.attention import KVCache, MultiHeadAttention, dot_product_attention
from flax_transformer.config import TransformerConfig
from flax_transformer.masks import causal_mask, combine_masks, padding_mask, segment_mask
from flax_transformer.model import Transformer

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "Transformer",
    "TransformerConfig",
    "causal_mask",
    "combine_masks",
    "dot_product_attention",
    "padding_mask",
    "segment_mask",
]
__version__ = "0.1.0"
