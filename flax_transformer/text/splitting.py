"""Splits texts that are too long for the model into parts that fit, and joins the parts' translations.

`text/sentences.py` knows where sentences end. Clauses end at the characters that Unicode says end them (annex 44,
`Terminal_Punctuation`), so this works for every script.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence

import regex

from flax_transformer.text.sentences import CLOSING, SENTENCE, SENTENCE_WITHOUT_SPACE, cut_sentences

# Possessive, and only at the beginning of a run of marks: otherwise a long run would take quadratic time.
_CLAUSE = rf"(?<![\p{{Terminal_Punctuation}}…–-])[\p{{Terminal_Punctuation}}…–-]++{CLOSING}"
_CLAUSE_WITHOUT_SPACE = r"[\p{Terminal_Punctuation}—--[.?!,;:]]+[\p{Pf}\p{Pe}]*"

# Where a sentence that is too long can be cut, the best places first.
_ENDS = tuple(
    regex.compile(pattern, regex.VERSION1 | regex.DOTALL)
    for pattern in (
        # Every mark that may end a sentence, for texts without upper case.
        rf"{SENTENCE}|{SENTENCE_WITHOUT_SPACE}",
        rf"{_CLAUSE}|{_CLAUSE_WITHOUT_SPACE}",
        r"[\s\u200b]+",  # Khmer and Thai may have zero-width spaces between words
        r"\X",  # a grapheme cluster: a letter with its marks
        r".",
    )
)

# Chinese and Japanese have no spaces between sentences; Thai, Khmer, Lao, Burmese and Tibetan have.
_WITHOUT_SPACE = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Block=CJK_Symbols_And_Punctuation}！-､]", regex.VERSION1
)


def split_sentence(text: str, length: Callable[[str], int], limit: int) -> list[str]:
    """Splits a text that has more tokens than `limit` into sentences, which is what a model was trained on.

    A sentence that is still too long is cut into parts that are as long as possible: between clauses; a clause that is
    too long, at white space; a word that is too long, between characters. Parts have no white space around them.
    `join_parts` restores the text, except for runs of white space and an additional space in a word that was cut.

    Args:
        text: the text; if it fits, it is the only part.
        length: counts the tokens of a text, including the end of sentence. It is called about a dozen times for each
            part, on texts of about the size of the part.
        limit: the maximum number of tokens of a part.

    Raises:
        ValueError: a single character has more tokens than `limit`.
    """

    def measure(part: str) -> int:
        return length(part.strip())

    sentences = [text] if measure(text) <= limit else cut_sentences(text)
    parts = [part for sentence in sentences for part in _split(sentence, measure, limit, _ENDS)]
    return [stripped for part in parts if (stripped := part.strip())] or [""]


def join_parts(parts: Iterable[str]) -> str:
    """Joins parts, or their translations, with spaces, but without them between Chinese or Japanese characters."""
    joined = ""
    for part in filter(None, parts):
        joined += f" {part}" if needs_space(joined, part) else part
    return joined


def needs_space(before: str, after: str) -> bool:
    """Whether a space belongs between two texts: not between Chinese or Japanese characters, nor beside nothing."""
    return bool(before and after) and not (_WITHOUT_SPACE.match(before[-1]) and _WITHOUT_SPACE.match(after[0]))


def _split(text: str, length: Callable[[str], int], limit: int, ends: Sequence[regex.Pattern[str]]) -> list[str]:
    """The parts of the text, including white space, cut after `ends[0]`; if they are too long, after later ends."""
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
            start = stop - len(rest)  # the rest may share a part with the following text
    return parts


def _cut(text: str, end: regex.Pattern[str]) -> list[str]:
    """Cuts the text after each match of `end`."""
    cuts = sorted({0, len(text), *(match.end() for match in end.finditer(text))})
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _farthest(text: str, start: int, cuts: Sequence[int], length: Callable[[str], int], limit: int) -> int:
    """The last cut up to which the text from `start` fits, or `start`; assumes that longer texts have more tokens."""

    def size(index: int) -> int:
        return length(text[start : cuts[index]])

    # Double the width first, so that texts of at most twice a part are measured, however long the whole text is.
    first, width = bisect.bisect_right(cuts, start), 1
    while first + width < len(cuts) and size(first + width) <= limit:
        width *= 2
    after = bisect.bisect_right(range(len(cuts)), limit, first, min(first + width, len(cuts)), key=size)
    return cuts[after - 1] if after > first else start
