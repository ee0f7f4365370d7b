"""Puts the tags of a sentence into its translation, where the alignment says that their words are.

Tags keep their nesting: an element stands around one run of words within its parent's, and never around words of its
siblings. Glossary: U units of the translation (words and other signs, or blocks of them if it is very long), S source
pieces. A gap is the place before the unit of the same number; the last one is behind all.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from flax_transformer.text.alignment import Span, TextAlignment, blocks
from flax_transformer.text.markup_tokens import escape

_WORD = re.compile(r"\w")

Side = Literal["inside", "first", "last"]


@dataclasses.dataclass(eq=False)
class Node:
    """An element, or something without words such as an image or a comment, in a sentence.

    Attributes:
        start: the position of its first character in the sentence.
        stop: the position behind its last character.
        opening: its start tag, or all of something without words.
        closing: its end tag.
        side: "first" if it began before the sentence, so that it has the first words of the translation; "last" if it
            goes on behind the sentence, so that it has the last ones.
        verbatim: what to write in place of its words, if they must not be translated.
        space_before: whether a space stands before it.
        space_behind: whether one stands behind it.
        children: what it contains, in order.
    """

    start: int
    stop: int
    opening: str
    closing: str = ""
    side: Side = "inside"
    verbatim: str | None = None
    space_before: bool = False
    space_behind: bool = False
    children: list["Node"] = dataclasses.field(default_factory=list)


def insert_markup(nodes: Sequence[Node], source: str, target: str, alignment: TextAlignment | None) -> str:
    """The translation `target`, escaped, with the markup that `nodes` describe in `source`.

    Without an alignment markup is put at the same place relative to the whole.
    """
    alignment = alignment or TextAlignment.by_position(source, target)
    words = blocks(target)
    spread = _Spread(source, target, alignment, words)
    gaps: dict[Node, Span] = {}
    waiting = [(list(nodes), 0, len(words))]
    while waiting:
        siblings, low, high = waiting.pop()
        _place(siblings, low, high, spread, gaps)
        waiting += [(node.children, *gaps[node]) for node in siblings if node.children]
    return _Writer(target, words, gaps).write(nodes)


class _Spread:
    """How much of each unit of the translation comes from each part of the source."""

    def __init__(self, source: str, target: str, alignment: TextAlignment, words: Sequence[Span]):
        here = blocks(source)
        self._starts, self._stops = np.array(here, int).reshape(-1, 2).T
        weights = alignment.weights.astype(float)
        # Without a model's pieces the spans are units already; such texts may be long, and products of matrices slow.
        if alignment.target_spans != tuple(words):
            weights = _overlaps(words, alignment.target_spans) @ weights
        if alignment.source_spans != tuple(here):
            to_source = _overlaps(alignment.source_spans, here)
            sizes = to_source.sum(axis=1, keepdims=True)
            weights = weights @ np.divide(to_source, sizes, out=np.zeros_like(to_source), where=sizes > 0)
        total = weights.sum(axis=1, keepdims=True)
        self._weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0).T
        # Sums over the units of the source before each one, so that any part of it takes one subtraction.
        self._sums = np.concatenate([np.zeros((1, len(words))), np.cumsum(self._weights, axis=0)])
        self._words = np.cumsum([0, *(bool(_WORD.search(source, *unit)) for unit in here)])
        self.is_word = np.array([bool(_WORD.search(target, *word)) for word in words], bool)

    def share(self, node: Node) -> Float[np.ndarray, "U"]:
        """Each unit's share that comes from the text of a node."""
        return self._until(node.stop) - self._until(node.start)

    def border(self, node: Node) -> Float[np.ndarray, "U"]:
        """Each unit's share from the unit of the source before a node, less that from the one behind it."""
        border = np.zeros(self._weights.shape[1])
        before = int(np.searchsorted(self._stops, node.start, side="right")) - 1
        behind = int(np.searchsorted(self._starts, node.stop, side="left"))
        if before >= 0:
            border += self._weights[before]
        if behind < len(self._starts):
            border -= self._weights[behind]
        return border

    def has_units(self, node: Node) -> bool:
        """Whether a node has visible text."""
        return self._touched(node)[0] < self._touched(node)[1]

    def has_word(self, node: Node) -> bool:
        """Whether a node has more than punctuation."""
        first, last = self._touched(node)
        return bool(self._words[last] > self._words[first])

    def _touched(self, node: Node) -> tuple[int, int]:
        first = int(np.searchsorted(self._stops, node.start, side="right"))
        return first, max(first, int(np.searchsorted(self._starts, node.stop, side="left")))

    def _until(self, place: int) -> Float[np.ndarray, "U"]:
        """Each unit's share from the source before a place."""
        unit = int(np.searchsorted(self._stops, place, side="right"))
        if unit == len(self._stops) or self._starts[unit] >= place:
            return self._sums[unit]
        part = (place - self._starts[unit]) / (self._stops[unit] - self._starts[unit])
        return self._sums[unit] + part * self._weights[unit]


def _overlaps(first: Sequence[Span], second: Sequence[Span]) -> Float[np.ndarray, "F G"]:
    """The number of characters that each span of one list shares with each of another."""
    one, other = np.array(first, float).reshape(-1, 1, 2), np.array(second, float).reshape(1, -1, 2)
    return np.maximum(np.minimum(one[..., 1], other[..., 1]) - np.maximum(one[..., 0], other[..., 0]), 0.0)


