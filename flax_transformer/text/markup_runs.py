"""Collects the text of a paragraph with the markup inside it, and divides it into sentences and what is kept."""

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import regex

from flax_transformer.text.documents import sentence_spans
from flax_transformer.text.markup_places import Node
from flax_transformer.text.markup_tokens import escape
from flax_transformer.text.spelling import LINE_ENDS

# In markup a tab or a line end is a space: tags make paragraphs.
_IN_ONE_LINE = str.maketrans(dict.fromkeys(f"\t{LINE_ENDS}", " "))
_LETTER = regex.compile(r"\p{L}")
_LONGEST_NAME = 40  # characters of an untranslatable element that the model still sees as a word


class Slot(NamedTuple):
    """The place of a sentence.

    Attributes:
        sentence: its text, without markup; a space stands for white space of any length.
        raw: how it was written, with its markup.
        nodes: the markup inside.
        touches: whether it follows the sentence before it without a space.
    """

    sentence: str
    raw: str
    nodes: list[Node]
    touches: bool


class _Mark(NamedTuple):
    """Markup at a place of a run: a start tag, an end tag, something without words, or words that must stay."""

    kind: Literal["open", "close", "point", "words"]
    raw: str
    place: int
    stop: int


class Run:
    """The text of a paragraph, or of another part of a document in which no element ends a sentence."""

    def __init__(self):
        """Starts with no text."""
        self._text: list[str] = []  # characters
        self._raws: list[str] = []  # how each was written
        self._marks: list[_Mark] = []

    def add_text(self, text: str, raw: str) -> None:
        """Adds text, which may be translated, and how it was written."""
        self._text += text
        if len(raw) == len(text):
            self._raws += raw
        elif raw == escape(text):
            self._raws += map(escape, text)
        else:
            self._raws += [raw, *[""] * (len(text) - 1)]

    def open(self, raw: str) -> None:
        """Adds a start tag."""
        self._mark("open", raw)

    def close(self, raw: str) -> None:
        """Adds the end tag of the last element that is open."""
        self._mark("close", raw)

    def add_kept(self, raw: str, text: str = "") -> None:
        """Adds markup that stays as it is; the model sees its text, if it reads like a name or a word."""
        if len(text) > _LONGEST_NAME or not _LETTER.search(text) or text != text.strip():
            self._mark("point", raw)
            return
        place = len(self._text)
        self._marks.append(_Mark("words", raw, place, place + len(text)))
        self._text += text
        self._raws += [raw, *[""] * (len(text) - 1)]

    def parts(self) -> Iterator[str | Slot]:
        """What is kept, as it was written, and the places of sentences between."""
        spans = self._spans()
        ends = _ends(self._marks)
        number = place = end = 0
        for start, stop in [*spans, (len(self._text), len(self._text))]:
            kept: list[str] = []
            while number < len(self._marks):
                mark = self._marks[number]
                if mark.place > start or (mark.place == start < stop and self._is_inside(number, ends, start, stop)):
                    break
                if mark.kind != "words":
                    kept += [*self._raws[place : mark.place], mark.raw]
                    place = mark.place
                number += 1
            yield "".join([*kept, *self._raws[place:start]])
            if start == stop:
                break
            last = number
            for later in range(number, len(self._marks)):
                if self._marks[later].place > stop:
                    break
                if self._marks[later].place < stop or self._is_inside(later, ends, start, stop):
                    last = later + 1
            yield self._slot(start, stop, self._marks[number:last], touches=0 < end == start)
            number, place, end = last, stop, stop

    def _slot(self, start: int, stop: int, marks: list[_Mark], *, touches: bool) -> Slot:
        raw, place = [], start
        for mark in marks:
            if mark.kind != "words":
                raw += [*self._raws[place : mark.place], mark.raw]
                place = mark.place
        text = "".join(self._text[start:stop]).translate(_IN_ONE_LINE)
        nodes = _nodes(marks, start, len(text))
        # Runs of spaces become one, and all places move with what is left.
        kept = [here == 0 or text[here - 1 : here + 1] != "  " for here in range(len(text))]
        moved = [0, *itertools.accumulate(kept)]
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            node.space_before = node.start > 0 and text[node.start - 1].isspace()
            node.space_behind = text[node.stop : node.stop + 1].isspace()
            node.start, node.stop = moved[node.start], moved[node.stop]
            waiting += node.children
        sentence = "".join(itertools.compress(text, kept))
        return Slot(sentence, "".join([*raw, *self._raws[place:stop]]), nodes, touches)

    def _mark(self, kind: Literal["open", "close", "point"], raw: str) -> None:
        self._marks.append(_Mark(kind, raw, len(self._text), len(self._text)))

    def _spans(self) -> list[tuple[int, int]]:
        """Where the sentences lie that have letters other than those of words that stay."""
        while True:
            text = "".join(self._text).translate(_IN_ONE_LINE)
            spans = sentence_spans(text)
            words = [mark for mark in self._marks if mark.kind == "words"]
            edges = {edge for span in spans for edge in span}
            # An end of a sentence inside of words that stay: the model cannot see these words.
            if not any(edge in edges for mark in words for edge in range(mark.place + 1, mark.stop)):
                break
            self._hide()
        open_text = list(text)
        for mark in words:
            open_text[mark.place : mark.stop] = " " * (mark.stop - mark.place)
        blanked = "".join(open_text)
        return [(start, stop) for start, stop in spans if _LETTER.search(blanked, start, stop)]

    def _hide(self) -> None:
        """Takes all words that stay out of the text, and keeps their markup."""
        hidden = [range(mark.place, mark.stop) for mark in self._marks if mark.kind == "words"]
        gone = set(itertools.chain.from_iterable(hidden))
        kept = [place not in gone for place in range(len(self._text))]
        places = [0, *itertools.accumulate(kept)]
        self._text = list(itertools.compress(self._text, kept))
        self._raws = list(itertools.compress(self._raws, kept))
        self._marks = [
            _Mark("point" if mark.kind == "words" else mark.kind, mark.raw, places[mark.place], places[mark.place])
            for mark in self._marks
        ]

    def _is_inside(self, number: int, ends: list[tuple[int, int]], start: int, stop: int) -> bool:
        """Whether a mark belongs to an element that begins or ends within a sentence, and is not empty."""
        mark = self._marks[number]
        first, last = ends[number]
        if mark.kind == "words":
            return start <= first < stop
        if mark.kind == "point" or first == last or (first <= start and last >= stop):
            return False
        return start <= first < stop if mark.kind == "open" else start < last <= stop


def _ends(marks: list[_Mark]) -> list[tuple[int, int]]:
    """For each mark the places where its element begins and ends."""
    ends = [(mark.place, mark.stop) for mark in marks]
    opened: list[int] = []
    for number, mark in enumerate(marks):
        if mark.kind == "open":
            opened.append(number)
        elif mark.kind == "close":
            begin = opened.pop()
            ends[begin] = ends[number] = marks[begin].place, mark.place
    assert not opened, "an element that is not closed"
    return ends


def _nodes(marks: list[_Mark], start: int, length: int) -> list[Node]:
    """The tree of the markup inside a sentence of `length` characters from `start`; elements may cross its ends."""
    roots: list[Node] = []
    opened: list[Node] = []
    for mark in marks:
        place = mark.place - start
        if mark.kind == "close":
            if opened:
                node = opened.pop()
                node.stop, node.closing = place, mark.raw
            else:
                roots = [Node(0, place, "", mark.raw, "first", children=roots)]
            continue
        node = Node(place, mark.stop - start, mark.raw, verbatim=mark.raw if mark.kind == "words" else None)
        (opened[-1].children if opened else roots).append(node)
        if mark.kind == "open":
            opened.append(node)
    for node in opened:
        node.stop, node.side = length, "last"
    return roots
