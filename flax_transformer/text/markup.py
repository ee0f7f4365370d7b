"""Takes the markup of HTML or XML out of a text, so that its sentences can be translated, and puts it back."""

import dataclasses
from collections.abc import Sequence

from flax_transformer.text.alignment import TextAlignment


@dataclasses.dataclass(frozen=True)
class MarkupDocument:
    """A text with markup whose sentences are to be translated.

    Attributes:
        sentences: what is to be translated, without markup, entities decoded.
        aligned: for each sentence whether it has markup inside, so that `join` needs its alignment.
    """

    sentences: tuple[str, ...]
    aligned: tuple[bool, ...]

    def join(self, translations: Sequence[str], alignments: Sequence[TextAlignment | None]) -> str:
        """The text with a translation in place of each sentence, and with all its markup; it is always well-formed.

        Args:
            translations: a translation of each sentence, as text without markup.
            alignments: the alignment of each sentence; `None` where `aligned` is false, or where there is none: markup
                within such a sentence is put back by the position.

        Raises:
            ValueError: there is not one translation and one alignment for each sentence.
        """
        raise NotImplementedError


def divide_markup(text: str) -> MarkupDocument:
    """Divides HTML or XML, a whole document or a fragment, into sentences and what is kept."""
    raise NotImplementedError
