"""Takes sentence pairs as token ids and leaves packed batches, each a pure function of its step.

Several pairs share a row: `source_slots` tokens on one side, `target_slots` on the other. Which pairs share a row is
settled once, from the lengths and the seed; each epoch visits every row once, in an order of its own; rows follow one
another without a gap from epoch to epoch, and batch `step` is rows `step * rows` and on. So any batch can be asked for
directly, and resuming needs nothing but the step.
Glossary: B rows of a batch, S source slots, T target slots, N sentence pairs, R packed rows of an epoch.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig

OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class TokenSide:
    """One side of a corpus as token ids, end to end.

    Attributes:
        tokens: all sentences' ids, one after another.
        starts: where each sentence starts in `tokens`, and one entry more: where the last one ends.
    """

    tokens: Int[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "boundaries"]

    @classmethod
    def join(cls, sentences: Sequence[Sequence[int]]) -> "TokenSide":
        """Lays sentences end to end."""
        lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        tokens = np.fromiter((token for sentence in sentences for token in sentence), np.int32, lengths.sum())
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths)]))

    @property
    def lengths(self) -> Int[np.ndarray, "sentences"]:
        """Tokens of each sentence, the end of sentence included."""
        return np.diff(self.starts)

    def __getitem__(self, sentence: int) -> Int[np.ndarray, "length"]:
        return self.tokens[self.starts[sentence] : self.starts[sentence + 1]]


def pack(
    source_lengths: Int[np.ndarray, "N"], target_lengths: Int[np.ndarray, "N"], source_slots: int, target_slots: int
) -> list[list[int]]:
    """Lays pairs into rows, first fit: each pair goes to the first open row with room on both sides.

    Args:
        source_lengths: tokens of each pair on the source side, none above `source_slots`.
        target_lengths: the same on the target side.
        source_slots: room of a row on the source side.
        target_slots: room of a row on the target side.

    Returns:
        For each row the numbers of its pairs.
    """
    rows: list[list[int]] = []
    # Only so many rows stay open, so that a pair costs the same whatever the size of the corpus.
    open_rows = np.full(OPEN_ROWS, -1)
    source_room, target_room = np.zeros((2, OPEN_ROWS), np.int64)
    for pair, (source, target) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
        fits = (source_room >= source) & (target_room >= target)
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int(np.minimum(source_room, target_room).argmin())
            open_rows[slot], source_room[slot], target_room[slot] = len(rows), source_slots, target_slots
            rows.append([])
        rows[open_rows[slot]].append(pair)
        source_room[slot] -= source
        target_room[slot] -= target
    return rows


class PackedCorpus:
    """A corpus that hands out any batch of any epoch.

    Attributes:
        source: the source side, every pair of the corpus, also those that are left out.
        target: the target side.
        too_long: the numbers of the pairs that are left out because a side does not fit.
        rows: for each packed row of an epoch the numbers of its pairs.
        fill_rate: the share of an epoch's slots, of both sides together, that hold a token.
    """

    def __init__(
        self,
        source: TokenSide,
        target: TokenSide,
        repeats: Sequence[int],
        config: DataConfig,
        *,
        max_length: int,
        multiple: int = 1,
    ):
        """Plans the packing.

        Args:
            source: the source side.
            target: the target side.
            repeats: how many times an epoch each pair appears.
            config: slots, rows and the seed.
            max_length: the longest sentence that is kept, in tokens.
            multiple: empty rows fill a batch up to a multiple of this, the number of devices.

        Raises:
            ValueError: no pair fits.
        """
        self.source, self.target = source, target
        self._config, self._multiple = config, multiple
        self._order = functools.lru_cache(maxsize=4)(self._make_order)
        source_limit, target_limit = min(config.source_slots, max_length), min(config.target_slots, max_length)
        fits = (source.lengths <= source_limit) & (target.lengths <= target_limit)
        self.too_long = np.flatnonzero(~fits)
        pairs = np.repeat(np.flatnonzero(fits), np.asarray(repeats, np.int64)[fits])
        if not len(pairs):
            raise ValueError(
                f"none of {len(fits)} sentence pairs fits into {source_limit} source and {target_limit} target tokens: "
                "raise data.source_slots, data.target_slots or model.max_length"
            )
        pairs = np.random.default_rng([config.seed, 0]).permutation(pairs)
        rows = pack(source.lengths[pairs], target.lengths[pairs], config.source_slots, config.target_slots)
        self.rows = [pairs[row].tolist() for row in rows]
        tokens = source.lengths[pairs].sum() + target.lengths[pairs].sum()
        self.fill_rate = float(tokens) / (len(rows) * (config.source_slots + config.target_slots))

    @classmethod
    def from_text(
        cls, text: ParallelText, vocabularies: VocabularyPair, config: DataConfig, **options: int
    ) -> "PackedCorpus":
        """Tokenises a corpus; options as in the constructor."""
        source = TokenSide.join(vocabularies.source.encode(text.source))
        target = TokenSide.join(vocabularies.target.encode(text.target))
        return cls(source, target, text.repeats, config, **options)

    @property
    def epoch_steps(self) -> float:
        """Batches in one epoch."""
        return len(self.rows) / self._config.rows

    def row_ids(self, step: int) -> Int[np.ndarray, "rows"]:
        """Which packed rows batch `step` holds."""
        wanted = np.arange(step * self._config.rows, (step + 1) * self._config.rows)
        epochs, within = np.divmod(wanted, len(self.rows))
        return np.array([self._order(epoch)[row] for epoch, row in zip(epochs.tolist(), within.tolist(), strict=True)])

    def _make_order(self, epoch: int) -> Int[np.ndarray, "R"]:
        return np.random.default_rng([self._config.seed, 1, epoch]).permutation(len(self.rows))

    def example_ids(self, step: int) -> list[int]:
        """Which sentence pairs batch `step` holds, by their number in the corpus."""
        return [pair for row in self.row_ids(step) for pair in self.rows[row]]

    def batch(self, step: int) -> Batch:
        """Batch `step`, the same whenever and wherever it is asked for."""
        return self._lay_out([self.rows[row] for row in self.row_ids(step)])

    def _lay_out(self, rows: Sequence[Sequence[int]]) -> Batch:
        height = -(-self._config.rows // self._multiple) * self._multiple
        sides: dict[str, np.ndarray] = {}
        for name, side, slots in (
            ("source", self.source, self._config.source_slots),
            ("target", self.target, self._config.target_slots),
        ):
            tokens, segments, positions = np.zeros((3, height, slots), np.int32)
            for row, pairs in enumerate(rows):
                start = 0
                for segment, pair in enumerate(pairs, 1):
                    ids = side[pair]
                    end = start + len(ids)
                    tokens[row, start:end] = ids
                    segments[row, start:end] = segment
                    positions[row, start:end] = np.arange(len(ids))
                    start = end
            sides |= {name: tokens, f"{name}_segments": segments, f"{name}_positions": positions}
        return Batch(**sides)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches `start` up to `stop`, made ahead in the background."""
        # One thread: more of them only wait for one another, and the batches come in order either way.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options))

    def one_epoch(self) -> Iterator[Batch]:
        """Every row once, in order, the last batch filled up with empty rows: for evaluation."""
        for start in range(0, len(self.rows), self._config.rows):
            yield self._lay_out(self.rows[start : start + self._config.rows])
