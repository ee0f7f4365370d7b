"""Segments words into other pieces at random, so that a model sees each word in several segmentations.

It starts from the most probable segmentation, which SentencePiece has made. Pieces never reach over the beginning of a
word, so each word is segmented by itself; what is no ordinary piece, such as a byte or a tag, stays as it is. With the
same random numbers the result is the same in every process and on every machine. SentencePiece can sample too, but from
version 0.2.2 on its random numbers differ from process to process, whatever the seed, and a training with them could
not be resumed exactly.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from flax_transformer.data.pipeline import TokenSide
from flax_transformer.data.sentencepiece_model import parse
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.text.symbols import SPACE

SEGMENTATIONS_KEPT = 2**18  # segmentations, and lattices, that are remembered, since most words come again
DRAWN_AT_ONCE = 4096  # random numbers
Ids = tuple[int, ...]


class Piece(NamedTuple):
    """An ordinary piece: its id, and its score, by which segmentations are chosen."""

    token: int
    score: float


class BpeDropout:
    """BPE-dropout (Provilkov et al., 2020, section 3.2): each merge that comes up is left out with a probability."""

    def __init__(self, pieces: dict[str, Piece], strength: float):
        """Takes the ordinary pieces by their text, and the probability with which a merge is left out."""
        self._pieces, self._strength = pieces, strength
        self._costs = {text: -piece.score for text, piece in pieces.items()}  # the merge that costs least comes first
        self._merged = functools.lru_cache(SEGMENTATIONS_KEPT)(self._merge)

    def may_change(self, words: list[str], places: Int[np.ndarray, "N"], rng: np.random.Generator) -> np.ndarray:
        """Draws for the word at each of N places the number of the first merge that is left out; -1 if none is.

        Args:
            words: the different words.
            places: the number of the word at each place.
            rng: draws.
        """
        merges = np.array([self._merged(word, ())[1] for word in words])
        first = rng.geometric(self._strength, len(places)) - 1
        return np.where(first < merges[places], first, -1)

    def numbers(self, rng: np.random.Generator) -> Iterator[int]:
        """Draws what `segment` takes: how far it is from one merge that is left out to the next."""
        while True:
            yield from rng.geometric(self._strength, DRAWN_AT_ONCE).tolist()

    def segment(self, word: str, drawn: int, numbers: Iterator[int]) -> Ids:
        """The ids of a word, drawn with `numbers`; `drawn` is what `may_change` has drawn."""
        left_out: tuple[int, ...] = (drawn,)
        last = drawn
        while True:
            ids, considered = self._merged(word, left_out)
            last += next(numbers)
            if last >= considered:
                return ids
            left_out = (*left_out, last)

    def _merge(self, word: str, left_out: tuple[int, ...]) -> tuple[Ids, int]:
        """Merges neighbours, those with the best score first, until no two make a piece.

        Args:
            word: the word.
            left_out: numbers of merges that are left out, counted in the order in which they come up.

        Returns:
            The ids, and how many merges came up.
        """
        symbols = list(word)
        costs = [self._costs.get(word[left : left + 2], math.inf) for left in range(len(word) - 1)]
        considered = 0
        while costs and (least := min(costs)) < math.inf:
            place = costs.index(least)
            considered += 1
            if considered - 1 in left_out:
                costs[place] = math.inf
                continue
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            del costs[place]
            for left in (place - 1, place):  # the new symbol and its neighbours
                if 0 <= left < len(costs):
                    costs[left] = self._costs.get(symbols[left] + symbols[left + 1], math.inf)
        return tuple(self._pieces[symbol].token for symbol in symbols), considered


class UnigramSampling:
    """Draws segmentations in proportion to a power of their probabilities (Kudo, 2018, section 3.3)."""

    def __init__(self, pieces: dict[str, Piece], strength: float):
        """Takes the ordinary pieces by their text, with the logarithms of their probabilities, and the power."""
        self._pieces, self._strength = pieces, strength
        self._longest = max(map(len, pieces), default=0)
        self._lattice = functools.lru_cache(SEGMENTATIONS_KEPT)(self._make_lattice)

    def may_change(self, words: list[str], places: Int[np.ndarray, "N"], rng: np.random.Generator) -> np.ndarray:
        """0 for each place whose word has several segmentations, otherwise -1; arguments as in `BpeDropout`."""
        return np.where(np.array([len(word) > 1 for word in words], bool)[places], 0, -1)

    def numbers(self, rng: np.random.Generator) -> Iterator[float]:
        """Draws what `segment` takes: numbers from 0 up to 1."""
        while True:
            yield from rng.random(DRAWN_AT_ONCE).tolist()

    def segment(self, word: str, drawn: int, numbers: Iterator[float]) -> Ids:
        """The ids of a word, drawn with `numbers`: the last piece, then the one before it, and so on."""
        lattice, end = self._lattice(word), len(word)
        ids: list[int] = []
        while end:
            shares, begins, tokens = lattice[end - 1]
            chosen = min(bisect.bisect_right(shares, next(numbers)), len(shares) - 1)
            ids.append(tokens[chosen])
            end = begins[chosen]
        return tuple(reversed(ids))

    def _make_lattice(self, word: str) -> list[tuple[list[float], list[int], Ids]]:
        """For each end in a word the pieces that may be the last before it: cumulative shares, beginnings, ids."""
        totals, lattice = [0.0], []  # logarithms of the sums of the powers over all segmentations up to each end
        for end in range(1, len(word) + 1):
            found = [
                (begin, piece.token, totals[begin] + self._strength * piece.score)
                for begin in range(max(0, end - self._longest), end)
                if (piece := self._pieces.get(word[begin:end]))
            ]
            begins, tokens, scores = zip(*found, strict=True)
            total = float(np.logaddexp.reduce(scores))
            lattice.append((np.cumsum(np.exp(np.array(scores) - total)).tolist(), list(begins), tokens))
            totals.append(total)
        return lattice


class SubwordSampler:
    """Segments the sentences of one side of a corpus anew, as often as one likes."""

    def __init__(self, vocabulary: Vocabulary, fixed: TokenSide, strength: float):
        """Finds the words.

        Args:
            vocabulary: the vocabulary.
            fixed: the sentences in their most probable segmentation.
            strength: with a "bpe" vocabulary, the share of merges that are left out; with "unigram", the power to which
                the probabilities of segmentations are raised. Greater than 0.

        Raises:
            ValueError: this vocabulary has one segmentation of each sentence.
        """
        vocabulary.check_sampling()
        self._segmenter, ordinary, begins = _read(vocabulary, strength)
        tokens = fixed.tokens
        starts_word = begins[tokens] | ~ordinary[tokens]
        starts_word[1:] |= ~ordinary[tokens[:-1]]
        starts_word[fixed.starts[:-1]] = True
        places = np.flatnonzero(starts_word)
        ends = np.append(places[1:], len(tokens))
        texts = vocabulary.all_pieces()
        numbers: dict[bytes, int] = {}
        self._words: list[str] = []  # the text of each different word; empty for what stays as it is
        self._segmentations: list[Ids] = []  # the most probable segmentation of each
        self._places = np.empty(len(places), np.int64)  # the number of the word at each place
        for place, (start, end) in enumerate(zip(places.tolist(), ends.tolist(), strict=True)):
            key = tokens[start:end].tobytes()
            if (number := numbers.get(key)) is None:
                number = numbers[key] = len(self._words)
                ids = tuple(tokens[start:end].tolist())
                self._words.append("".join(texts[token] for token in ids) if ordinary[ids[0]] else "")
                self._segmentations.append(ids)
            self._places[place] = number
        # The place of the first word of each sentence, and the number of all places at the end.
        self._starts = np.searchsorted(places, fixed.starts)

    def sample(self, rng: np.random.Generator) -> TokenSide:
        """The sentences in segmentations that are drawn from a generator."""
        drawn = self._segmenter.may_change(self._words, self._places, rng)
        segmentations = list(self._segmentations)
        known = {segmentation: number for number, segmentation in enumerate(segmentations)}
        chosen = self._places.copy()
        numbers: Iterator[Any] = self._segmenter.numbers(rng)
        for place in np.flatnonzero(drawn >= 0).tolist():
            ids = self._segmenter.segment(self._words[chosen[place]], int(drawn[place]), numbers)
            if (number := known.get(ids)) is None:
                number = known[ids] = len(segmentations)
                segmentations.append(ids)
            chosen[place] = number
        # The segmentations lie one after another in `pool`; each place copies its own.
        lengths = np.fromiter(map(len, segmentations), np.int64, len(segmentations))
        pool = np.fromiter(itertools.chain.from_iterable(segmentations), np.int32, lengths.sum())
        begins = np.cumsum(lengths) - lengths
        own = lengths[chosen]
        ends = np.concatenate([[0], np.cumsum(own)])
        tokens = pool[np.repeat(begins[chosen] - ends[:-1], own) + np.arange(ends[-1])]
        return TokenSide(tokens, ends[self._starts])


def _read(vocabulary: Vocabulary, strength: float) -> tuple[BpeDropout | UnigramSampling, np.ndarray, np.ndarray]:
    """How words are segmented, which ids are ordinary pieces, and which of them begin a word."""
    model = parse(vocabulary.pieces_model)
    pieces = {
        entry.piece: Piece(token, entry.score)
        for token, entry in enumerate(model.pieces)
        if entry.type == entry.Type.Value("NORMAL")
    }
    ordinary, begins = np.zeros((2, vocabulary.size), bool)
    for text, (token, _) in pieces.items():
        ordinary[token], begins[token] = True, text.startswith(SPACE)
    trainer = model.trainer_spec
    kind = BpeDropout if trainer.model_type == trainer.ModelType.Value("BPE") else UnigramSampling
    return kind(pieces, strength), ordinary, begins
