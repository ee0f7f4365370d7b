"""Divides a text into the sentences that are to be translated and everything between them, which comes back as it was.

Kept are white space, blank lines, the marks of lists ("- ", "2. ", "> "), and what has no letters or is no language:
emoji, numbers alone, web and e-mail addresses, and words so long that they must be data, such as base64. A line end
always ends a sentence.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import regex

from flax_transformer.text.sentences import sentence_ends
from flax_transformer.text.splitting import needs_space

# The marks at the beginning of a line: quoted mail and headings, list marks, numbers and letters of lists, check boxes.
_LIST_MARK = regex.compile(
    r"(?:[>#]+|[-*+–—]|[•‣⁃◦∙·●○■□▪▫►▶▸✓✔✗✘➢➤]+|[(\[]?\p{Nd}{1,3}[.)\]]|\p{Nd}{1,3}(?:\.\p{Nd}{1,3})+[.)]"
    r"|[(\[]?\p{L}[)\]]|\[[ xX]\]|[①-⓿❶-➓])(?:\s+|\Z)",
    regex.VERSION1,
)
_ADDRESS = regex.compile(
    # Each begins where a word begins, so that a long word is read once.
    r"(?<![\p{L}\p{Nd}+.-])(?:\p{L}[\p{L}\p{Nd}+.-]*+://|mailto:|www\.)[^\s<>]+"
    r"|(?<![\p{L}\p{Nd}._%+-])[\p{L}\p{Nd}._%+-]++@[\p{L}\p{Nd}-]+(?:\.[\p{L}\p{Nd}-]+)+"
    r"|(?<!\S)(?:[a-z0-9-]++\.)++[a-z]{2,}(?:/[^\s<>]*)(?!\S)",
    regex.VERSION1,
)
_LETTER = regex.compile(r"\p{L}")
# No word of a language is so long; a model would only spend its time on it.
_LONGEST_WORD = 500
# All but space and punctuation, in scripts that have one of them between words.
_OF_WORD = (
    r"[^\s\u200b\u2800\p{Terminal_Punctuation}\p{Line_Break=Complex_Context}\p{Script=Tibetan}"
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}]"
)
_DATA = regex.compile(rf"(?<!{_OF_WORD})(?!\p{{M}}){_OF_WORD}{{{_LONGEST_WORD + 1},}}+", regex.VERSION1)
# Emoji with what belongs to them: the choice of picture, skin colours, joiners, key caps, flags.
_EMOJI = (
    r"(?:[\p{Extended_Pictographic}\p{Emoji_Presentation}]|[0-9#*]\ufe0f?\u20e3)[\ufe0f\u200d\u20e3\p{Emoji_Modifier}]*"
)
_LEADING = regex.compile(rf"(?:\s*{_EMOJI})+\s*", regex.VERSION1)
_TRAILING = regex.compile(rf"\s*(?:{_EMOJI}\s*)+", regex.VERSION1 | regex.REVERSE)  # matches from the end


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in pieces: `kept[0]`, `sentences[0]`, `kept[1]`, `sentences[1]`, …, `kept[-1]`.

    Attributes:
        sentences: what is to be translated; each has a letter, and no white space around it.
        kept: what stands before, between and after the sentences; one more than there are sentences.
    """

    sentences: tuple[str, ...]
    kept: tuple[str, ...]

    def join(self, translations: Sequence[str]) -> str:
        """The text with a translation in place of each sentence; the sentences themselves give the text back.

        Where no white space stood between two sentences, as in Chinese, their translations get a space if they need it.

        Raises:
            ValueError: there is not one translation for each sentence.
        """
        check_count(translations, self.sentences)
        whole = [self.kept[0]]
        for number, translation in enumerate(translations):
            if number and not self.kept[number]:
                pair = slice(number - 1, number + 1)
                changed = tuple(translations[pair]) != self.sentences[pair]
                whole.append(" " * (changed and needs_space(*translations[pair])))
            whole += [translation, self.kept[number + 1]]
        return "".join(whole)


def divide(text: str) -> Document:
    """Divides a text into sentences and what is kept; any str will do, and none of it is lost."""
    spans = sentence_spans(text)
    cuts = [0, *itertools.chain.from_iterable(spans), len(text)]
    return Document(
        sentences=tuple(text[start:stop] for start, stop in spans),
        kept=tuple(text[start:stop] for start, stop in zip(cuts[::2], cuts[1::2], strict=True)),
    )


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text lie: the positions of the first character and behind the last one of each."""
    spans: list[tuple[int, int]] = []
    start = 0
    for line in text.splitlines(keepends=True):
        spans += _spans_of_line(line, start)
        start += len(line)
    return spans


def check_count(translations: Sequence[object], sentences: Sequence[str]) -> None:
    """Raises ValueError if there is not one translation for each sentence."""
    if len(translations) != len(sentences):
        raise ValueError(f"there are {len(translations)} translations of {len(sentences)} sentences: give one for each")


def _spans_of_line(line: str, offset: int) -> list[tuple[int, int]]:
    begin = len(line) - len(line.lstrip())
    while mark := _LIST_MARK.match(line, begin):
        begin = mark.end()
    text = line[begin:]
    data = [edge for match in _DATA.finditer(text) for edge in match.span()]
    spans = []
    for start, stop in itertools.pairwise(sorted({0, *sentence_ends(text), *data, len(text)})):
        start, stop = _without_edges(text, start, stop)
        if _has_language(text[start:stop]):
            spans.append((offset + begin + start, offset + begin + stop))
    return spans


def _without_edges(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span without the white space and the emoji around it."""
    part = text[start:stop]
    if leading := _LEADING.match(part):
        start += leading.end()
    if start < stop and (trailing := _TRAILING.match(text[start:stop])):
        stop = start + trailing.start()
    part = text[start:stop]
    return start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())


def _has_language(sentence: str) -> bool:
    """Whether a sentence has a letter outside of addresses and is not a word of more letters than words have."""
    if _DATA.fullmatch(sentence):
        return False
    return bool(_LETTER.search(sentence)) and bool(_LETTER.search(_ADDRESS.sub("", sentence)))
