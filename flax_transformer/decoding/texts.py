"""Checks that what a caller gives as texts is an ordered sequence of them."""

import textwrap
from collections.abc import Iterable, Mapping, Set
from typing import Any

from flax_transformer.decoding.results import Translation

# An ordered iterable of str; `as_list` checks each item, and its error names the position of one of another type.
Texts = Iterable[Any]


def as_list(name: str, value: object, also: type = str) -> list[Any]:
    """Returns the items of an ordered iterable of str as a list; raises ValueError that names one of another type.

    Args:
        name: the name of the argument.
        value: the value of the argument; an iterator is read to its end.
        also: another type that items may have.
    """
    kind = type(value).__name__
    if isinstance(value, str | bytes | Translation):
        raise ValueError(f"{name} is one {'string' if isinstance(value, str) else kind}: give a list of them")
    if hasattr(value, "readline"):
        raise ValueError(f"{name} is an open file: give its lines without their ends, as in file.read().split('\\n')")
    if isinstance(value, Set | Mapping) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) != 1:
        raise ValueError(f"{name} is a {kind}, which is not an ordered sequence of texts: give a list")
    texts = list(value)
    for number, text in enumerate(texts):
        if not isinstance(text, str | also):
            found = textwrap.shorten(repr(text), 60, placeholder=" …")
            raise ValueError(f"{name}[{number}] is {found}, of type {type(text).__name__}: give a str")
    return texts
