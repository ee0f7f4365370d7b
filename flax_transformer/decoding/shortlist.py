"""A lexical shortlist: from the tokens of a source sentence to the few target tokens that its translation may contain.

A search that chooses among some hundred tokens in place of the whole vocabulary computes as many logits, which are most
of the work of a small decoder. The lists come from word alignments; Marian makes them and stores them in `lex.*.bin`,
which `interop/marian_shortlist.py` reads.

Glossary: V size of the target vocabulary.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from flax_transformer.config import TransformerConfig

# Marian fills a list up to a multiple of this number, since its matrix products need one.
MULTIPLE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Shortlist:
    """Which target tokens each source token may be translated with.

    Attributes:
        first: the target ids below this number, usually the most frequent ones, are always allowed.
        offsets: where in `words` the target ids of each source id begin, and at last where they end; so there is one
            number more than source ids.
        words: the target ids of all source ids, one after the other.
        joint: whether each id stands for the same piece on both sides: then the ids of the source itself are allowed
            too, as in Marian, so that names can be copied.
    """

    first: int
    offsets: Int[np.ndarray, "offsets"]
    words: Int[np.ndarray, "words"]
    joint: bool

    def __post_init__(self):
        """Raises ValueError if the offsets do not divide the words among source ids, or a number is negative."""
        offsets, words = self.offsets, self.words
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(words) or np.any(offsets[1:] < offsets[:-1]):
            raise ValueError(
                f"the offsets of the shortlist do not rise from 0 to {len(words)}, the number of its words: it is "
                "damaged, or was made in another way"
            )
        if self.first < 0 or np.any(words < 0):
            raise ValueError("the shortlist has a negative number: it is damaged, or was made in another way")

    @property
    def sources(self) -> int:
        """For how many source ids it has words."""
        return len(self.offsets) - 1

    def check_fits(self, config: TransformerConfig) -> None:
        """Raises ValueError unless it was made for a model with such vocabularies."""
        source, target = config.source_vocab_size, config.target_vocab_size
        # Marian has no padding; a converted model has it behind all other ids.
        without_padding = source - (config.pad_id == source - 1)
        most = int(self.words.max(initial=0))
        if self.sources not in (source, without_padding) or most >= target:
            raise ValueError(
                f"the shortlist has words for {self.sources:,} source ids and target ids up to {most:,}, the model "
                f"{source:,} source and {target:,} target ids: use the shortlist that was made for it, or none"
            )

    def allowed(self, source: Sequence[int], size: int, *, also: Sequence[int] = ()) -> Int[np.ndarray, "allowed"]:
        """The target ids that the translation of a sentence may contain, in rising order.

        These are Marian's: the first ids, the words of each source token, the source itself if the vocabulary is joint,
        and then the next ids from `first` on, until there are a multiple of eight (BinaryShortlistGenerator).

        Args:
            source: the ids of the source, including the end of sentence.
            size: the size of the target vocabulary, V.
            also: target ids that are allowed in any case, beyond that multiple.
        """
        listed = np.zeros(size, bool)
        listed[: self.first] = True
        for token in set(source):
            if token < self.sources:
                listed[self.words[self.offsets[token] : self.offsets[token + 1]]] = True
                if self.joint:
                    listed[token] = True
        missing = -int(listed.sum()) % MULTIPLE
        listed[self.first + np.flatnonzero(~listed[self.first :])[:missing]] = True
        listed[list(also)] = True
        return np.flatnonzero(listed).astype(np.int32)

    def most(self, source_length: int, size: int) -> int:
        """How many ids a sentence of at most `source_length` tokens may be allowed; `size` as in `allowed`."""
        longest = int(np.diff(self.offsets).max())
        return min(self.first + source_length * (longest + self.joint) + MULTIPLE - 1, size)

    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 of what it allows."""
        arrays: Iterable[np.ndarray] = (np.array([self.first, self.joint]), self.offsets, self.words)
        return hashlib.sha256(b"|".join(array.astype("<i8").tobytes() for array in arrays)).hexdigest()
