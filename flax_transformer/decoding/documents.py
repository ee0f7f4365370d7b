"""Translates whole texts, with markup or without: divides them into sentences and joins the sentences' translations.

Whoever has a translator calls `translate_documents`. A server, which gives sentences to an engine and waits for them
elsewhere, calls the two steps: `divide_documents`, and `Documents.join` when it has the translations.
"""

import dataclasses
from collections.abc import Sequence

from flax_transformer.decoding.results import Translation, in_parts
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.texts import Texts, as_list
from flax_transformer.decoding.translator import BEAM, Translator
from flax_transformer.text.alignment import TextAlignment, spans
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

    @classmethod
    def of(cls, documents: Sequence[Document | MarkupDocument]) -> "Documents":
        """Takes texts that were divided one by one."""
        sentences: list[str] = []
        aligned: list[bool] = []
        for document in documents:
            sentences += document.sentences
            if isinstance(document, MarkupDocument):
                aligned += document.aligned
            else:
                aligned += [False] * len(document.sentences)
        return cls(tuple(documents), tuple(sentences), tuple(aligned))

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


def divide_documents(texts: Texts, *, markup: bool) -> Documents:
    """Divides texts into sentences.

    Args:
        texts: the texts, each of which may have any number of sentences and paragraphs, or none.
        markup: whether they are HTML or XML.

    Raises:
        ValueError: `texts` is a single string, is not ordered or contains something other than a str; or HTML is to be
            read and lxml is not installed.
    """
    texts = as_list("texts", texts)
    return Documents.of([divide_markup(text) if markup else divide(text) for text in texts])


def translate_documents(
    translator: Translator,
    texts: Texts,
    search: BeamSearch | Sampling = BEAM,
    *,
    markup: bool = False,
    seed: int = 0,
    replace_unknown: bool = True,
) -> list[str]:
    """Translates texts sentence by sentence; all else in them comes back as it was.

    Args:
        translator: the translator.
        texts: the texts.
        search: how to search for translations; the best one, or the first sample, is taken.
        markup: whether the texts are HTML or XML.
        seed: the seed of sampling.
        replace_unknown: as in `Translator.hypotheses`.

    Raises:
        ValueError: as in `divide_documents`.
    """
    documents = divide_documents(texts, markup=markup)
    found = translator.hypotheses(documents.sentences, search, seed=seed, replace_unknown=replace_unknown)
    best = [hypotheses[0] for hypotheses in found]
    alignments = align_texts(translator, documents.sentences, best, documents.aligned)
    return documents.join([translation.text for translation in best], alignments)


def align_texts(
    translator: Translator,
    sentences: Sequence[str],
    translations: Sequence[Translation],
    wanted: Sequence[bool],
) -> list[TextAlignment | None]:
    """The alignments of the texts of sentences and their translations.

    Args:
        translator: the translator that made the translations.
        sentences: the sources.
        translations: a translation of each.
        wanted: which of them are needed.

    Returns:
        An alignment for each; `None` where none is wanted, and for a sentence that was so long that it was translated
        in parts.
    """
    end = translator.vocabularies.target.eos_id
    numbers = [
        number
        for number, translation in enumerate(translations)
        if wanted[number] and translation.ids and not in_parts(translation, end)
    ]
    aligned = translator.align(
        [sentences[number] for number in numbers], [translations[number] for number in numbers], layer=None
    )
    found: list[TextAlignment | None] = [None] * len(translations)
    for number, alignment in zip(numbers, aligned, strict=True):
        found[number] = TextAlignment(
            tuple(spans(alignment.source_tokens, sentences[number])),
            tuple(spans(alignment.target_tokens, translations[number].text)),
            alignment.weights,
        )
    return found
