"""Reads and writes Marian's binary shortlists (`lex.*.bin`), in which form a work directory stores a shortlist too.

Such a file has six numbers of 64 bits (a magic number, a checksum, how many first ids are always allowed, how many
words a source id has at most, how many offsets and how many words follow), then the offsets of 64 bits each and the
words of 32 bits each, all little-endian (BinaryShortlistGenerator in marian-dev/src/data/shortlist.cpp).
"""

import numpy as np
from etils import epath

from flax_transformer.atomic_files import write_file
from flax_transformer.decoding.shortlist import Shortlist

MAGIC = 0xF11A48D5013417F5
HEADER = 6 * 8  # bytes
CHECKED = 2 * 8  # bytes: the checksum is that of all that follows it
# Ids are 32 bits wide here, and Marian's vocabularies are far smaller.
MOST = 2**31 - 1


def read_shortlist(path: epath.PathLike, *, joint: bool) -> Shortlist:
    """Reads a shortlist.

    Args:
        path: the file.
        joint: whether each id stands for the same piece on both sides of the model (`VocabularyPair.shares_ids`).

    Raises:
        ValueError: the file is not a binary shortlist of Marian, or is damaged.
        OSError: it cannot be read.
    """
    content = epath.Path(path).read_bytes()
    if len(content) < HEADER:
        raise _damaged(path, f"it has {len(content)} bytes, and its header alone has {HEADER}")
    magic, checksum, first, _, offsets, words = np.frombuffer(content, "<u8", 6).tolist()
    if magic != MAGIC:
        raise ValueError(f"{path} is not a binary shortlist of Marian, whose name is lex.*.bin: name such a file")
    size = HEADER + 8 * offsets + 4 * words
    if size != len(content):
        raise _damaged(path, f"it has {len(content)} bytes, and should have {size:,}")
    if checksum != _checksum(content):
        raise _damaged(path, "its checksum is wrong")
    starts = np.frombuffer(content, "<u8", offsets, HEADER)
    ids = np.frombuffer(content, "<u4", words, HEADER + 8 * offsets)
    if max(first, int(starts.max(initial=0)), int(ids.max(initial=0))) > MOST:
        raise _damaged(path, f"one of its numbers is greater than {MOST}")
    try:
        return Shortlist(first, starts.astype(np.int64), ids.astype(np.int32), joint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_shortlist(path: epath.PathLike, shortlist: Shortlist) -> None:
    """Writes a shortlist for Marian; the file does not say whether the vocabulary is joint."""
    starts, words = shortlist.offsets, shortlist.words
    best = int(np.diff(starts).max())
    body = np.array([shortlist.first, best, len(starts), len(words)], "<u8").tobytes()
    body += starts.astype("<u8").tobytes() + words.astype("<u4").tobytes()
    content = bytes(CHECKED) + body
    write_file(epath.Path(path), np.array([MAGIC, _checksum(content)], "<u8").tobytes() + body)


def _checksum(content: bytes) -> int:
    """Marian's `hashMem` of all whole numbers of 64 bits behind the checksum."""
    numbers = np.frombuffer(content, "<u8", (len(content) - CHECKED) // 8, CHECKED)
    seed = 0
    for number in numbers.tolist():
        seed ^= (number + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & 0xFFFFFFFFFFFFFFFF
    return seed


def _damaged(path: epath.PathLike, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): copy or download it again")
