"""Checks the arguments of every call of the library against the types and shapes in its signature, on request.

    from flax_transformer.checking import check_shapes

    check_shapes()  # before anything else of the library is imported

It is for tests and for finding mistakes: programs run and compile as before, but Python takes longer. It needs
beartype.

jax also builds this library's dataclasses with other things than arrays in their fields: shapes, shardings, or marks of
a leaf. Such an object is not checked.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np

try:
    import beartype
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"flax_transformer.checking checks with beartype ({error}): pip install beartype", name=error.name
    ) from error

# The numeric tower lets an int stand where a float is asked for, as Python's own typing does (PEP 484); beartype alone
# refuses `dropout_rate=0`.
BEARTYPE = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

VALUES = jax.Array, np.ndarray, np.generic, bool, int, float, str


def check_shapes() -> None:
    """Checks all calls of the modules of this library that are imported from now on.

    A wrong type or shape then raises `jaxtyping.TypeCheckError`.

    Raises:
        RuntimeError: a module is imported already, so its calls would not be checked.
    """
    package = __name__.partition(".")[0]
    early = sorted(name for name in sys.modules if name.startswith(f"{package}.") and name != __name__)
    if early:
        raise RuntimeError(f"{early[0]} is imported already and would not be checked: call check_shapes() before that")
    # jaxtyping wants text; the module is imported where it is used.
    jaxtyping.install_import_hook(package, f"importlib.import_module('{__name__}').check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its calls checked; jaxtyping decorates the library with it.

    A function inside a function stays as it is: Python makes it anew in each call of the outer one, and to make its
    check each time takes far longer than what it does.
    """
    if "<locals>" in function.__qualname__:
        return function
    checked = BEARTYPE(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(checked)
    def checked_unless_placeholders(instance: Any, /, *fields: Any, **named_fields: Any) -> Any:
        placeholders = hasattr(type(instance), "_flax_dataclass") and _holds_placeholders((fields, named_fields))
        return (function if placeholders else checked)(instance, *fields, **named_fields)

    return checked_unless_placeholders


def _holds_placeholders(tree: Any) -> bool:
    """Whether a tree holds what jax puts in the place of arrays: no leaves at all, or leaves that are no values."""
    leaves = jax.tree.leaves(tree)
    return not leaves or not all(isinstance(leaf, VALUES) for leaf in leaves)
