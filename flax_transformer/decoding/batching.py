"""Takes the lengths of many sentences and leaves batches of a few shapes, so that few programs are compiled.

Lengths are rounded up to powers of two, the buckets; sentences of one bucket share batches.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SMALLEST_BUCKET = 8
RUNG = 4


class Shape(NamedTuple):
    """The sentences of one batch, and its size.

    Attributes:
        numbers: which sentences; at most `rows`.
        rows: of the batch.
        widths: what its sides are padded to, in tokens: the source, and the target where there is one.
    """

    numbers: tuple[int, ...]
    rows: int
    widths: tuple[int, ...]


def bucket(length: int) -> int:
    """The length that a sentence of so many tokens is padded to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def full_rows(widths: Sequence[int], batch_tokens: int, devices: int) -> int:
    """The rows of a full batch: a multiple of `devices`, at least one for each."""
    return max(1, batch_tokens // (max(widths) * devices)) * devices


def rows_for(sentences: int, full: int, devices: int) -> int:
    """The rows of a batch of a few sentences: `full`, or a quarter of it, or a quarter of that and so on."""
    rows = full
    while rows > devices and -(-rows // RUNG) >= sentences:
        rows = -(-rows // (RUNG * devices)) * devices
    return rows


def shape_batches(lengths: Sequence[tuple[int, ...]], batch_tokens: int, devices: int = 1) -> Iterator[Shape]:
    """Divides sentences into batches, of one shape for each bucket, the longest first.

    Args:
        lengths: of each sentence, in tokens: of its source, and of its target where there is one.
        batch_tokens: tokens in a batch, padding included; the longer side counts.
        devices: that a batch is divided among.
    """
    buckets = defaultdict(list)
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
        buckets[tuple(map(bucket, lengths[number]))].append(number)
    for widths, numbers in sorted(buckets.items(), reverse=True):
        yield from bucket_shapes(numbers, widths, batch_tokens, devices)


def bucket_shapes(numbers: Sequence[int], widths: tuple[int, ...], batch_tokens: int, devices: int) -> Iterator[Shape]:
    """Divides the sentences of one bucket into batches of one shape; arguments as above."""
    rows = rows_for(len(numbers), full_rows(widths, batch_tokens, devices), devices)
    for start in range(0, len(numbers), rows):
        yield Shape(tuple(numbers[start : start + rows]), rows, widths)
