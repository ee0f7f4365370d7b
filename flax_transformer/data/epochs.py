"""A training corpus whose epochs differ: each has its own tokens, its own selection of pairs, and its own packing.

Tokens vary with subword regularisation (`data.source_sampling`, `data.target_sampling`). The selection varies where a
pair does not appear a whole number of times in an epoch, as with a weight of 0.5 or with `data.temperature`. Batch
`step` is still a pure function of the corpus, the vocabulary, the options, the seed and the step: epoch e is made from
the seed and e alone, and its rows follow those of epoch e - 1. So a resumed training needs the numbers of rows of the
epochs before, which a small file in the cache remembers; without it they are counted again.

While one epoch is read, a thread makes the next one.

Glossary: N sentence pairs, P those of them that fit into a row.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from flax_transformer.atomic_files import write_file
from flax_transformer.data.batch import Batch
from flax_transformer.data.cache import KEY_LENGTH
from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.pipeline import (
    ORDER_OF_PAIRS,
    ORDER_OF_ROWS,
    PIECES,
    RANKS,
    PackedCorpus,
    Packing,
    TokenSide,
    cache_key,
    in_background,
)
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.subword_sampling import SubwordSampler
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig


def training_corpus(
    text: ParallelText,
    vocabularies: VocabularyPair,
    config: DataConfig,
    *,
    max_length: int,
    multiple: int = 1,
    host: int = 0,
    num_hosts: int = 1,
    cache: epath.Path | None = None,
) -> "PackedCorpus | ChangingCorpus":
    """Tokenises and packs a corpus, or reads it from a cache; arguments and errors as in `PackedCorpus.from_text`."""
    first = PackedCorpus.from_text(
        text,
        vocabularies,
        config,
        max_length=max_length,
        multiple=multiple,
        host=host,
        num_hosts=num_hosts,
        cache=cache,
    )
    strengths = config.source_sampling, config.target_sampling
    if not any(strengths) and all(float(times).is_integer() for times in set(text.repeats)):
        return first
    decisive = cache_key(text, vocabularies, config, max_length), strengths, np.__version__
    key = hashlib.sha256(repr(decisive).encode()).hexdigest()[:KEY_LENGTH]
    return ChangingCorpus(
        first,
        np.asarray(text.repeats, np.float64),
        (
            SampledSide(vocabularies.source, first.source, strengths[0], (config.seed, PIECES, 0)),
            SampledSide(vocabularies.target, first.target, strengths[1], (config.seed, PIECES, 1)),
        ),
        config,
        max_length=max_length,
        sizes=EpochSizes(None if cache is None else cache / f"train_epochs-{key}.json", writes=host == 0),
    )


def times_in_epoch(repeats: Float[np.ndarray, "P"], ranks: Float[np.ndarray, "P"], epoch: int) -> Int[np.ndarray, "P"]:
    """How often each pair appears in an epoch: `repeats` rounded up or down, so that the mean over epochs is exact.

    Args:
        repeats: how often each pair is to appear in an epoch on average.
        ranks: numbers from 0 to 1 that decide in which epochs a pair appears once more.
        epoch: number of the epoch, from 0.
    """
    return (np.floor(repeats * (epoch + 1) + ranks) - np.floor(repeats * epoch + ranks)).astype(np.int64)


def even_ranks(repeats: Float[np.ndarray, "P"], rng: np.random.Generator) -> Float[np.ndarray, "P"]:
    """Ranks for `times_in_epoch` that are spread evenly among the pairs with the same `repeats`.

    So these pairs together appear in every epoch as often as `repeats` says, to the nearest whole number.
    """
    ranks = np.empty(len(repeats))
    for value in np.unique(repeats):
        places = np.flatnonzero(repeats == value)
        ranks[places] = (rng.permutation(len(places)) + 0.5) / len(places)
    return ranks


class SampledSide:
    """One side of a corpus, whose sentences are divided into pieces anew in each epoch.

    Attributes:
        fixed: the most probable segmentation, by which it is decided which pairs fit into a row.
    """

    def __init__(self, vocabulary: Vocabulary, fixed: TokenSide, strength: float, seed: tuple[int, ...]):
        """Takes the sentences; with strength 0 each epoch has the most probable segmentation.

        Raises:
            ValueError: they are to vary, and the vocabulary has one segmentation of each.
        """
        self.fixed, self._seed = fixed, seed
        self._sampler = SubwordSampler(vocabulary, fixed, strength) if strength else None

    def of_epoch(self, epoch: int) -> TokenSide:
        """All sentences, as an epoch has them."""
        if self._sampler is None:
            return self.fixed
        return self._sampler.sample(np.random.default_rng([*self._seed, epoch]))


class EpochSizes:
    """The numbers of rows and of tokens of epochs 0, 1, 2, …, as far as they are known; kept in a file.

    Attributes:
        found: for each epoch, its rows and its tokens on both sides together.
    """

    def __init__(self, path: epath.Path | None, *, writes: bool = True):
        """Reads the file, if there is one; `writes` is false for all hosts but one."""
        self._path, self._writes = path, writes
        self._written = 0  # how many of them the file has
        self.found: list[tuple[int, int]] = []
        if path is not None:
            with contextlib.suppress(Exception):  # a missing or damaged file is written again
                self.found = [(int(rows), int(tokens)) for rows, tokens in json.loads(path.read_bytes())]

    def add(self, epoch: int, rows: int, tokens: int) -> None:
        """Notes the size of an epoch; those before it must be known."""
        if epoch < len(self.found):
            return
        assert epoch == len(self.found), f"epoch {epoch} follows {len(self.found)} known ones: count those before first"
        self.found.append((rows, tokens))
        # A tiny corpus has many epochs: not each of them is worth a file. What the file lacks is counted again.
        if self._path is not None and self._writes and len(self.found) >= 1.01 * self._written:
            with contextlib.suppress(Exception):  # without the file, a resumed training counts again
                write_file(self._path, json.dumps(self.found).encode())
            self._written = len(self.found)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch of a corpus: its tokens, its rows and their order.

    Attributes:
        sides: source and target of the pairs.
        fixed: the same in their most probable segmentation.
        stays_fixed: which pairs have that segmentation, because another one would not fit into a row.
        packing: which pairs share a row.
        order: the rows in the order in which they are read.
        num_tokens: how many tokens its rows have, both sides together.
    """

    sides: tuple[TokenSide, TokenSide]
    fixed: tuple[TokenSide, TokenSide]
    stays_fixed: np.ndarray
    packing: Packing
    order: Int[np.ndarray, "rows"]
    num_tokens: int

    def pairs(self, place: int) -> list[int]:
        """The numbers of the pairs in the row that is read at this place."""
        return self.packing[int(self.order[place])].tolist()

    def tokens(self, side: int, pair: int) -> Int[np.ndarray, "length"]:
        """The ids of a pair's source (side 0) or target (side 1)."""
        return (self.fixed if self.stays_fixed[pair] else self.sides)[side][pair]


