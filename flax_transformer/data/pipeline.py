"""The data pipeline: sentence pairs are tokenised and packed into batches, each a pure function of its step.

Several pairs share a row, which has room for `source_slots` tokens on one side and `target_slots` on the other. The
lengths and the seed decide once which pairs share a row. Each epoch visits every row once in an order of its own, and
epochs follow one another without a gap: batch `step` starts at row `step * rows`. Any batch can be computed directly,
so resuming needs only the step. With several hosts, each lays out its part of every batch.

Glossary: B rows of a batch, S source slots, T target slots, N sentence pairs, R packed rows of an epoch.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import grain
import numpy as np
from etils import epath
from jaxtyping import Int

from flax_transformer.data.batch import Batch
from flax_transformer.data.cache import cached_arrays
from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.vocabulary import Vocabulary, VocabularyPair
from flax_transformer.experiment import DataConfig
from flax_transformer.text.spelling import is_blank
from flax_transformer.tokens import Tokens

# What random numbers are for: with the seed, each purpose has numbers of its own. The first orders the pairs once for
# all epochs, the third those of one epoch.
ORDER_OF_CORPUS, ORDER_OF_ROWS, ORDER_OF_PAIRS, RANKS, PIECES = range(5)
OPEN_ROWS = 256
TOKENISED_AT_ONCE = 100_000  # sentences; lists of ids take about ten times as much memory as the final arrays
CACHE_VERSION = 3  # raise it whenever the cached arrays, or the way they are made, change


@dataclasses.dataclass(frozen=True)
class TokenSide:
    """One side of a corpus as token ids.

    Attributes:
        tokens: the ids of all sentences, one after another.
        starts: where each sentence starts in `tokens`, followed by the end of the last one.
    """

    tokens: Int[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "boundaries"]

    @classmethod
    def join(cls, sentences: Sequence[Sequence[int]]) -> "TokenSide":
        """Concatenates sentences."""
        lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        tokens = np.fromiter(itertools.chain.from_iterable(sentences), np.int32, lengths.sum())
        return cls(tokens, _boundaries(lengths))

    @classmethod
    def encode(cls, vocabulary: Vocabulary, sentences: Sequence[str], left_out: Collection[int] = ()) -> "TokenSide":
        """Tokenises and concatenates sentences; those with the numbers in `left_out` have the end of sentence alone."""
        parts = []
        for start in range(0, max(len(sentences), 1), TOKENISED_AT_ONCE):
            numbers = range(start, min(start + TOKENISED_AT_ONCE, len(sentences)))
            encoded = iter(vocabulary.encode([sentences[number] for number in numbers if number not in left_out]))
            parts.append(cls.join([[vocabulary.eos_id] if each in left_out else next(encoded) for each in numbers]))
        return cls.concatenate(parts)

    @classmethod
    def concatenate(cls, parts: Sequence["TokenSide"]) -> "TokenSide":
        """The sentences of all parts, one part after another; there is at least one."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.tokens for part in parts]), _boundaries(lengths))

    @property
    def lengths(self) -> Int[np.ndarray, "sentences"]:
        """Number of tokens of each sentence, including the end-of-sentence token."""
        return np.diff(self.starts)

    def __getitem__(self, sentence: int) -> Int[np.ndarray, "length"]:
        return self.tokens[self.starts[sentence] : self.starts[sentence + 1]]


