"""Groups sentences by length into batches of a few shapes, so that only a few programs have to be compiled.

Lengths are rounded up to powers of two, and the sentences with the same rounded length, a bucket, share batches.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

SMALLEST_BUCKET = 8
RUNG = 4


class Shape(NamedTuple):
    """The sentences of one batch, and its size.

    Attributes:
        numbers: the numbers of the sentences, at most `rows` of them.
        rows: number of rows of the batch.
        widths: the padded length, in tokens, of the source, and of the target if there is one.
    """

    numbers: tuple[int, ...]
    rows: int
    widths: tuple[int, ...]


def bucket(length: int, *, smallest: int = SMALLEST_BUCKET, most: int | None = None) -> int:
    """The length to which a sentence of `length` tokens is padded: a power of two, or `most` if that is smaller."""
    width = max(smallest, 1 << (length - 1).bit_length())
    return min(width, most or width)


def pad(rows: Sequence[Sequence[int]], count: int, width: int, pad_id: int) -> Int[np.ndarray, "B S"]:
    """The token ids of some sentences in an array of `count` rows of `width` tokens."""
    padded = np.full((count, width), pad_id, np.int32)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = ids
    return padded


def full_rows(widths: Sequence[int], batch_tokens: int, devices: int) -> int:
    """The number of rows of a full batch: a multiple of `devices`, with at least one row for each."""
    return max(1, batch_tokens // (max(widths) * devices)) * devices


def rows_for(sentences: int, full: int, devices: int) -> int:
    """The number of rows of a batch of a few sentences: `full`, a quarter of it, a quarter of that, and so on."""
    rows = full
    while rows > devices and -(-rows // RUNG) >= sentences:
        rows = -(-rows // (RUNG * devices)) * devices
    return rows


def shape_batches(lengths: Sequence[tuple[int, ...]], batch_tokens: int, devices: int = 1) -> Iterator[Shape]:
    """Divides sentences into batches, each of which has the shape of its bucket; the longest sentences come first.

    Args:
        lengths: the tokens of each sentence's source, and of its target if there is one.
        batch_tokens: tokens in a batch, including padding, on the longer side.
        devices: the number of devices among which a batch is divided.
    """
    buckets = defaultdict(list)
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
        buckets[tuple(map(bucket, lengths[number]))].append(number)
    for widths, numbers in sorted(buckets.items(), reverse=True):
        rows = rows_for(len(numbers), full_rows(widths, batch_tokens, devices), devices)
        for start in range(0, len(numbers), rows):
            yield Shape(tuple(numbers[start : start + rows]), rows, widths)
