"""Takes a function of the library and leaves it holding each call against its signature, shapes included.

jax builds trees of placeholders too: descriptions of arrays, their places, or objects that only mark a leaf. The fields
of such a tree are no arrays, and are not held against their annotations.
"""

import functools
from collections.abc import Callable
from typing import Any

import beartype
import jax
import numpy as np

# The numeric tower lets an int stand where a float is asked for, as Python's own typing does (PEP 484); beartype alone
# refuses `dropout_rate=0`.
BEARTYPE = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

VALUES = jax.Array, np.ndarray, np.generic, bool, int, float, str


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its calls checked; jaxtyping decorates the library with it."""
    checked = BEARTYPE(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(checked)
    def checked_unless_placeholders(instance: Any, /, *fields: Any, **named_fields: Any) -> Any:
        placeholders = hasattr(type(instance), "_flax_dataclass") and holds_placeholders((fields, named_fields))
        return (function if placeholders else checked)(instance, *fields, **named_fields)

    return checked_unless_placeholders


def holds_placeholders(tree: Any) -> bool:
    """Whether a tree holds what jax puts in the place of arrays: no leaves at all, or leaves that are no values."""
    leaves = jax.tree.leaves(tree)
    return not leaves or not all(isinstance(leaf, VALUES) for leaf in leaves)