def _boundaries(lengths: Int[np.ndarray, "pieces"]) -> Int[np.ndarray, "boundaries"]:
    """Where each of several concatenated pieces starts, followed by the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths)])


def pack(
    source_lengths: Int[np.ndarray, "N"], target_lengths: Int[np.ndarray, "N"], source_slots: int, target_slots: int
) -> Int[np.ndarray, "N"]:
    """Packs pairs into rows by first fit: each pair goes into the first open row with room on both sides.

    Args:
        source_lengths: number of source tokens of each pair, at most `source_slots`.
        target_lengths: the same on the target side.
        source_slots: number of source tokens that fit into a row.
        target_slots: number of target tokens that fit into a row.

    Returns:
        The row of each pair; rows are numbered from 0 in the order in which they are opened.
    """
    row_of_pair = np.empty(len(source_lengths), np.int64)
    opened = 0
    # The number of open rows is limited, so that the cost of a pair does not grow with the corpus.
    open_rows = np.full(OPEN_ROWS, -1)
    source_room, target_room = np.zeros((2, OPEN_ROWS), np.int64)
    for pair, (source, target) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
        fits = (source_room >= source) & (target_room >= target)
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int(np.minimum(source_room, target_room).argmin())
            open_rows[slot], source_room[slot], target_room[slot] = opened, source_slots, target_slots
            opened += 1
        row_of_pair[pair] = open_rows[slot]
        source_room[slot] -= source
        target_room[slot] -= target
    return row_of_pair


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which sentence pairs share a row; `packing[row]` gives the numbers of a row's pairs in the corpus.

    Attributes:
        pairs: the pairs of all rows, row after row.
        row_starts: where each row starts in `pairs`, followed by the end of the last one.
        too_long: the pairs that are left out because one side does not fit into a row.
    """

    pairs: Int[np.ndarray, "places"]
    row_starts: Int[np.ndarray, "boundaries"]
    too_long: Int[np.ndarray, "too_long"]

    @classmethod
    def plan(
        cls, source: TokenSide, target: TokenSide, repeats: Sequence[int], config: DataConfig, max_length: int
    ) -> "Packing":
        """Assigns pairs to rows, given their lengths and the seed.

        Args:
            source: the source side.
            target: the target side.
            repeats: how often each pair appears in an epoch; 0 leaves it out.
            config: slots and the seed.
            max_length: maximum length of a sentence in tokens; longer ones are left out.

        Raises:
            ValueError: no pair fits.
        """
        source_limit, target_limit = min(config.source_slots, max_length), min(config.target_slots, max_length)
        fits = (source.lengths <= source_limit) & (target.lengths <= target_limit)
        wanted = np.asarray(repeats, np.int64)
        pairs = np.repeat(np.flatnonzero(fits), wanted[fits])
        if not len(pairs):
            raise ValueError(
                f"none of {np.count_nonzero(wanted)} sentence pairs fits into {source_limit} source and {target_limit} "
                "target tokens: raise data.source_slots, data.target_slots or model.max_length"
            )
        pairs = np.random.default_rng([config.seed, ORDER_OF_CORPUS]).permutation(pairs)
        return cls.in_order(pairs, source.lengths, target.lengths, config, np.flatnonzero(~fits & (wanted > 0)))

    @classmethod
    def in_order(
        cls,
        pairs: Int[np.ndarray, "places"],
        source_lengths: Int[np.ndarray, "N"],
        target_lengths: Int[np.ndarray, "N"],
        config: DataConfig,
        too_long: Int[np.ndarray, "too_long"],
    ) -> "Packing":
        """Assigns pairs, each of which fits into a row, to rows in their order."""
        row_of_pair = pack(source_lengths[pairs], target_lengths[pairs], config.source_slots, config.target_slots)
        by_row = np.argsort(row_of_pair, kind="stable")
        return cls(pairs[by_row], _boundaries(np.bincount(row_of_pair)), too_long)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.row_starts) - 1

    def __getitem__(self, row: int) -> Int[np.ndarray, "pairs"]:
        return self.pairs[self.row_starts[row] : self.row_starts[row + 1]]


