"""Takes the names of text files and leaves their lines, checked before the work begins; writes lines, too.

A line ends with a line feed, or carriage return and line feed, and with nothing else: `str.splitlines` would also split
at U+2028, form feeds and the like, which stand inside sentences, and so shift each later line against its translation.
"""

import codecs
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from etils import epath
from tqdm import tqdm

STANDARD = "-"
_ONE_FOR_ONE = "line i of {} must belong to line i of {}"

Item = TypeVar("Item")


def read_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends and without a byte order mark; "-" is standard input.

    Raises:
        ValueError: it cannot be read, or is not UTF-8; names the line.
    """
    if path == STANDARD:
        yield from _decode(sys.stdin.buffer, "standard input")
        return
    try:
        file = epath.Path(path).open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error}): check the path") from error
    with file:
        yield from _decode(file, path)


def _decode(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            found = f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8"
            raise ValueError(f"{name}:{number}: {found}: convert it to UTF-8, e.g. with iconv") from error


def read_pairs(first: str, second: str) -> Iterator[tuple[str, str]]:
    """Line i of one file with line i of the other; raises ValueError where one of them ends before the other."""
    lines = itertools.zip_longest(read_lines(first), read_lines(second))
    for number, (line, other) in enumerate(lines, start=1):
        if line is None or other is None:
            ended = first if line is None else second
            raise ValueError(f"{_name(ended)} ends after line {number - 1}: {_ONE_FOR_ONE.format(first, second)}")
        yield line, other


def read_columns(path: str) -> Iterator[tuple[str, str]]:
    """The first two columns of each line, parted by tabs; raises ValueError at a line that has no tab."""
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t")
        if len(columns) < 2:
            raise ValueError(f"{_name(path)}:{number}: there is no tab: write the source, a tab, and the target")
        yield columns[0], columns[1]


def count_lines(*paths: str) -> int | None:
    """Reads files through, so that what is wrong with them is known before the work begins, and leaves their length.

    Returns:
        How many lines each has; `None` where none can be read twice, since it comes through a pipe.

    Raises:
        ValueError: as in `read_lines`, or their lengths differ.
    """
    counts = {path: sum(1 for _ in read_lines(path)) for path in paths if not _is_pipe(path)}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{path} has {count} lines" for path, count in counts.items())
        raise ValueError(f"{found}: {_ONE_FOR_ONE.format(*counts)}")
    return next(iter(counts.values()), None)


def _is_pipe(path: str) -> bool:
    return path == STANDARD or Path(path).is_fifo() or Path(path).is_char_device()


def _name(path: str) -> str:
    return "standard input" if path == STANDARD else path


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items each, the last one shorter; what came before an error is handed out before the error."""
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


def check_output(option: str, path: str, inputs: Sequence[str | None]) -> None:
    """Raises ValueError unless a file can be written at `path`, which must be none of `inputs`."""
    target = epath.Path(path)
    if target.is_dir():
        raise ValueError(f"{option} is {path}, a folder: name a file in it")
    # A bucket has no folders before there is a file in them.
    if "://" not in path and not target.parent.is_dir():
        raise ValueError(f"{option} is {path}, but there is no folder {target.parent}: make it, or name another")
    if any(name and os.path.realpath(name) == os.path.realpath(path) for name in inputs):
        raise ValueError(f"{option} is {path}, which is read as well: name another file")


@contextlib.contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """A file to write bytes to, replacing what it holds; "-" is standard output."""
    if path == STANDARD:
        yield sys.stdout.buffer
        return
    with epath.Path(path).open("wb") as file:
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
    """Counts sentences on standard error, where that is a terminal and is not the one that `beside` is written to."""
    crowded = beside == STANDARD and sys.stdout.isatty()
    # To tqdm `None` is "only on a terminal".
    return tqdm(total=total, unit=" sentences", disable=True if crowded else None, dynamic_ncols=True)