def _place(siblings: Sequence[Node], low: int, high: int, spread: _Spread, gaps: dict[Node, Span]) -> None:
    """Gives each sibling its gaps between `low` and `high`."""
    taken = np.zeros(high - low, bool)
    start, stop = 0, high - low  # what the elements that cross an end of the sentence leave over
    with_words = [node for node in siblings if spread.has_units(node)]
    shares = {node: spread.share(node)[low:high] for node in with_words}

    def take(node: Node, begin: int, end: int) -> None:
        gaps[node] = low + begin, low + end
        taken[begin:end] = True

    for node in siblings:
        if node.side == "first":
            start = _prefix(shares[node]) if node in shares else 0
            take(node, 0, start)
    for node in siblings:
        if node.side == "last":
            stop -= _prefix(shares[node][start:][::-1]) if node in shares else 0
            take(node, stop, high - low)
    inner = [node for node in with_words if node.side == "inside"]
    for node in sorted(inner, key=lambda node: _best_run(shares[node])[0], reverse=True):
        score, begin, end = _best_run(np.where(taken, -np.inf, shares[node]))
        free = ~taken & (spread.is_word[low:high] | ~spread.has_word(node))
        if score <= 0 or not free[begin:end].any():
            # It goes around the word that is most its own; but words that must stay replace no other words.
            if node.verbatim is not None or not free.any():
                continue
            begin = int(np.argmax(np.where(free, shares[node], -1.0)))
            end = begin + 1
        take(node, begin, end)
    allowed = np.ones(high - low + 1, bool)
    allowed[:start] = allowed[stop + 1 :] = False
    for node in siblings:
        if node in gaps:
            allowed[gaps[node][0] - low + 1 : gaps[node][1] - low] = False
    for node in siblings:
        if node not in gaps:
            border = np.concatenate([[0.0], np.cumsum(spread.border(node)[low:high])])
            gap = int(np.argmax(np.where(allowed, border, -np.inf)))
            take(node, gap, gap)


def _best_run(shares: Float[np.ndarray, "U"]) -> tuple[float, int, int]:
    """The run of units that has most of an element's words and fewest of others: its score, first and last gap."""
    sums = np.concatenate([[0.0], np.cumsum(np.maximum(shares - 0.5, -1e6))])
    rises = sums - np.minimum.accumulate(sums)
    end = int(np.argmax(rises))
    return float(rises[end]), int(np.argmin(sums[: end + 1])), end


def _prefix(shares: Float[np.ndarray, "U"]) -> int:
    """The number of first units that are an element's."""
    return int(np.argmax(np.concatenate([[0.0], np.cumsum(shares - 0.5)])))


class _Writer:
    """Writes a translation with its tags, from left to right."""

    def __init__(self, target: str, words: Sequence[Span], gaps: dict[Node, Span]):
        self._target, self._words, self._gaps = target, words, gaps
        self._written: list[str] = []
        self._at = 0

    def write(self, nodes: Sequence[Node]) -> str:
        waiting: list[tuple[Iterator[Node], Node | None]] = [(self._sorted(nodes), None)]
        while waiting:
            siblings, parent = waiting[-1]
            node = next(siblings, None)
            if node is not None:
                self._open(node, len(self._target) if parent is None else self._behind(self._gaps[parent][1]))
                waiting.append((self._sorted(node.children), node))
                continue
            waiting.pop()
            if parent is not None:
                self._close(parent)
        self._copy(len(self._target))
        return "".join(self._written)

    def _sorted(self, nodes: Sequence[Node]) -> Iterator[Node]:
        ranks = {"first": 0, "inside": 1, "last": 2}
        return iter(sorted(nodes, key=lambda node: (ranks[node.side], *self._gaps[node])))

    def _open(self, node: Node, limit: int) -> None:
        first, last = self._gaps[node]
        markup = node.opening if node.verbatim is None else node.verbatim
        if first < last:
            if node.side != "first":
                self._copy(self._before(first))
            if node.verbatim is not None:
                self._space(node)
                self._at = self._behind(last)
            self._written.append(markup)
            return
        # It has no words: it goes to the word from which no space separates it, and has spaces where it had them.
        apart = node.space_before
        self._copy(min(self._before(first) if apart else self._behind(first), limit))
        self._space(node)
        self._written.append(markup)

    def _close(self, node: Node) -> None:
        first, last = self._gaps[node]
        if first < last and node.side != "last":
            self._copy(self._behind(last))
        self._written.append(node.closing)
        behind = self._target[self._at : self._at + 1]
        if (first == last or node.verbatim is not None) and node.space_behind and behind and not behind.isspace():
            self._written.append(" ")

    def _space(self, node: Node) -> None:
        """Writes a space where one stood before a node and none stands before its place."""
        if node.space_before and self._at and not self._target[self._at - 1].isspace():
            self._written.append(" ")

    def _copy(self, stop: int) -> None:
        if stop > self._at:
            self._written.append(escape(self._target[self._at : stop]))
            self._at = stop

    def _before(self, gap: int) -> int:
        return self._words[gap][0] if gap < len(self._words) else len(self._target)

    def _behind(self, gap: int) -> int:
        return self._words[gap - 1][1] if gap > 0 else 0
