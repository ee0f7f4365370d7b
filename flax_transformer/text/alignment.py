"""Finds which characters of a text each piece stands for, so that attention between pieces links characters.

Glossary: S source pieces, T target pieces; a span is the positions of a first character and behind a last one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TextAlignment:
    """How much each part of a translation was made from each part of its source.

    Attributes:
        source_spans: the S spans of characters in the source.
        target_spans: the T spans in the translation; the end of sentence and other pieces without text have empty ones.
        weights: row t says how much of target span t comes from each source span.
    """

    source_spans: tuple[Span, ...]
    target_spans: tuple[Span, ...]
    weights: Float[np.ndarray, "T S"]


def spans(pieces: Sequence[str], text: str) -> list[Span]:
    """The span of characters in `text` for which each piece stands, in order.

    Args:
        pieces: the pieces of the text, as a vocabulary splits it; "▁" is a space.
        text: the text as it was written, before a vocabulary changed its spelling.
    """
    raise NotImplementedError
