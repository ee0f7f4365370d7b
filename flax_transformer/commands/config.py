"""Reads the config that --config names and applies the settings that the command line changes.

A config is a Python file whose function `get_config` returns an experiment as a `ConfigDict`, or the `config.json` of a
work directory. The files of the folder `configs/` come with the library, so they can be given by name.
"""

import argparse
import collections.abc
import contextlib
import difflib
import json
import re
import runpy
import traceback
import typing
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_transformer.commands.options import BOOLEANS, filled
from flax_transformer.commands.settings import ListSettings
from flax_transformer.files import expand
from flax_transformer.ranges import check_value, setting_fields

PACKAGE = Path(__file__).parents[1]
CHANGE = re.compile(r"--config\.(?P<name>[^=]+)(=(?P<value>.*))?|--noconfig\.(?P<false>[^=]+)", re.DOTALL)

# The name of a setting, e.g. "training.steps", and the text that it is set to.
Change = tuple[str, str]


def add_config_option(parser: argparse.ArgumentParser, *, otherwise: str = "") -> None:
    """Declares --config and --list_settings. A parser that has them also accepts --config.SECTION.KEY=VALUE.

    Args:
        parser: the parser.
        otherwise: what is meant without --config, for --help; it is required if this is not given.
    """
    parser.add_argument(
        "--config",
        type=filled,
        required=not otherwise,
        metavar="CONFIG",
        help=f"the experiment: one of {', '.join(config_names())}, the path of a config file, or the config.json of a "
        "work directory; text after a colon is passed to the function get_config of the file, e.g. finetune:runs/opus"
        + (f" ({otherwise})" if otherwise else ""),
    )
    parser.add_argument(
        "--list_settings",
        action=ListSettings,
        nargs="?",
        choices=("text", "markdown"),
        help="list all settings of a config with their defaults and meaning, and exit",
    )
    parser.set_defaults(changes=[])


def config_of(workdir: str) -> str:
    """The config with which the training in a work directory goes on.

    Raises:
        ValueError: there is no training.
    """
    from etils import epath  # not for --help

    config = f"{workdir.rstrip('/')}/config.json"
    if epath.Path(config).exists():
        return config
    raise ValueError(
        f"--config is missing, and {workdir} has no training that could go on without it: name the experiment, e.g. "
        f"--config=quickstart; the library has {', '.join(config_names())}"
    )


def config_names() -> list[str]:
    """The names of the configs that come with the library."""
    return sorted(path.stem for path in _folder().glob("*.py"))


def _folder() -> Path:
    """The folder of these configs, which stands inside the package in a wheel and beside it in a checkout."""
    packaged = PACKAGE / "configs"
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


