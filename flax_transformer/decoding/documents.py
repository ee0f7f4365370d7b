"""Translates whole texts, with markup or without: divides them into sentences and joins the sentences' translations.

Whoever has a translator calls `translate_documents`. A server, which gives sentences to an engine and waits for them
elsewhere, calls the two steps: `divide_documents`, and `Documents.join` when it has the translations.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from flax_transformer.text.alignment import TextAlignment
from flax_transformer.text.documents import Document, check_count, divide
from flax_transformer.text.markup import MarkupDocument, divide_markup


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts that are divided.

    Attributes:
        documents: each of the texts.
        sentences: the sentences of all texts, in order.
        aligned: for each sentence whether `join` needs its alignment, because it has markup inside.
    """

    documents: tuple[Document | MarkupDocument, ...]
    sentences: tuple[str, ...]
    aligned: tuple[bool, ...]

    def join(self, translations: Sequence[str], alignments: Sequence[TextAlignment | None] | None = None) -> list[str]:
        """The texts with a translation in place of each sentence.

        Args:
            translations: a translation of each sentence.
            alignments: the alignment of each sentence, or `None` for one that has none or needs none.

        Raises:
            ValueError: there is not one translation, or not one alignment, for each sentence.
        """
        check_count(translations, self.sentences)
        alignments = [None] * len(translations) if alignments is None else alignments
        joined, start = [], 0
        for document in self.documents:
            part = slice(start, start := start + len(document.sentences))
            if isinstance(document, MarkupDocument):
                joined.append(document.join(translations[part], alignments[part]))
            else:
                joined.append(document.join(translations[part]))
        return joined


def divide_documents(texts: Iterable[str], *, markup: bool) -> Documents:
    """Divides texts into sentences.

    Args:
        texts: the texts, each of which may have any number of sentences and paragraphs, or none.
        markup: whether they are HTML or XML.
    """
    documents = tuple(map(divide_markup if markup else divide, texts))
    return Documents(
        documents,
        sentences=tuple(sentence for document in documents for sentence in document.sentences),
        aligned=tuple(
            needed
            for document in documents
            for needed in (
                document.aligned if isinstance(document, MarkupDocument) else [False] * len(document.sentences)
            )
        ),
    )
