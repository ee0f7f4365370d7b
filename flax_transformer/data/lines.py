"""Reads the lines of text files; all sentences that this library reads from files come through here.

A line ends only with a line feed, or a carriage return and a line feed. `str.splitlines` would also split at U+2028,
form feeds and the like, which occur inside sentences, and every later line would then face the wrong translation.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from etils import epath

from flax_transformer.files import STANDARD, expand, shown

# The first bytes of compressed files, and how they are compressed.
_COMPRESSED = (
    (rb"\x1f\x8b", "gzip"),
    (rb"\xfd7zXZ\x00", "xz"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P)", "bzip2"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd"),  # a frame, or one that is to be skipped
    (rb"\x04\x22\x4d\x18", "lz4"),
)
_TAR = b"ustar", 257  # what a tar archive has, and where
_ARCHIVES = ((b"PK\x03\x04", "a zip archive, as .docx and .xlsx files are"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"))
# UTF-32 comes first because its byte order mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_lines(path: str, errors: str = "strict") -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends and without a byte order mark; "-" is standard input.

    The file may be compressed with gzip, bzip2, xz or zstd, whatever its name is.

    Args:
        path: the file.
        errors: what becomes of bytes that are not UTF-8: "strict" raises an error, and "surrogateescape" makes a lone
            surrogate of each.

    Raises:
        ValueError: the file cannot be read, is damaged or is not UTF-8; names the line.
    """
    for line in _read(path, errors):
        yield line.removesuffix("\n").removesuffix("\r")


def read_text(path: str) -> str:
    """All of a UTF-8 file, line ends included, without a byte order mark; "-" is standard input.

    Raises:
        ValueError: as in `read_lines`.
    """
    return "".join(_read(path))


def read_columns(path: str) -> Iterator[tuple[str, str]]:
    """The first two columns, separated by tabs, of each line; raises ValueError at a line without a tab."""
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t")
        if len(columns) < 2:
            spaces = " but spaces" if "  " in line.strip() else ""
            raise ValueError(
                f"{shown(path)}:{number}: there is no tab{spaces}: write the source, a tab, and the target"
            )
        yield columns[0], columns[1]


def _read(path: str, errors: str = "strict") -> Iterator[str]:
    """The lines of a file with their ends."""
    if path == STANDARD:
        if sys.stdin is None:
            raise ValueError("standard input is closed: name a file")
        yield from _decode(_unpack(sys.stdin.buffer, path), path, errors)
        return
    with _open(path) as file:
        yield from _decode(_unpack(file, path), path, errors)


def _open(path: str) -> BinaryIO:
    try:
        return epath.Path(expand(path)).open("rb")
    except (OSError, ValueError) as error:  # a name with a null character raises ValueError
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {shown(path)} ({reason}): check the path") from error


def _unpack(file: Any, path: str) -> Iterator[bytes]:
    """The lines of a file, unpacked if it is compressed."""
    buffered = file if hasattr(file, "peek") else io.BufferedReader(file)  # files of buckets
    begin = buffered.peek(16)[:16]
    kind = next((kind for magic, kind in _COMPRESSED if re.match(magic, begin)), "")
    try:
        yield from _unpacked(buffered, kind, path) if kind else buffered
    finally:
        if buffered is not file and not file.closed:
            buffered.detach()  # otherwise it would close the file


def _unpacked(packed: io.BufferedReader, kind: str, path: str) -> Iterator[bytes]:
    unpacker, *errors = _unpacker(kind, path)
    try:
        yield from unpacker(packed)
    except (EOFError, *errors) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 raise errors without a number
            raise
        raise ValueError(f"{shown(path)} is compressed ({kind}) and damaged ({error}): copy it again") from error


def _unpacker(kind: str, path: str) -> tuple[Any, ...]:
    """What reads a compressed file, and the errors that it raises if the file is damaged."""
    if kind == "gzip":
        return gzip.open, OSError, zlib.error
    if kind == "bzip2":
        return bz2.open, OSError
    if kind == "xz":
        return lzma.open, lzma.LZMAError
    if kind != "zstd":
        raise ValueError(f"{shown(path)} is compressed ({kind}): unpack it first, or name <({kind}cat FILE)")
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise ValueError(
            f"{shown(path)} is compressed (zstd): pip install 'flax_transformer[zstd]', or name <(zstdcat FILE)"
        ) from error
    return zstd.open, zstd.ZstdError


def _decode(lines: Iterable[bytes], path: str, errors: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            _check_first(line, path)
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode(errors=errors)
        except UnicodeDecodeError as error:
            found = f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8"
            raise ValueError(f"{shown(path)}:{number}: {found}: convert it to UTF-8, e.g. with iconv") from error


def _check_first(line: bytes, path: str) -> None:
    """Raises ValueError if the beginning of a file shows that it is not UTF-8 text with lines."""
    name = shown(path)
    magic, place = _TAR
    if line[place : place + len(magic)] == magic:
        raise ValueError(f"{name} is a tar archive: unpack it with tar -xf, and name a file in it")
    for beginning, kind in _ARCHIVES:
        if line.startswith(beginning):
            raise ValueError(f"{name} is {kind}, not text: give a UTF-8 text file with one sentence per line")
    encoding = next((encoding for mark, encoding in _MARKS.items() if line.startswith(mark)), None)
    body = line.removesuffix(b"\n")
    if encoding is None and len(body) > 1 and any(body):
        # In UTF-16 without a byte order mark, every second byte of Latin letters is 0.
        encoding = "UTF-16LE" if not any(body[1::2]) else "UTF-16BE" if not any(body[::2]) else None
    if encoding:
        raise ValueError(f"{name} is {encoding}, not UTF-8: convert it with iconv -f {encoding} -t UTF-8")
    if not line.endswith(b"\n") and b"\r" in line.rstrip(b"\r"):
        raise ValueError(f"{name} is text whose lines end with carriage returns only: convert it with tr '\\r' '\\n'")
