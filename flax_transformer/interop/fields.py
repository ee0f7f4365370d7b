"""Checks what can be converted: the fields of another library's configuration, and the options of ours.

Each of their fields is either read, or must have the one value that can be converted, or has no effect on translations.
Any other field is an error, since it may ask for something that our model does not compute.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from flax_transformer.config import TransformerConfig

NAME = re.compile(r"[\w-]{1,80}")
# Values with which a field asks for nothing.
NOTHING: tuple[Any, ...] = (None, [], {})


@dataclasses.dataclass(frozen=True)
class KnownFields:
    """What is known about the fields of one format.

    Attributes:
        fixed: the fields that can be converted only with the value given here.
        read: the fields that the conversion reads.
        without_effect: the fields that do not affect translations.
        search: settings of a search with the values that change nothing.
    """

    fixed: Mapping[str, Any]
    read: Collection[str]
    without_effect: Collection[str]
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, place: object, fields: Mapping[str, Any]) -> None:
        """Raises ValueError for a field that cannot be converted or is unknown; `place` says where the fields stand."""
        for name, value in fields.items():
            if name in self.fixed:
                if value not in NOTHING and value != self.fixed[name]:
                    raise ValueError(
                        f"{place}: {name} is {shown(value)}, but only {self.fixed[name]!r} can be converted: choose "
                        "another model"
                    )
            elif name in self.search:
                if value not in NOTHING and value != self.search[name]:
                    raise ValueError(
                        f"{place}: {name} is {shown(value)}, a setting of the search, which does not belong to a model "
                        "here: remove that line (translate has --min_length, --no_repeat_ngram, --sample)"
                    )
            elif name not in self.read and name not in self.without_effect and value not in (*NOTHING, False, ""):
                raise ValueError(
                    f"{place}: {name if NAME.fullmatch(name) else shown(name)} is {shown(value)}, an unknown field: "
                    "remove that line if it does not affect translations"
                )


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a file, whose values may be of any type. A field that is null counts as missing.

    Attributes:
        place: where they stand, for errors.
        values: their values by name.
    """

    place: object
    values: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or the default if it is missing."""
        value = self.values.get(name)
        return default if value is None else value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A field that is true or false; raises ValueError for anything else."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "must be true or false: download the file again")
        return value

    def number(self, name: str, default: int | None = None) -> int:
        """A field that is a whole number; raises ValueError if it is anything else, or missing without a default."""
        value = self.get(name, default)
        if type(value) is not int or value < 0:
            raise self._wrong(name, value, "must be a whole number: download the file again")
        return value

    def choice(self, name: str, default: str, choices: Mapping[str, str]) -> str:
        """What `choices` has for a field that is text; raises ValueError for any other value."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self._wrong(name, value, f"only {', '.join(choices)} can be converted: choose another model")
        return choices[value]

    def _wrong(self, name: str, value: Any, problem: str) -> ValueError:
        return ValueError(f"{self.place}: {name} is {shown(value)}, but {problem}")


def shown(value: Any) -> str:
    """A value from a file, as an error shows it: on one line, and not too long."""
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]} …"


def check_options(config: TransformerConfig, wanted: Mapping[str, Collection[Any]], needs: str, remedy: str) -> None:
    """Raises ValueError for an option of our model that another library does not have.

    Args:
        config: the model's config.
        wanted: the values that each option may have there.
        needs: the beginning of what the error says of these values, e.g. "CTranslate2 needs".
        remedy: what to do, for the error.
    """
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r}, but {needs} {' or '.join(map(repr, values))}: {remedy}"
            )