class PackedCorpus:
    """A packed corpus, from which any batch of any epoch can be taken.

    Attributes:
        source: the source side of all pairs, including those that are left out.
        target: the target side.
        packing: which pairs share a row.
        blank: the numbers of the pairs that are left out because one side is blank.
        fill_rate: the share of all slots of an epoch that hold a token, both sides together.
        own_rows: which rows of a batch this host lays out.
    """

    def __init__(
        self,
        source: TokenSide,
        target: TokenSide,
        packing: Packing,
        config: DataConfig,
        *,
        multiple: int = 1,
        host: int = 0,
        num_hosts: int = 1,
        blank: Sequence[int] = (),
    ):
        """Takes a corpus that has been tokenised and packed.

        Args:
            source: the source side.
            target: the target side.
            packing: the plan for these sides and this config.
            config: slots, rows and the seed.
            multiple: each batch is filled with empty rows up to a multiple of this, e.g. the number of all devices.
            host: the part of each batch that this host lays out, from 0 to `num_hosts` - 1.
            num_hosts: number of equal parts into which the rows of a batch are divided; it divides `multiple`.
            blank: the numbers of the pairs that are left out because one side is blank.
        """
        assert multiple % num_hosts == 0, f"multiple is {multiple}, num_hosts is {num_hosts}: give a multiple of it"
        assert 0 <= host < num_hosts, f"host is {host}, num_hosts is {num_hosts}: count hosts from 0"
        self.source, self.target, self.packing, self.blank = source, target, packing, tuple(blank)
        self._config = config
        self._num_hosts = num_hosts
        self._height = -(-config.rows // multiple) * multiple // num_hosts
        self.own_rows = slice(host * self._height, (host + 1) * self._height)
        self._order = functools.lru_cache(maxsize=4)(self._make_order)
        tokens = source.lengths[packing.pairs].sum() + target.lengths[packing.pairs].sum()
        self.fill_rate = float(tokens) / (len(packing) * (config.source_slots + config.target_slots))

    @classmethod
    def from_text(
        cls,
        text: ParallelText,
        vocabularies: VocabularyPair,
        config: DataConfig,
        *,
        max_length: int,
        multiple: int = 1,
        host: int = 0,
        num_hosts: int = 1,
        cache: epath.Path | None = None,
        name: str = "train",
    ) -> "PackedCorpus":
        """Tokenises and packs a corpus, or reads it from a cache.

        Pairs with a blank side are left out, because they would teach the model to translate text into nothing.

        Args:
            text: the corpus.
            vocabularies: of both sides.
            config: slots, rows and the seed.
            max_length: maximum length of a sentence in tokens; longer ones are left out.
            multiple: as in the constructor.
            host: as in the constructor.
            num_hosts: as in the constructor.
            cache: a folder in which tokens and packing are kept; by default they are computed each time.
            name: the name of this corpus within that folder.

        Raises:
            ValueError: no pair fits, every pair has a blank side, or a source begins with the token of a language that
                the vocabulary does not know.
        """
        pairs = zip(text.source, text.target, strict=True)
        blank = [number for number, sides in enumerate(pairs) if any(map(is_blank, sides))]
        if len(blank) == len(text):
            raise ValueError(
                f"data.{name}: each of {len(text)} sentence pairs has a blank side: check that both sides hold text"
            )

        def build() -> dict[str, np.ndarray]:
            left_out = set(blank)
            # Vocabularies with languages on both sides report the token of an unknown language in `encode`.
            named = vocabularies.source.languages and not vocabularies.source.language_ids
            for sentence in text.source if named else ():
                vocabularies.source.split_language(sentence)
            source = TokenSide.encode(vocabularies.source, text.source, left_out)
            target = TokenSide.encode(vocabularies.target, text.target, left_out)
            repeats = [0 if number in left_out else math.ceil(times) for number, times in enumerate(text.repeats)]
            parts = {
                "source": source,
                "target": target,
                "packing": Packing.plan(source, target, repeats, config, max_length),
            }
            return {f"{part}_{field}": array for part, held in parts.items() for field, array in vars(held).items()}

        if cache is None:
            arrays = build()
        else:
            arrays = cached_arrays(cache, name, cache_key(text, vocabularies, config, max_length), build)
        return cls(
            TokenSide(arrays["source_tokens"], arrays["source_starts"]),
            TokenSide(arrays["target_tokens"], arrays["target_starts"]),
            Packing(arrays["packing_pairs"], arrays["packing_row_starts"], arrays["packing_too_long"]),
            config,
            multiple=multiple,
            host=host,
            num_hosts=num_hosts,
            blank=blank,
        )

    @property
    def num_rows(self) -> int:
        """Number of packed rows in an epoch."""
        return len(self.packing)

    @property
    def batch_rows(self) -> int:
        """Number of rows of a batch over all hosts, including empty ones."""
        return self._height * self._num_hosts

    @property
    def too_long(self) -> Int[np.ndarray, "too_long"]:
        """The numbers of the pairs that are left out because one side does not fit into a row."""
        return self.packing.too_long

    @property
    def epoch_steps(self) -> float:
        """Number of batches in an epoch, a fraction."""
        return self.num_rows / self._config.rows

    def row_ids(self, step: int) -> Int[np.ndarray, "rows"]:
        """The packed rows of batch `step` over all hosts."""
        wanted = np.arange(step * self._config.rows, (step + 1) * self._config.rows)
        epochs, within = np.divmod(wanted, self.num_rows)
        return np.array([self._order(epoch)[row] for epoch, row in zip(epochs.tolist(), within.tolist(), strict=True)])

    def _make_order(self, epoch: int) -> Int[np.ndarray, "R"]:
        return np.random.default_rng([self._config.seed, ORDER_OF_ROWS, epoch]).permutation(self.num_rows)

    def example_ids(self, step: int) -> list[int]:
        """The sentence pairs of batch `step` over all hosts, as numbers in the corpus."""
        return [pair for row in self.row_ids(step).tolist() for pair in self.packing[row].tolist()]

    def batch(self, step: int) -> Batch:
        """This host's part of batch `step`; it depends on nothing that was read before."""
        return self._lay_out(self.row_ids(step))

    def _lay_out(self, row_ids: Int[np.ndarray, "rows"]) -> Batch:
        """This host's part of a batch that consists of these rows."""
        rows = [self.packing[row].tolist() for row in row_ids[self.own_rows].tolist()]
        source, target = ([[side[pair] for pair in pairs] for pairs in rows] for side in (self.source, self.target))
        return self.lay_out(source, target)

    def lay_out(self, source: Sequence[Sequence[np.ndarray]], target: Sequence[Sequence[np.ndarray]]) -> Batch:
        """This host's part of a batch that has these sentences in its rows; `source[i][j]` are the ids of one."""

        def side(rows: Sequence[Sequence[np.ndarray]], slots: int) -> Tokens:
            tokens = Tokens(*np.zeros((3, self._height, slots), np.int32))
            for row, sentences in enumerate(rows):
                start = 0
                for segment, ids in enumerate(sentences, 1):
                    place = row, slice(start, start + len(ids))
                    tokens.ids[place], tokens.segments[place] = ids, segment
                    tokens.positions[place] = np.arange(len(ids))
                    start += len(ids)
            return tokens

        return Batch(side(source, self._config.source_slots), side(target, self._config.target_slots))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches from `start` up to but not including `stop`, prepared in the background."""
        return in_background(self.batch, start, stop)

    def one_epoch(self) -> Iterator[Batch]:
        """This host's part of every row once, in order, the last batch filled up with empty rows: for evaluation."""
        for start in range(0, self.num_rows, self._config.rows):
            yield self._lay_out(np.arange(start, min(start + self._config.rows, self.num_rows)))


def in_background(batch: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """What `batch` returns for the steps from `start` up to but not including `stop`, prepared in the background."""
    # More threads would only wait for one another.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(options))


def cache_key(text: ParallelText, vocabularies: VocabularyPair, config: DataConfig, max_length: int) -> str:
    """A hash of everything that determines tokens and packing; the numbers of rows and hosts do not."""
    decisive = (
        CACHE_VERSION,
        text.fingerprint(),
        vocabularies.fingerprint(),
        config.source_slots,
        config.target_slots,
        config.seed,
        max_length,
    )
    return hashlib.sha256(repr(decisive).encode()).hexdigest()
