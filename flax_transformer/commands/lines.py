"""Reads lines of text files in pairs and chunks for the commands, and opens their output.

How a file is divided into lines is decided in `data/lines.py`.
"""

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

from etils import epath
from tqdm import tqdm

from flax_transformer.data.lines import read_lines
from flax_transformer.files import STANDARD, expand, is_standard_output, is_stream, shown

_ONE_FOR_ONE = "line i of {} must belong to line i of {}"

Item = TypeVar("Item")


def read_all(*paths: str, errors: str = "strict") -> Iterator[tuple[str, ...]]:
    """Line i of all files; raises ValueError if one of them ends before another; `errors` as in `read_lines`."""
    files = [read_lines(path, errors) for path in paths]
    for number, lines in enumerate(itertools.zip_longest(*files), start=1):
        for path, line in zip(paths, lines, strict=True):
            if line is None:
                raise ValueError(f"{shown(path)} ends after line {number - 1}: {_ONE_FOR_ONE.format(*paths)}")
        yield lines


def count_lines(*paths: str) -> int | None:
    """Counts the lines of files, which also finds whatever is wrong with them before the work begins.

    Returns:
        How many lines each has; `None` if all of them are pipes, which cannot be read twice.

    Raises:
        ValueError: as in `read_lines`, or their lengths differ.
    """
    counts = {path: sum(1 for _ in read_lines(path)) for path in paths if not is_stream(path)}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{shown(path)} has {count} lines" for path, count in counts.items())
        raise ValueError(f"{found}: {_ONE_FOR_ONE.format(*counts)}")
    return next(iter(counts.values()), None)


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter; items that precede an error are yielded before it is raised."""
    chunk: list[Item] = []
    failure = None
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except ValueError as error:
        failure = error
    if chunk:
        yield chunk
    if failure:
        raise failure


@contextlib.contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """A file to write bytes to, replacing what it holds; "-" and "/dev/stdout" are standard output."""
    if is_standard_output(path):  # to open /dev/stdout would empty the file behind it
        yield sys.stdout.buffer
        return
    with epath.Path(expand(path)).open("wb") as file:
        yield file


def json_line(fields: Mapping[str, Any]) -> str:
    """An object in one line of JSON; numbers to 6 decimals, since more of a float32 is noise; infinity is null."""
    return json.dumps(_rounded(fields), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [*map(_rounded, value)] if isinstance(value, list | tuple) else value


def progress_bar(total: int | None, *, beside: str = "") -> Any:
    """A progress bar on standard error if that is a terminal, unless the output `beside` goes to a terminal too."""
    crowded = beside == STANDARD and sys.stdout.isatty()
    # To tqdm `None` is "only on a terminal".
    return tqdm(total=total, unit=" sentences", disable=True if crowded else None, dynamic_ncols=True)
