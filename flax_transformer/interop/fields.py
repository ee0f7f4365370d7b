"""Checks the fields of another library's configuration.

Each field is either read, or must have the one value that can be converted, or has no effect on translations. Any other
field is an error, since it may ask for something that our model does not compute.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

NAME = re.compile(r"[\w-]{1,80}")


@dataclasses.dataclass(frozen=True)
class KnownFields:
    """What is known about the fields of one format.

    Attributes:
        fixed: the fields that can be converted only with the value given here.
        read: the fields that the conversion reads.
        without_effect: the fields that do not affect translations.
    """

    fixed: Mapping[str, Any]
    read: Collection[str]
    without_effect: Collection[str]

    def check(self, place: object, fields: Mapping[str, Any]) -> None:
        """Raises ValueError for a field that cannot be converted or is unknown; `place` says where the fields stand."""
        for name, value in fields.items():
            if name in self.fixed:
                if value not in (None, [], {}) and value != self.fixed[name]:
                    raise ValueError(
                        f"{place}: {name} is {shown(value)}, but only {self.fixed[name]!r} can be converted: choose "
                        "another model"
                    )
            elif name not in self.read and name not in self.without_effect and value not in (None, False, [], {}, ""):
                raise ValueError(
                    f"{place}: {name if NAME.fullmatch(name) else shown(name)} is {shown(value)}, an unknown field: "
                    "remove that line if it does not affect translations"
                )


def shown(value: Any) -> str:
    """A value from a file, as an error shows it: on one line, and not too long."""
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]} …"


def read_flag(place: object, fields: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """Reads a field that is true or false; raises ValueError for anything else."""
    value = default if fields.get(name) is None else fields[name]
    if type(value) is not bool:
        raise ValueError(f"{place}: {name} is {shown(value)}, but must be true or false: download the file again")
    return value


def read_number(place: object, fields: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    """Reads a field that is a whole number; raises ValueError if it is something else, or missing without a default."""
    value = default if fields.get(name) is None else fields[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{place}: {name} is {shown(value)}, but must be a whole number: download the file again")
    return value


def read_json(file: epath.Path) -> dict[str, Any]:
    """Reads the fields of a file; raises ValueError if it is missing or damaged, or holds something else."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} lacks {file.name}: download all files of the model") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it has no fields): download it again")
    return content
