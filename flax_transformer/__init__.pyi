"""Lists the names of `__init__.py` for editors and type checkers, which do not run that file."""

from flax_transformer.attention import KVCache, MultiHeadAttention, dot_product_attention
from flax_transformer.config import TransformerConfig
from flax_transformer.masks import causal_mask, combine_masks, padding_mask, segment_mask
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "Tokens",
    "Transformer",
    "TransformerConfig",
    "causal_mask",
    "combine_masks",
    "dot_product_attention",
    "padding_mask",
    "segment_mask",
]
__version__: str
