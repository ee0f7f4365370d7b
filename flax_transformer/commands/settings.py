"""Lists all settings of an experiment, with their defaults, allowed values and meaning, for people and for docs.

Everything comes from the dataclasses in config.py and experiment.py: defaults and ranges from their fields, meanings
from their docstrings.
"""

import argparse
import collections.abc
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: its full name, e.g. "training.steps".
        default: the value if none is given, as it is written in Python.
        allowed: the values that it may have, in words.
        meaning: what its docstring says.
    """

    name: str
    default: str
    allowed: str
    meaning: str


class ListSettings(argparse.Action):
    """The option --list_settings, which prints them and ends the program, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Prints the settings as text, or as the page docs/settings.md."""
        print(_page() if values == "markdown" else _text())
        parser.exit()


def all_settings() -> list[Setting]:
    """Every setting that --config.SECTION.KEY=VALUE changes, in the order of the dataclasses."""
    # numpy loads with it, so not for --help.
    from flax_transformer.experiment import Experiment

    return [setting for _, _, settings in _sections(Experiment) for setting in settings]


def _sections(kind: type, prefix: str = "") -> Iterator[tuple[str, str, list[Setting]]]:
    """The name of each section, what it is for, and its settings without those in sections of it."""
    meanings = _meanings(kind)
    own, inner = [], []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            inner.append(_sections(typing.cast(type, field.type), f"{prefix}{field.name}."))
        else:
            own.append(Setting(prefix + field.name, repr(field.default), _allowed(field), meanings[field.name]))
    if own:
        yield prefix.rstrip("."), (inspect.getdoc(kind) or "").split("\n\n")[0], own
    for sections in inner:
        yield from sections


def _meanings(kind: type) -> dict[str, str]:
    """What the section "Attributes" of a docstring says of each field."""
    _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.+(?:\n     +.+)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _allowed(field: dataclasses.Field) -> str:
    allowed, kind = field.metadata.get("allowed"), field.type
    if isinstance(allowed, tuple):
        return "one of " + ", ".join(repr(each) for each in allowed)
    if typing.get_origin(kind) is collections.abc.Sequence:
        (item,) = typing.get_args(kind)
        return f"{'texts' if item is str else 'whole numbers'}, separated by commas"
    words = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[typing.cast(type, kind)]
    return f"{words}, {allowed}" if allowed else words


def _text() -> str:
    lines = []
    for setting in all_settings():
        lines.append(f"{setting.name} = {setting.default}")
        lines += textwrap.wrap(
            f"{setting.meaning} ({setting.allowed})",
            WIDTH,
            initial_indent=4 * " ",
            subsequent_indent=4 * " ",
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _page() -> str:
    from flax_transformer.experiment import Experiment

    lines = [
        "# All settings",
        "",
        "`make settings` writes this page from `flax_transformer/config.py` and `flax_transformer/experiment.py`;",
        "`flax-transformer train --list_settings` prints the same. A config file sets them, as those in `configs/` do;",
        "on the command line, write `--config.NAME=VALUE`, e.g. `--config.training.steps=1000`.",
        "[training.md](training.md#which-settings-you-may-change-when-you-continue) says which of them may change when",
        "a training continues.",
    ]
    for name, purpose, settings in _sections(Experiment):
        lines += ["", f"## {name}", "", purpose, "", "| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for setting in settings:
            cells = (f"`{setting.name}`", f"`{setting.default}`", setting.allowed, setting.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
