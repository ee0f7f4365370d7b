"""Takes a text too long for the model and leaves parts that are not, and joins their translations again.

What ends a sentence or a clause is what Unicode says it is (annex 44, `Sentence_Terminal`, `Terminal_Punctuation`), so
that every script has its own marks; there are no lists of abbreviations, which are a language's own.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence

import regex

# "." and its like stand inside numbers, addresses and names too, where they end nothing. Other scripts' marks do not,
# and often no white space follows them.
_QUOTES = r"""['"\p{Pi}\p{Pf}\p{Pe}]*(?=\s)"""
_SENTENCE = rf"[\p{{Sentence_Terminal}}…]+{_QUOTES}"
_SENTENCE_WITHOUT_SPACE = r"[\p{Sentence_Terminal}--[.?!]]+[\p{Pf}\p{Pe}]*"
_CLAUSE = rf"[\p{{Terminal_Punctuation}}…–-]+{_QUOTES}"
_CLAUSE_WITHOUT_SPACE = r"[\p{Terminal_Punctuation}—--[.?!,;:]]+[\p{Pf}\p{Pe}]*"

# What ends a piece of text, the better places to cut first.
_ENDS = tuple(
    regex.compile(pattern, regex.VERSION1 | regex.DOTALL)
    for pattern in (
        # "e.g. this" and "'Why?' he said" go on in lower case. A text all in lower case has the next row.
        rf"{_SENTENCE}(?!\s+\p{{Ll}})|{_SENTENCE_WITHOUT_SPACE}",
        rf"{_SENTENCE}|{_SENTENCE_WITHOUT_SPACE}",
        rf"{_CLAUSE}|{_CLAUSE_WITHOUT_SPACE}",
        r"[\s\u200b]+",  # Khmer and Thai may have a space of no width between words
        r"\X",  # what a reader takes for one character: a letter and its marks
        r".",
    )
)

# Chinese and Japanese write no space between sentences; Thai, Khmer, Lao, Burmese and Tibetan do.
_WITHOUT_SPACE = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Block=CJK_Symbols_And_Punctuation}！-､]", regex.VERSION1
)


def split_sentence(text: str, length: Callable[[str], int], limit: int) -> list[str]:
    """Splits a text of more than so many tokens into its sentences, as a model knows them from its training.

    A sentence that is still too long is cut into parts as full as fits: at the marks between its clauses; a clause, at
    white space; a word, between characters. Parts have no white space around them. Nothing else is lost: `join_parts`
    makes the text of them again, but for runs of white space and a space inside a word that was cut.

    Args:
        text: of any length; one that fits is one part.
        length: counts the tokens of a text, its end of sentence included. It is called some dozen times for each part,
            on texts of about that size.
        limit: the most tokens of a part.

    Raises:
        ValueError: a single character has more.
    """

    def measure(part: str) -> int:
        return length(part.strip())

    sentences = [text] if measure(text) <= limit else _cut(text, _ENDS[0])
    parts = [part for sentence in sentences for part in _split(sentence, measure, limit, _ENDS[1:])]
    return [stripped for part in parts if (stripped := part.strip())] or [""]


def join_parts(parts: Iterable[str]) -> str:
    """Joins parts, or translations of them: with a space, and without between Chinese or Japanese characters."""
    joined = ""
    for part in filter(None, parts):
        apart = joined and not (_WITHOUT_SPACE.match(joined[-1]) and _WITHOUT_SPACE.match(part[0]))
        joined += f" {part}" if apart else part
    return joined


def _split(text: str, length: Callable[[str], int], limit: int, ends: Sequence[regex.Pattern[str]]) -> list[str]:
    """The parts of the text, white space included, cut after `ends[0]`; where that is not enough, after later ones."""
    size = length(text)
    if size <= limit:
        return [text]
    if not ends:
        raise ValueError(f"{text!r} alone has {size} tokens, the limit is {limit}: raise it")
    cuts = list(itertools.accumulate(map(len, _cut(text, ends[0]))))
    parts, start = [], 0
    while start < len(text):
        stop = _farthest(text, start, cuts, length, limit)
        if stop > start:
            parts.append(text[start:stop])
            start = stop
        else:
            stop = cuts[bisect.bisect_right(cuts, start)]
            *whole, rest = _split(text[start:stop], length, limit, ends[1:])
            parts += whole
            start = stop - len(rest)  # the rest shares a part with what follows
    return parts


def _cut(text: str, end: regex.Pattern[str]) -> list[str]:
    """The text in pieces, cut after each such end."""
    cuts = sorted({0, len(text), *(match.end() for match in end.finditer(text))})
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _farthest(text: str, start: int, cuts: Sequence[int], length: Callable[[str], int], limit: int) -> int:
    """The last of the cuts up to which the text from `start` fits, or `start`; a longer text is taken for longer."""

    def size(index: int) -> int:
        return length(text[start : cuts[index]])

    # Doubling first: what is measured is at most twice a part, however long the text.
    first, width = bisect.bisect_right(cuts, start), 1
    while first + width < len(cuts) and size(first + width) <= limit:
        width *= 2
    after = bisect.bisect_right(range(len(cuts)), limit, first, min(first + width, len(cuts)), key=size)
    return cuts[after - 1] if after > first else start
