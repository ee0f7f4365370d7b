"""Takes token ids and leaves logits: the Transformer of "Attention Is All You Need" in pure Flax.

Importing it loads nothing; each name below loads its module when it is first asked for, and with it jax, flax and
jaxtyping, no more. `__init__.pyi` tells editors and type checkers the same names.
"""

import importlib
from typing import Any

_HOMES = {
    "KVCache": "attention",
    "MultiHeadAttention": "attention",
    "Tokens": "tokens",
    "Transformer": "model",
    "TransformerConfig": "config",
    "causal_mask": "masks",
    "combine_masks": "masks",
    "dot_product_attention": "attention",
    "padding_mask": "masks",
    "segment_mask": "masks",
}
__all__ = list(_HOMES)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # asked for again, it is found without this function
    return value


def __dir__() -> list[str]:
    """The names that are loaded, and those that are not yet."""
    return sorted({*globals(), *__all__})
