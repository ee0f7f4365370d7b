"""The Transformer of "Attention Is All You Need" in pure Flax.

Importing the package loads nothing else. Each name below loads its module when it is first used, which imports only
jax, flax and jaxtyping. `__init__.pyi` lists the same names for editors and type checkers.
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
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    """The names that have been loaded, and those that have not."""
    return sorted({*globals(), *__all__})
