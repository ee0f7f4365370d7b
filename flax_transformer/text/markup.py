"""Takes the markup of HTML or XML out of a text, so that its sentences can be translated, and puts it back.

Paragraphs, list items, cells and the like divide sentences; bold words, links and the like are taken out of their
sentence, and put around the words that the alignment links with theirs. Code, styles, comments, attributes, and
elements that say `translate="no"` or have the class `notranslate` stay as they are.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from flax_transformer.text.alignment import TextAlignment
from flax_transformer.text.documents import check_count
from flax_transformer.text.markup_places import insert_markup
from flax_transformer.text.markup_runs import Run, Slot
from flax_transformer.text.markup_tokens import Token, escape, read_tokens
from flax_transformer.text.splitting import needs_space

_LETTER = re.compile(r"[^\W\d_]")

# The elements that are parts of a sentence, as HTML has them, and as older pages do.
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big blink cite data del dfn em font i ins label mark nobr q rb rp rt rtc ruby s slot "
    "small span strike strong sub sup time tt u".split()
)
# Tokens that are no elements with words and still end a sentence.
_BREAKS = frozenset(
    "area audio base basefont br canvas col embed frame hr iframe input noembed noframes object param plaintext pre "
    "source textarea track video xmp".split()
)
# Elements that stay, whose words may be part of a sentence.
_WORDS = frozenset("code kbd samp var".split())
# Elements of HTML that are neither: they end a sentence. Others are XML, where the text around them decides.
_BLOCKS = frozenset(
    "address article aside blockquote body button caption center colgroup datalist dd details dialog dir div dl dt "
    "fieldset figcaption figure footer form frameset h1 h2 h3 h4 h5 h6 head header hgroup html legend li main map "
    "marquee menu meter nav noscript ol optgroup option output p picture progress search section select summary table "
    "tbody td tfoot th thead title tr ul".split()
)


@dataclasses.dataclass(frozen=True)
class MarkupDocument:
    """A text with markup whose sentences are to be translated.

    Attributes:
        parts: the text in pieces: what is kept, and the places of sentences.
    """

    parts: tuple[str | Slot, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What is to be translated, without markup, entities decoded."""
        return tuple(part.sentence for part in self._slots)

    @property
    def aligned(self) -> tuple[bool, ...]:
        """For each sentence whether it has markup inside, so that `join` needs its alignment."""
        return tuple(bool(part.nodes) for part in self._slots)

    @property
    def _slots(self) -> list[Slot]:
        return [part for part in self.parts if isinstance(part, Slot)]

    def join(self, translations: Sequence[str], alignments: Sequence[TextAlignment | None]) -> str:
        """The text with a translation in place of each sentence, and with all its markup; it is always well-formed.

        Args:
            translations: a translation of each sentence, as text without markup.
            alignments: the alignment of each sentence; `None` where `aligned` is false, or where there is none: markup
                within such a sentence is put at the same place relative to the whole.

        Raises:
            ValueError: there is not one translation and one alignment for each sentence.
        """
        check_count(translations, self.sentences)
        check_count(alignments, self.sentences)
        written = []
        number, before = 0, ""
        for part in self.parts:
            if isinstance(part, str):
                written.append(part)
                continue
            translation, alignment = translations[number], alignments[number]
            if part.touches and translation != part.sentence and needs_space(before, translation):
                written.append(" ")
            if translation == part.sentence:
                written.append(part.raw)
            elif part.nodes:
                written.append(insert_markup(part.nodes, part.sentence, translation, alignment))
            else:
                written.append(escape(translation))
            number, before = number + 1, translation
        return "".join(written)


def divide_markup(text: str) -> MarkupDocument:
    """Divides HTML or XML, a whole document or a fragment, into sentences and what is kept.

    Raises:
        ValueError: the text is no well-formed XML, and lxml, which reads HTML, is not installed, or its elements are
            nested more than 2,000 deep.
    """
    return MarkupDocument(tuple(part for part in _divide(read_tokens(text)) if part))


class _Structure:
    """What each element of a list of tokens is; elements have the numbers of their start tags, -1 is the whole."""

    def __init__(self, tokens: Sequence[Token]):
        self._tokens = tokens
        self.end: dict[int, int] = {}
        self.parent: dict[int, int] = {}
        self.translates = {-1: True}
        texts: set[int] = set()  # elements with text of their own
        speaking: set[int] = set()  # elements that have, somewhere, text to translate
        breaking: set[int] = set()  # elements that end a sentence, somewhere
        lettered: set[int] = set()  # elements that have, somewhere, a letter
        opened = [-1]
        for number, token in enumerate(tokens):
            inside = opened[-1]
            if _LETTER.search(token.text):
                lettered.add(inside)
            if token.kind == "start":
                self.parent[number] = inside
                self.translates[number] = self.translates[inside] if token.translate is None else token.translate
                opened.append(number)
            elif token.kind == "end":
                self.end[opened.pop()] = number
            elif token.kind == "text" and not token.text.isspace():
                texts.add(inside)
                if self.translates[inside]:
                    speaking.add(inside)
            elif token.name in _BREAKS:
                breaking.add(inside)
        inline = {-1: False}
        for number, parent in self.parent.items():
            name = tokens[number].name
            unknown = name not in _INLINE and name not in _BLOCKS
            inline[number] = name in _INLINE or (unknown and (parent in texts or inline[parent]))
        for number, parent in reversed(self.parent.items()):
            if number in speaking:
                speaking.add(parent)
            if number in lettered:
                lettered.add(parent)
            if number in breaking or not inline[number] or (number in speaking and not self.translates[number]):
                breaking.add(number)
                breaking.add(parent)
        self._speaking, self._breaking, self._lettered = speaking, breaking, lettered

    def is_kept(self, number: int) -> bool:
        """Whether nothing in an element is to be translated because its attributes say so."""
        return not self.translates[number] and number not in self._speaking

    def breaks(self, number: int) -> bool:
        """Whether an element ends the sentence before it, because it is a block or contains one."""
        return number in self._breaking

    def is_note(self, number: int) -> bool:
        """Whether an element is raised and has no letters, as marks of footnotes and powers are, behind a word."""
        if self._tokens[number].name != "sup" or number in self._lettered:
            return False
        after = self.end[number] + 1
        behind = self._tokens[after] if after < len(self._tokens) else None
        return behind is None or behind.kind != "text" or not behind.text[0].isalnum()


def _divide(tokens: Sequence[Token]) -> Iterator[str | Slot]:
    structure = _Structure(tokens)
    run = Run()
    opened = [-1]
    number = 0
    while number < len(tokens):
        token = tokens[number]
        apart = False
        if token.kind == "start" and (structure.is_kept(number) or structure.is_note(number)):
            inside = tokens[number : structure.end[number] + 1]
            token = Token("other", "".join(each.raw for each in inside), text="".join(each.text for each in inside))
            apart = structure.breaks(number)
            number = structure.end[number]
            if not apart:
                run.add_kept(token.raw, token.text)
        elif token.kind == "start":
            opened.append(number)
            apart = structure.breaks(number)
            if not apart:
                run.open(token.raw)
        elif token.kind == "end":
            apart = structure.breaks(opened.pop())
            if not apart:
                run.close(token.raw)
        elif token.kind == "text":
            apart = not structure.translates[opened[-1]]
            if not apart:
                run.add_text(token.text, token.raw)
        else:
            apart = token.name in _BREAKS
            if not apart:
                run.add_kept(token.raw, token.text if token.name in _WORDS else "")
        if apart:
            yield from run.parts()
            yield token.raw
            run = Run()
        number += 1
    yield from run.parts()
