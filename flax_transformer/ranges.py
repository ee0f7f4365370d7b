"""Declares the allowed values of each setting next to its default, and checks all settings of a dataclass.

A field is declared as `rows: int = setting(64, Range(at_least=1))`; `check` compares its value with the annotated type
and with the range. This file does not import jax, so a command line can check its options at once.
"""

import collections.abc
import ctypes
import dataclasses
import math
import reprlib
import types
import typing
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting allows.

    Attributes:
        at_least: the smallest allowed number.
        above: allowed numbers are greater than this one.
        at_most: the largest allowed number.
        below: allowed numbers are less than this one.
        within: limits that come from arithmetic or memory rather than from the setting's meaning; an error mentions
            them only if the number exceeds them.
        hint: text that an error adds.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    within: "Range | None" = None
    hint: str = ""

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        named = " and ".join(
            f"{name} {bound:g}" if isinstance(bound, float) else f"{name} {bound}"
            for name, bound in bounds.items()
            if bound is not None
        )
        return f"{named}; {self.hint}" if self.hint else named

    def broken_by(self, value: float) -> "Range | None":
        """This range or `within`, whichever does not contain the number; `None` if both contain it."""
        # The rounded value must be in range too: on a device a decay of 0.999999999 would be 1, an epsilon of 1e-50 0.
        single = _in_float32(value) if isinstance(value, float) else value
        is_inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or min(value, single) > self.above)
            and (self.below is None or max(value, single) < self.below)
        )
        if not is_inside:
            return self
        return None if self.within is None else self.within.broken_by(value)


# jax counts sizes, tokens, ids and steps with 32 bits.
INT32 = Range(at_most=2**31 - 1)
SIZE, COUNT = Range(at_least=1, within=INT32), Range(at_least=0, within=INT32)
# For numbers that are used on the host only.
AT_LEAST_NONE, AT_LEAST_ONE = Range(at_least=0), Range(at_least=1)
SHARE = Range(at_least=0, below=1)
# NumPy does not accept negative seeds, and jax none of more than 63 bits.
SEED = Range(at_least=0, within=Range(at_most=2**63 - 1))
# jax makes a random key from the lowest 32 bits of a seed, so a larger seed would repeat the samples of a smaller one.
SEED_OF_SAMPLES = Range(at_least=0, at_most=2**32 - 1)
# The search settings of both training and translating. With these exponents a length penalty, and a score divided by
# it, are finite in float32 for every length. A larger beam would not fit into memory.
ALPHA = Range(at_least=-5, at_most=5)
BEAM_SIZE = Range(at_least=1, within=Range(at_most=10_000))


def setting(default: Any, allowed: Range | tuple[str, ...]) -> Any:
    """A field of a settings dataclass.

    Args:
        default: the value if none is given.
        allowed: the range of a number (of each number in a sequence), or the strings to choose from.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def setting_fields(settings: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """The field of each setting in a dataclass and in its sections, by its full name, e.g. "training.steps"."""
    fields: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(field.type):
            fields |= setting_fields(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            fields[prefix + field.name] = field
    return fields


def check(settings: Any, section: str = "") -> None:
    """Checks every field of a settings dataclass against its type and its range.

    NumPy's numbers become Python's, whole floats such as 1e5 become ints in fields of that type, and sequences become
    tuples. So settings with equal values compare equal, are hashable and can be written as JSON.

    Args:
        settings: the dataclass, frozen or not.
        section: the prefix of a field's name in errors, e.g. "training".

    Raises:
        ValueError: a field does not allow its value; names the setting, the value and what is allowed.
    """
    for field in dataclasses.fields(settings):
        name = f"{section}.{field.name}" if section else field.name
        value = check_value(name, getattr(settings, field.name), field.type, field.metadata.get("allowed"))
        object.__setattr__(settings, field.name, value)


def check_value(name: str, value: Any, kind: Any, allowed: Range | tuple[str, ...] | None = None) -> Any:
    """Returns the value, converted to its type; raises ValueError as `check` does."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(kind, types.UnionType):  # `int | None`
        if value is None:
            return None
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    if typing.get_origin(kind) is collections.abc.Sequence:
        if isinstance(value, str) or not isinstance(value, collections.abc.Iterable):
            raise ValueError(f"{name} is {_shown(value)}: it must be a list")
        (of,) = typing.get_args(kind)
        return tuple(check_value(name, each, of, allowed) for each in value)
    if isinstance(allowed, tuple):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} is {_shown(value)}: choose one of {', '.join(allowed)}")
        return str(value)
    found = _of_kind(value, kind)
    if found is None:
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        limits = f", {allowed}" if allowed else ""
        raise ValueError(f"{name} is {_shown(value)}: it must be {kinds.get(kind, 'a section of settings')}{limits}")
    if allowed is not None and (broken := allowed.broken_by(found)):
        raise ValueError(f"{name} is {_shown(value)}: it must be {broken}")
    return found


def whole_number(text: str) -> int:
    """The whole number that a person typed, in digits or as 1e5; raises ValueError if it is not one."""
    try:
        return int(text)
    except ValueError:
        number = _of_kind(float(text), int)  # float("many") raises a ValueError too
        if number is None:
            raise
        return number


def _of_kind(value: Any, kind: type) -> Any:
    """The value as a Python value of that type; `None` if it cannot be one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        is_whole = is_number and (isinstance(value, int) or value.is_integer())
        return int(value) if is_whole else None
    if kind is float:
        return float(value) if is_number and math.isfinite(_in_float32(value)) else None
    if kind is bool:
        return bool(value) if isinstance(value, bool) or (is_number and value in (0, 1)) else None
    if kind is str:
        return str(value) if isinstance(value, str) else None
    return value if isinstance(value, kind) else None


def _in_float32(value: float) -> float:
    """The number as a device stores it, in float32; infinity if it is too large."""
    try:
        return ctypes.c_float(value).value
    except OverflowError:  # an int that is too large even for float64
        return math.inf


def _shown(value: Any) -> str:
    return reprlib.repr(value)  # shortens numbers of a thousand digits
