"""Makes the batches of `benchmarks.train` from random tokens or a corpus, in the form that each library needs."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from benchmarks.report import SEED
from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.pipeline import PackedCorpus, Packing, TokenSide
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig
from flax_transformer.tokens import Tokens

# Slots that suit Multi30k where words are not divided anew in each epoch.
MULTI30K = DataConfig(rows=32, source_slots=64, target_slots=64, seed=SEED)

Padded = tuple[np.ndarray, np.ndarray]


class PackedData(Protocol):
    """Training data for this library."""

    def packed(self) -> Iterable[Batch]:
        """Its batches."""
        ...


class Data(PackedData, Protocol):
    """The training data, in the form that each library needs."""

    def padded(self) -> list[Padded]:
        """Source and target of each batch, with one sentence per row."""
        ...


@dataclasses.dataclass(frozen=True)
class FullRows:
    """The same rows of random tokens again and again, without padding."""

    source: np.ndarray
    target: np.ndarray
    updates: int

    @classmethod
    def draw(cls, config: TransformerConfig, rows: int, slots: int, updates: int) -> "FullRows":
        """Draws rows of random token ids without padding or ends of sentence."""
        tokens = np.random.default_rng(SEED).integers(4, config.source_vocab_size, (2, rows, slots), np.int32)
        return cls(*tokens, updates)

    def packed(self) -> Iterable[Batch]:
        ones = np.ones_like(self.source)
        positions = ones.cumsum(axis=1, dtype=np.int32) - 1
        return [Batch(Tokens(self.source, ones, positions), Tokens(self.target, ones, positions))] * self.updates

    def padded(self) -> list[Padded]:
        return [(self.source, self.target)] * self.updates


@dataclasses.dataclass(frozen=True)
class Sentences:
    """A tokenised corpus; `updates` limits the batches of an epoch, if given."""

    source: TokenSide
    target: TokenSide
    packing: Packing
    config: DataConfig
    updates: int | None

    @classmethod
    def encode(cls, text: ParallelText, vocabularies: VocabularyPair, updates: int | None) -> "Sentences":
        """Tokenises a corpus, with the settings of Multi30k's config."""
        source = TokenSide.encode(vocabularies.source, text.source)
        target = TokenSide.encode(vocabularies.target, text.target)
        packing = Packing.plan(source, target, text.repeats, MULTI30K, max_length=256)
        return cls(source, target, packing, MULTI30K, updates)

    def corpus(self) -> PackedCorpus:
        """The packed corpus, as in training."""
        return PackedCorpus(self.source, self.target, self.packing, self.config)

    def packed(self) -> Iterator[Batch]:
        corpus = self.corpus()
        return corpus.batches(0, self.updates or round(corpus.epoch_steps))

    def padded(self) -> list[Padded]:
        """Batches of sentences of similar length, with as many target tokens as a packed batch has on average."""
        pairs = np.concatenate([self.packing[row] for row in range(len(self.packing))])
        lengths = self.source.lengths[pairs], self.target.lengths[pairs]
        pairs = pairs[np.lexsort(lengths)]
        tokens = self.target.lengths[pairs]
        a_batch = tokens.sum() / (len(self.packing) / self.config.rows)
        number = (np.cumsum(tokens) - 1) // a_batch
        batches = np.split(pairs, np.flatnonzero(np.diff(number)) + 1)
        order = np.random.default_rng(SEED).permutation(len(batches))[: self.updates]
        return [(_pad(self.source, batches[place]), _pad(self.target, batches[place])) for place in order]


def _pad(side: TokenSide, pairs: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(pairs), side.lengths[pairs].max()), np.int32)
    for row, pair in zip(rows, pairs, strict=True):
        row[: len(side[pair])] = side[pair]
    return rows


def pipeline_rates(sentences: Sentences, repeats: int) -> list[float]:
    """The target tokens per second that the pipeline alone makes, in each of `repeats` runs."""
    corpus, rates = sentences.corpus(), []
    steps = round(corpus.epoch_steps)
    for number in range(repeats):
        start, tokens = time.perf_counter(), 0
        for batch in corpus.batches(number * steps, (number + 1) * steps):
            tokens += np.count_nonzero(batch.target.segments)
        rates.append(tokens / (time.perf_counter() - start))
    return rates