class ChangingCorpus:
    """A corpus for training, from which any batch of any epoch can be taken.

    Attributes:
        blank: the numbers of the pairs that are left out because one side is blank.
        too_long: the numbers of the pairs that are left out because one side does not fit into a row.
        batch_rows: number of rows of a batch over all hosts, including empty ones.
    """

    def __init__(
        self,
        first: PackedCorpus,
        repeats: Float[np.ndarray, "N"],
        sides: tuple[SampledSide, SampledSide],
        config: DataConfig,
        *,
        max_length: int,
        sizes: EpochSizes,
    ):
        """Takes the corpus.

        Args:
            first: the corpus in the most probable segmentation; knows which pairs fit, and lays out batches.
            repeats: how often each pair is to appear in an epoch, on average.
            sides: source and target.
            config: slots, rows and the seed.
            max_length: maximum length of a sentence in tokens.
            sizes: what is known of the epochs.
        """
        self.blank, self.too_long, self.batch_rows = first.blank, first.too_long, first.batch_rows
        self._first, self._sides, self._config, self._sizes = first, sides, config, sizes
        self._pairs = np.unique(first.packing.pairs)
        self._all_repeats, self._repeats = repeats, repeats[self._pairs]
        self._limits = min(config.source_slots, max_length), min(config.target_slots, max_length)
        self._ranks = even_ranks(self._repeats, np.random.default_rng([config.seed, RANKS]))
        if not times_in_epoch(self._repeats, self._ranks, 0).any():
            raise ValueError(
                f"by the weights of the corpora an epoch has {self._repeats.sum():.2g} sentence pairs: raise them"
            )
        self._ahead = Ahead(self._make)
        self._starts = [0]  # the number of rows before each epoch
        self._lock = threading.RLock()  # of `_starts` and of `sizes`

    @property
    def num_rows(self) -> int:
        """Number of packed rows in epoch 0; other epochs differ a little."""
        return self._size(0)[0]

    @property
    def epoch_steps(self) -> float:
        """Number of batches in epoch 0, a fraction."""
        return self.num_rows / self._config.rows

    @property
    def fill_rate(self) -> float:
        """The share of all slots of epoch 0 that hold a token, both sides together."""
        rows, tokens = self._size(0)
        return tokens / (max(rows, 1) * (self._config.source_slots + self._config.target_slots))

    def example_ids(self, step: int) -> list[int]:
        """The sentence pairs of batch `step` over all hosts, as numbers in the corpus."""
        return [pair for epoch, place in self._places(step) for pair in epoch.pairs(place)]

    def batch(self, step: int) -> Batch:
        """This host's part of batch `step`; it depends on nothing that was read before."""
        rows = [(epoch, epoch.pairs(place)) for epoch, place in self._places(step)[self._first.own_rows]]
        source, target = ([[epoch.tokens(side, pair) for pair in pairs] for epoch, pairs in rows] for side in (0, 1))
        return self._first.lay_out(source, target)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches from `start` up to but not including `stop`, prepared in the background."""
        return in_background(self.batch, start, stop)

    def _places(self, step: int) -> list[tuple[Epoch, int]]:
        """The epoch of each row of a batch over all hosts, and the row's place in it."""
        first, last = step * self._config.rows, (step + 1) * self._config.rows - 1
        places: list[tuple[Epoch, int]] = []
        with self._lock:
            number = self._epoch_of(first)
            # Epochs are asked for in their order alone, since `Ahead` forgets those before.
            while True:
                epoch, begin = self._ahead.get(number), self._starts[number]
                end = begin + self._size(number)[0]
                places += [(epoch, row - begin) for row in range(max(first, begin), min(last + 1, end))]
                if end > last:
                    return places
                number = self._epoch_of(end)

    def _epoch_of(self, row: int) -> int:
        """The number of the epoch that has this row, if the rows of all epochs are counted."""
        while self._starts[-1] <= row:
            self._starts.append(self._starts[-1] + self._size(len(self._starts) - 1)[0])
        return bisect.bisect_right(self._starts, row) - 1

    def _size(self, epoch: int) -> tuple[int, int]:
        """The rows and the tokens of an epoch; those of the epochs before it are known afterwards, too."""
        with self._lock:
            for number in range(len(self._sizes.found), epoch + 1):
                made = self._ahead.get(number)
                self._sizes.add(number, len(made.packing), made.num_tokens)
            return self._sizes.found[epoch]

    def _make(self, number: int) -> Epoch:
        """Makes an epoch from the seed and its number."""
        config = self._config
        fixed = self._sides[0].fixed, self._sides[1].fixed
        sides = self._sides[0].of_epoch(number), self._sides[1].of_epoch(number)
        stays_fixed = np.zeros(len(self._all_repeats), bool)
        for side, limit in zip(sides, self._limits, strict=True):
            stays_fixed |= side.lengths > limit
        times = times_in_epoch(self._repeats, self._ranks, number)
        rng = np.random.default_rng([config.seed, ORDER_OF_PAIRS, number])
        pairs = rng.permutation(np.repeat(self._pairs, times))
        lengths = [np.where(stays_fixed, *both) for both in zip(_lengths(fixed), _lengths(sides), strict=True)]
        packing = Packing.in_order(pairs, lengths[0], lengths[1], config, self.too_long)
        order = np.random.default_rng([config.seed, ORDER_OF_ROWS, number]).permutation(len(packing))
        tokens = sum(int(of_side[pairs].sum()) for of_side in lengths)
        return Epoch(sides, fixed, stays_fixed, packing, order, tokens)


