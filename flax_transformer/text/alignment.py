"""Finds which characters of a text each piece stands for, so that attention between pieces links characters.

Glossary: S source pieces, T target pieces; a span is the positions of a first character and behind a last one.
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np
import regex
from jaxtyping import Float

from flax_transformer.text.spelling import is_blank
from flax_transformer.text.symbols import SPACE, is_language

Span = tuple[int, int]

# Of how many parts of each text a matrix may be: larger ones would take gigabytes for a text of 25,000 words.
MOST_BLOCKS = 1000

_UNKNOWN = "<unk>"
_CONTROL = frozenset(("<s>", "</s>", "<pad>", "<mask>"))
# The units of text between which markup may stand: words, with hyphens and apostrophes; single characters in scripts
# that have no spaces between words; any other sign.
_UNIT = regex.compile(
    r"""(?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])\X
    |[[\p{L}\p{M}\p{N}\p{Pc}\u200c\u200d]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+
     (?:['’-][[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+)*
    |(?=\S)\X""",
    regex.VERSION1 | regex.VERBOSE,
)


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

    @classmethod
    def by_position(cls, source: str, target: str) -> "TextAlignment":
        """Aligns blocks that stand at the same place, relative to the whole; equal texts are aligned exactly."""
        sides = blocks(source), blocks(target)
        edges = [np.linspace(0, 1, len(side) + 1) for side in sides]
        starts = np.maximum(edges[1][:-1, None], edges[0][None, :-1])
        stops = np.minimum(edges[1][1:, None], edges[0][None, 1:])
        return cls(tuple(sides[0]), tuple(sides[1]), np.maximum(stops - starts, 0) * len(sides[1]))


def units(text: str) -> list[Span]:
    """The spans of the words of a text, and of its other visible signs one by one."""
    return [match.span() for match in _UNIT.finditer(text)]


def blocks(text: str) -> list[Span]:
    """The units of a text; of a very long one groups of neighbours, so that a matrix of two texts' blocks is small."""
    found = units(text)
    size = -(-len(found) // MOST_BLOCKS)
    if size <= 1:
        return found
    groups = (found[start : start + size] for start in range(0, len(found), size))
    return [(group[0][0], group[-1][1]) for group in groups]


def spans(pieces: Sequence[str], text: str, unknown: Sequence[bool] | None = None) -> list[Span]:
    """The span of characters in `text` for which each piece stands, in order; empty where it stands for none.

    Vocabularies compose accents, drop invisible characters and change white space, so pieces and text are compared
    without these differences. A piece whose characters are not at its place, such as the unknown one, stands for what
    lies between its neighbours.

    Args:
        pieces: the pieces of the text, as a vocabulary splits it; "▁" is a space.
        text: the text as it was written, before a vocabulary changed its spelling.
        unknown: which pieces stand for text that they do not name; those that are "<unk>" if not given.
    """
    unknown = [piece == _UNKNOWN for piece in pieces] if unknown is None else unknown
    plain, origins = _plain(text)
    found: list[Span] = []
    gap: list[str] = []  # pieces that wait for the next one that is found
    blind = False  # whether one of them is unknown
    place = before = 0  # in the plain text, and in the text, behind the last piece that was found

    def fill(after: int) -> None:
        found.extend(_share(text, before, after, gap))
        gap.clear()

    for piece, is_unknown in zip(pieces, unknown, strict=True):
        letters = "" if is_unknown or piece in _CONTROL else _plain(piece.replace(SPACE, " "))[0]
        if not letters:
            gap.append(piece)
            blind |= is_unknown
            continue
        # Behind an unknown piece any distance is possible, and at least one character.
        at = plain.find(letters, place + blind, len(plain) if blind else place + len(letters) + _REACH)
        if at < 0:
            gap.append(piece)
            blind |= not is_language(piece)  # which is text only where the text begins with it
            continue
        span = origins[at][0], origins[at + len(letters) - 1][1]
        fill(span[0])
        found.append(span)
        blind = False
        place, before = at + len(letters), span[1]
    fill(len(text))
    return found


MOST_MARKS = 32  # characters of one sign that are compared; to order many marks takes Python quadratic time
_REACH = 16  # characters that a vocabulary may have dropped before a piece


def _plain(text: str) -> tuple[str, list[Span]]:
    """A text without accents composed, case and invisible characters, and where each of its characters stands."""
    letters, origins = [], []
    for match in regex.finditer(r"\X", text):
        for letter in unicodedata.normalize("NFKD", match[0][:MOST_MARKS]).casefold():
            if not is_blank(letter):  # vocabularies drop what shows nothing, so that no piece stands for it
                letters.append(letter)
                origins.append(match.span())
    return "".join(letters), origins


def _share(text: str, start: int, stop: int, pieces: Sequence[str]) -> list[Span]:
    """The spans of pieces that together stand for what lies between their neighbours.

    Words go to the pieces that begin with a space, if there are as many; otherwise the pieces share the gap evenly.
    """
    words = [match.span() for match in regex.finditer(r"\S+", text[:stop], pos=start)]
    groups: list[list[str]] = []
    for piece in pieces:
        if not groups or (piece.startswith(SPACE) and any(map(_names, groups[-1]))):
            groups.append([])
        groups[-1].append(piece)
    if len(words) != len(groups):
        words, groups = [(start, max(start, stop))], [list(pieces)]
    spans = []
    for (first, last), group in zip(words, groups, strict=True):
        naming = sum(map(_names, group)) or 1
        edges = np.linspace(first, last, naming + 1).round().astype(int).tolist()
        shares = itertools.pairwise(edges)
        here = first
        for piece in group:
            span = next(shares) if _names(piece) and naming else (here, here)
            spans.append(span)
            here = span[1]
    return spans


def _names(piece: str) -> bool:
    """Whether a piece, which was not found in the text, stands for more than a space."""
    return piece != SPACE and piece not in _CONTROL and not is_language(piece)
