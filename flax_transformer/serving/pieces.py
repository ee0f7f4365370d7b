"""Finds the characters for which each piece of a source or a translation stands."""

import os
from collections.abc import Sequence

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary

Span = tuple[int, int]


def target_spans(target: Vocabulary, ids: Sequence[int], text: str) -> list[Span]:
    """The span of characters of each token in the text that the tokens are decoded to.

    A token that adds no character, such as the end of sentence, or a byte in the middle of one, has an empty span.
    """
    longer = target.decode([list(ids[: length + 1]) for length in range(len(ids))])
    spans, end = [], 0
    for so_far in longer:
        start, end = end, max(end, len(os.path.commonprefix([so_far, text])))
        start += len(text[start:end]) - len(text[start:end].lstrip())
        spans.append((start, end))
    return spans


def source_spans(pieces: Sequence[str], text: str) -> list[Span]:
    """The span of characters of each piece in the text as it was written."""
    spans, end = [], 0
    for piece in pieces:
        written = piece.replace("▁", "")
        start = end + len(text[end:]) - len(text[end:].lstrip())
        found = text.find(written, end) if written else -1
        if 0 <= found <= start + 2:
            start, end = found, found + len(written)
        else:
            start = end
        spans.append((start, end))
    return spans
