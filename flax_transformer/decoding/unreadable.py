"""Finds sentences that a vocabulary can hardly read, such as those in another script, and says so once."""

import contextlib
import dataclasses
import unicodedata
import warnings
from collections.abc import Iterator, Sequence

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.text.spelling import is_blank

# With this share of unknown characters a sentence is called hardly readable: another script or language, not a name.
HARDLY_READABLE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """What a vocabulary cannot read of a sentence.

    Attributes:
        characters: the characters that it has no piece for, in their order, each as often as it occurs.
        share: their share of the sentence's visible characters, from 0 to 1.
    """

    characters: str
    share: float

    @classmethod
    def of(cls, sentence: str, vocabulary: Vocabulary) -> "Unreadable":
        """Looks a sentence's characters up."""
        characters = vocabulary.unknown_characters(sentence)
        if not characters:
            return cls("", 0.0)
        # The unknown ones are counted in composed form, so all are.
        visible = sum(not is_blank(character) for character in unicodedata.normalize("NFC", sentence))
        return cls(characters, len(characters) / visible)


class UnreadableWarning(UserWarning):
    """Sentences hold so many characters without a piece that their translations mean little."""


class UnreadableSentences:
    """Counts the sentences that are hardly readable, so that a whole file gets one warning.

    Attributes:
        count: how many there were.
        total: how many sentences were looked at.
        example: the first of them.
    """

    def __init__(self, vocabulary: Vocabulary):
        """Has seen none yet; `vocabulary` is that of the source."""
        self._vocabulary = vocabulary
        self.count, self.total, self.example = 0, 0, ""

    def add(self, sentences: Sequence[str]) -> list[Unreadable]:
        """What is unreadable of each of these sentences, which are counted."""
        found = [Unreadable.of(sentence, self._vocabulary) for sentence in sentences]
        for sentence, unreadable in zip(sentences, found, strict=True):
            self.total += 1
            if unreadable.share >= HARDLY_READABLE:
                self.example = self.example or sentence
                self.count += 1
        return found

    def warn(self, *, stacklevel: int = 1) -> None:
        """Warns of the sentences counted so far, if there are any; at stack level 1 in the name of the caller."""
        if self.count:
            warnings.warn(
                f"{self.count:,} of {self.total:,} sentences consist to a third or more of characters that the "
                f'vocabulary does not have (the first: "{self.example[:40]}"): their translations mean little; check '
                "that they are in the source language of the model",
                UnreadableWarning,
                stacklevel + 1,
            )

    @contextlib.contextmanager
    def warning_once(self) -> Iterator[None]:
        """Inside, translating does not warn; at the end one warning counts all the sentences that were added."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnreadableWarning)
                yield
        finally:
            self.warn()
