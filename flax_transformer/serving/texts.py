"""Translates the texts of a request: into sentences, through the queue, and back into texts."""

import asyncio
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from flax_transformer.decoding.documents import Documents
from flax_transformer.decoding.drafts import Draft
from flax_transformer.decoding.requests import Ids, Output
from flax_transformer.decoding.results import Translation
from flax_transformer.serving.models import Served
from flax_transformer.serving.refusals import Refusal
from flax_transformer.serving.service import Service
from flax_transformer.text.alignment import TextAlignment, spans

LOOKED_INTO = 512  # tokens of a sentence whose attention is looked at: a large model needs 600 MB for them
SHORT = 1000  # characters, which are divided and encoded in a millisecond
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Translated:
    """A text and its translations.

    Attributes:
        text: the best translation.
        alternatives: further ones, the better ones first.
        sentences: the sentences of the text with the translations of each.
    """

    text: str
    alternatives: tuple[str, ...]
    sentences: tuple[tuple[str, tuple[Translation, ...]], ...]


async def translate_texts(
    service: Service, model: Served, documents: Documents, *, characters: int, alternatives: int
) -> list[Translated]:
    """Translates texts of one language.

    Args:
        service: whose queue is used.
        model: the model.
        documents: the texts, divided into sentences.
        characters: how long the texts are, with their tags.
        alternatives: how many alternatives of each are wanted.

    Raises:
        Refusal: the queue is full.
    """
    search = model.search.replace(num_return=alternatives + 1)
    draft = await beside(characters, model.translator.draft, documents.sentences, search)
    found = await service.desk.decode(model.translator.engine, draft)
    service.metrics.sentences.labels(model.name).inc(len(documents.sentences))
    translations = await write(service, model, draft, found)
    alignments = [
        await asyncio.to_thread(_align, model, sentence, parts, several[0]) if aligned else None
        for sentence, parts, several, aligned in zip(
            documents.sentences, draft.parts, translations, documents.aligned, strict=True
        )
    ]
    return await beside(characters, _join, documents, translations, alignments, alternatives)


async def write(
    service: Service, model: Served, draft: Draft, found: Sequence[Sequence[Output]]
) -> list[list[Translation]]:
    """The translations of each sentence of a draft, with unknown pieces replaced if the service does so."""
    unknown = model.translator.vocabularies.target.unk_id
    copied = service.replace_unknown and any((output.ids == unknown).any() for outputs in found for output in outputs)
    # Copying needs the device, and so a thread, however short the text is.
    characters = math.inf if copied else sum(map(len, draft.sentences))
    given_up = threading.Event()
    align = functools.partial(_align_ids, model, given_up)
    try:
        return await beside(characters, model.translator.write, draft, found, replace_unknown=copied, align=align)
    finally:
        given_up.set()  # nobody waits any more, but a thread goes on until it is told


async def beside(characters: float, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Calls a function on texts of so many characters: on a thread of its own, unless that would take longer."""
    if characters <= SHORT:
        return function(*arguments, **options)
    return await asyncio.to_thread(function, *arguments, **options)


def check_sentences(service: Service, count: int) -> None:
    """Raises `Refusal` with status 400 if a request has too many sentences."""
    if count > service.limits.sentences:
        raise Refusal(
            400,
            f"the request has {count} sentences, this server allows {service.limits.sentences}: divide it",
            reason="too_large",
        )


def _align_ids(
    model: Served, given_up: threading.Event, sources: Sequence[Ids], targets: Sequence[Ids]
) -> list[np.ndarray]:
    """The alignment [T, S] of each pair; by position where looking at the attention would take too much memory."""
    aligned = []
    for source, target in zip(sources, targets, strict=True):
        if given_up.is_set():
            raise asyncio.CancelledError
        if max(len(source), len(target)) <= LOOKED_INTO:
            aligned += model.translator.inspector.align([source], [target])
        else:
            places = np.arange(len(target)) * len(source) // len(target)
            aligned.append((places[:, None] == np.arange(len(source))).astype(np.float32))
    return aligned


def _align(
    model: Served, sentence: str, parts: Sequence[Sequence[int]], translation: Translation
) -> TextAlignment | None:
    """How the characters of a translation and its source belong together.

    `None` if it is blank, made in parts, or too long for the memory that this takes.
    """
    if len(parts) != 1 or max(len(parts[0]), len(translation.ids)) > LOOKED_INTO:
        return None
    source, (ids,) = model.translator.vocabularies.source, parts
    weights = model.translator.inspector.inspect(ids, translation.ids).alignment()
    return TextAlignment(
        tuple(spans(source.pieces(ids), sentence)), tuple(spans(translation.tokens, translation.text)), weights
    )


def _join(
    documents: Documents,
    found: Sequence[Sequence[Translation]],
    alignments: Sequence[TextAlignment | None],
    alternatives: int,
) -> list[Translated]:
    ranks = [
        documents.join([several[min(rank, len(several) - 1)].text for several in found], alignments)
        for rank in range(alternatives + 1)
    ]
    translated, start = [], 0
    for document, (best, *others) in zip(documents.documents, zip(*ranks, strict=True), strict=True):
        part = slice(start, start := start + len(document.sentences))
        translated.append(
            Translated(
                best,
                tuple(dict.fromkeys(other for other in others if other != best)),
                tuple((sentence, tuple(each)) for sentence, each in zip(document.sentences, found[part], strict=True)),
            )
        )
    return translated
