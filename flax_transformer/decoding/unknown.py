"""Replaces the unknown pieces of translations by what they translate: copies it from where the model looked."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.requests import Ids, Output
from flax_transformer.decoding.writing import Copies
from flax_transformer.text.alignment import spans
from flax_transformer.text.unknown import words_to_copy

# Takes the ids of sources and of a target of each; returns how much each target token attends to each source token.
Align = Callable[[Sequence[Ids], Sequence[Ids]], list[np.ndarray]]


def find_copies(
    vocabularies: VocabularyPair,
    align: Align,
    sentences: Sequence[str],
    parts: Sequence[Sequence[Ids]],
    outputs: Sequence[Sequence[Sequence[Output]]],
) -> list[list[list[Copies]]]:
    """What to write in place of the unknown pieces of each output; one more pass for outputs that have any.

    Args:
        vocabularies: those of both sides.
        align: aligns the outputs that have unknown pieces.
        sentences: the sources.
        parts: for each sentence the ids of its parts.
        outputs: for each sentence and part its outputs.

    Returns:
        The copies of each output, in the order of `outputs`.
    """
    source, unknown = vocabularies.source, vocabularies.target.unk_id
    copies: list[list[list[Copies]]] = [[[[] for _ in ranks] for ranks in several] for several in outputs]
    places = [
        (number, part, rank)
        for number, several in enumerate(outputs)
        for part, ranks in enumerate(several)
        for rank, output in enumerate(ranks)
        if (output.ids == unknown).any()
    ]
    aligned = align(
        [parts[number][part] for number, part, _ in places],
        [outputs[number][part][rank].ids.tolist() for number, part, rank in places],
    )
    texts = {number: source.split_language(sentences[number])[1] for number, _, _ in places}
    spans_of = {}
    for number, text in texts.items():
        whole = list(itertools.chain.from_iterable(parts[number]))
        spans_of[number] = spans(source.pieces(whole), text, [token == source.unk_id for token in whole])
    for (number, part, rank), weights in zip(places, aligned, strict=True):
        ids = np.array(parts[number][part], int)
        begin = sum(map(len, parts[number][:part]))
        copies[number][part][rank] = words_to_copy(
            texts[number],
            source.pieces(ids),
            spans_of[number][begin : begin + len(ids)],
            ids == source.unk_id,
            weights[outputs[number][part][rank].ids == unknown],
        )
    return copies
