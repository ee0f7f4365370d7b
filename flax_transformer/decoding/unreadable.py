"""Finds sentences that a vocabulary can hardly read, such as those in another script, and says so once."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.text.spelling import composed, is_blank, quotable

# A sentence with at least this share of unknown characters is hardly readable: it is probably in another script or
# language, and does not just have an unusual name.
HARDLY_READABLE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """The characters of a sentence that a vocabulary cannot read.

    Attributes:
        characters: the characters that have no piece, in their order, each as often as it occurs.
        share: their share of the sentence's visible characters, from 0 to 1.
    """

    characters: str
    share: float

    @classmethod
    def of(cls, sentence: str, vocabulary: Vocabulary) -> "Unreadable":
        """Looks up the characters of a sentence."""
        characters = vocabulary.unknown_characters(sentence)
        if not characters:
            return cls("", 0.0)
        # Unknown characters are counted in composed form, so the visible ones must be too.
        text = composed(vocabulary.without_symbols(sentence))
        visible = sum(not is_blank(character) for character in text)
        return cls(characters, min(1.0, len(characters) / visible))  # a vocabulary may not compose


class UnreadableWarning(UserWarning):
    """Warns that so many characters of some sentences have no piece that their translations mean little."""


class UnreadableSentences:
    """Counts the sentences that are hardly readable, so that a whole file gets one warning.

    Attributes:
        count: how many sentences were hardly readable.
        total: how many sentences were examined.
        example: the first of them.
    """

    def __init__(self, vocabulary: Vocabulary):
        """Starts with no sentences; `vocabulary` is that of the source."""
        self._vocabulary = vocabulary
        self.count, self.total, self.example = 0, 0, ""

    def add(self, sentences: Sequence[str]) -> list[Unreadable]:
        """Counts these sentences, and returns what is unreadable in each."""
        found = [Unreadable.of(sentence, self._vocabulary) for sentence in sentences]
        for sentence, unreadable in zip(sentences, found, strict=True):
            self.total += 1
            if unreadable.share >= HARDLY_READABLE:
                self.example = self.example or sentence
                self.count += 1
        return found

    def warn(self, *, stacklevel: int = 1) -> None:
        """Warns of the hardly readable sentences so far, if there are any; stack level 1 is the caller."""
        if self.count:
            warnings.warn(
                f"{self.count:,} of {self.total:,} sentences consist to a third or more of characters that the "
                f'vocabulary does not have (the first: "{quotable(self.example[:40])}"): their translations mean '
                "little; check that they are in the source language of the model",
                UnreadableWarning,
                stacklevel + 1,
            )

    @contextlib.contextmanager
    def warning_once(self) -> Iterator[None]:
        """Suppresses warnings inside the `with` block; at its end one warning counts all sentences that were added."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnreadableWarning)
                yield
        finally:
            self.warn()