def _lengths(sides: tuple[TokenSide, TokenSide]) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    return sides[0].lengths, sides[1].lengths


class Ahead:
    """Makes items 0, 1, 2, … in a thread of its own, each while the one before it is used; keeps these two."""

    def __init__(self, make: Callable[[int], Any]):
        """Takes the function that makes an item."""
        self._make = make
        self._lock = threading.Lock()
        self._items: dict[int, Future] = {}

    def get(self, number: int) -> Any:
        """The item, when it is made; begins to make the next one. Raises the error that making it raised."""
        with self._lock:
            for each in (number, number + 1):
                if each not in self._items:
                    self._items[each] = self._begin(each)
            self._items = {each: self._items[each] for each in (number, number + 1)}
            item = self._items[number]
        return item.result()

    def _begin(self, number: int) -> Future:
        item: Future[Any] = Future()
        before = self._items.get(number - 1)
        # A daemon, since the end of training must not wait for an epoch that nobody will read.
        threading.Thread(target=self._work, args=(item, number, before), daemon=True).start()
        return item

    def _work(self, item: Future, number: int, before: Future | None) -> None:
        if before is not None:
            wait([before])
        try:
            item.set_result(self._make(number))
        except BaseException as error:  # raised again where the item is wanted
            item.set_exception(error)