def split_changes(words: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Separates the words of a command line that change settings from the others.

    A setting that is true or false may be given without a value: `--config.vocabulary.joint`, or
    `--noconfig.vocabulary.joint` for false.
    """
    others: list[str] = []
    changes: list[Change] = []
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        found = CHANGE.fullmatch(word)
        if not found:
            others.append(word)
        elif found["false"]:
            changes.append((found["false"], "false"))
        elif found["value"] is not None:
            changes.append((found["name"], found["value"]))
        else:
            has_value = waiting and not waiting[-1].startswith("--")
            changes.append((found["name"], waiting.pop() if has_value else "true"))
    return others, changes


def read_config(config: str, changes: Sequence[Change]) -> dict[str, Any]:
    """The settings of a config with the changes of the command line, as `Experiment.from_mapping` takes them.

    Args:
        config: the name or the path of a config, and after a colon what its `get_config` is given.
        changes: in the order of the command line; the last one of a setting counts.

    Raises:
        ValueError: there is no such config or setting, the config cannot be read, or a changed value is not allowed.
    """
    # numpy loads with it, so not for --help.
    from flax_transformer.experiment import Experiment
    from flax_transformer.moved_settings import MOVED

    fields = setting_fields(Experiment)
    moved = {f"training.{old}": f"training.{new}" for old, new in MOVED.items()}
    texts: dict[str, list[str]] = {}
    for written, text in changes:
        name = moved.get(written, written)
        if name not in fields:
            raise ValueError(_unknown_setting(name, fields, moved))
        if name != written:
            warnings.warn(f"--config.{written} is --config.{name} now; the old name still works", stacklevel=2)
        texts.setdefault(name, []).append(text)
    settings = _load(config)
    # A field of the config may refer to another one, so they are set where they are, and checked here.
    with settings.unlocked(), settings.ignore_type():
        for name, given in texts.items():
            *sections, key = name.split(".")
            section = settings
            for part in sections:
                if part not in section:
                    section[part] = type(settings)()
                section = section[part]
            field = fields[name]
            section[key] = check_value(name, _value(given, field.type), field.type, field.metadata.get("allowed"))
    return settings.to_dict()


def _unknown_setting(name: str, known: Collection[str], moved: Mapping[str, str]) -> str:
    inside = [each for each in known if each.startswith(f"{name}.")]
    if inside:
        return f"--config.{name} is a section, not a setting: set one of {', '.join(inside)}"

    def likeness(other: str) -> tuple[float, float]:
        pairs = ((name.rpartition(".")[2], other.rpartition(".")[2]), (name, other))
        key, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return key, whole

    nearest = max([*known, *moved], key=likeness)
    if likeness(nearest)[0] >= 0.6:
        return f"--config.{name} is not a setting: did you mean --config.{moved.get(nearest, nearest)}?"
    sections = sorted({each.partition(".")[0] for each in known})
    return f"--config.{name} is not a setting: settings are in the sections {', '.join(sections)}"


def _without(pairs: Sequence[tuple[str, str]], text: str) -> str:
    """What stands between a pair of brackets around the whole text; the text, if there are none."""
    for begin, end in pairs:
        if text.startswith(begin) and text.find(end) == len(text) - 1:
            return text[1:-1]
    return text


def _value(texts: Sequence[str], kind: Any) -> Any:
    """The value that a setting of this type is given; text that cannot be of the type stays text, for `check_value`."""
    if typing.get_origin(kind) is collections.abc.Sequence:
        # Written "(1, 2)", "1,2", or by giving the option several times.
        (of,) = typing.get_args(kind)
        around = [("(", ")"), ("[", "]")] if of is int else [("(", ")")]  # square brackets may belong to a text
        parts = [part.strip() for text in texts for part in _without(around, text.strip()).split(",")]
        return tuple(_value([part], of) for part in parts if part)
    text = texts[-1]
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if kind in (int, float):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text


def _load(config: str) -> Any:
    """What the config's `get_config` returns, as a `ConfigDict`."""
    from ml_collections import ConfigDict

    from flax_transformer.moved_settings import MOVED, by_new_names

    if config.endswith(".json"):
        return ConfigDict(by_new_names(_read_json(config)))
    name, colon, argument = config.partition(":")
    path = str(_find(name))
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ValueError("it has no function get_config, which returns the experiment")
        settings = get_config(argument) if colon else get_config()
        if not isinstance(settings, ConfigDict | dict):
            raise ValueError(f"its get_config returns a {type(settings).__name__}: it must return a ConfigDict")
        return ConfigDict(by_new_names(_with_references(ConfigDict(settings))))
    except ValueError as error:
        raise ValueError(f"--config={config}: {error}") from error
    except Exception as error:  # The file is the user's program: it may raise anything.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        moved = [f" (training.{old} is training.{new} now)" for old, new in MOVED.items() if f"'{old}'" in str(error)]
        raise ValueError(f"--config={config}: {where}: {type(error).__name__}: {error}{''.join(moved)}") from error


def _read_json(config: str) -> dict[str, Any]:
    """The settings of a training in the `config.json` of its work directory."""
    from etils import epath

    try:
        settings = json.loads(epath.Path(expand(config)).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--config={config} cannot be read ({error}): give the one of a work directory") from error
    if not isinstance(settings, dict) or "training" not in settings:
        folder = config.removesuffix("config.json").rstrip("/") or "."
        raise ValueError(
            f"--config={config} describes a model and no training: train it further in another --workdir with "
            f"--config=finetune:{folder}"
        )
    return settings


def _with_references(settings: Any) -> dict[str, Any]:
    """A `ConfigDict` as nested dictionaries in which fields that refer to others still do."""
    return {
        name: _with_references(value) if isinstance(value, type(settings)) else value
        for name, value in settings.items(preserve_field_references=True)
    }


def _find(name: str) -> Path:
    path = Path(expand(name))
    if path.is_file():
        return path
    if name in config_names():
        return _folder() / f"{name}.py"
    raise ValueError(
        f"--config: {name} is neither a file nor one of the configs that come with the library "
        f"({', '.join(config_names())}): correct the path, or give one of these names"
    )
