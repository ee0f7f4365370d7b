"""Puts the tags of a sentence into its translation, where the alignment says that their words are.

Tags keep their nesting: an element stands around one run of words within its parent's, and never around words of its
siblings. Glossary: U units of the translation (words and other signs), S source pieces. A gap is the place before the
unit of the same number; the last one is behind all.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from flax_transformer.text.alignment import TextAlignment, units
from flax_transformer.text.markup_tokens import escape

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
    words = units(target)
    spread = _Spread(source, alignment, words)
    gaps: dict[Node, tuple[int, int]] = {}
    waiting = [(list(nodes), 0, len(words))]
    while waiting:
        siblings, low, high = waiting.pop()
        _place(siblings, low, high, spread, gaps)
        waiting += [(node.children, *gaps[node]) for node in siblings if node.children]
    return _Writer(target, words, gaps).write(nodes)


class _Spread:
    """How much of each unit of the translation comes from each part of the source."""

    def __init__(self, source: str, alignment: TextAlignment, words: Sequence[tuple[int, int]]):
        self.source = source
        self._spans = np.array(alignment.source_spans, float).reshape(-1, 2)
        self._sizes = self._spans[:, 1] - self._spans[:, 0]
        targets = np.array(alignment.target_spans, float).reshape(-1, 2)
        edges = np.array(words, float).reshape(-1, 2)
        overlaps = np.minimum(edges[:, None, 1], targets[None, :, 1]) - np.maximum(edges[:, None, 0], targets[None, :, 0])
        weights = np.maximum(overlaps, 0) @ (alignment.weights * (self._sizes > 0))
        total = weights.sum(axis=1, keepdims=True)
        self._weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)

    def share(self, start: int, stop: int) -> Float[np.ndarray, "U"]:
        """Each unit's share that comes from these characters of the source."""
        overlaps = np.minimum(self._spans[:, 1], stop) - np.maximum(self._spans[:, 0], start)
        return self._weights @ np.divide(
            np.maximum(overlaps, 0), self._sizes, out=np.zeros_like(overlaps), where=self._sizes > 0
        )

    def border(self, start: int, stop: int) -> Float[np.ndarray, "U"]:
        """Each unit's share from the source piece before `start`, less that from the piece behind `stop`."""
        before = np.flatnonzero((self._spans[:, 1] <= start) & (self._sizes > 0))[-1:]
        behind = np.flatnonzero((self._spans[:, 0] >= stop) & (self._sizes > 0))[:1]
        return self._weights[:, before].sum(axis=1) - self._weights[:, behind].sum(axis=1)


def _place(siblings: Sequence[Node], low: int, high: int, spread: _Spread, gaps: dict[Node, tuple[int, int]]) -> None:
    """Gives each sibling its gaps between `low` and `high`."""
    taken = np.zeros(high - low, bool)
    start, stop = 0, high - low  # what the elements that cross an end of the sentence leave over
    with_words = [node for node in siblings if units(spread.source[node.start : node.stop])]
    shares = {node: spread.share(node.start, node.stop)[low:high] for node in with_words}

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
        if score <= 0 and not taken.all():
            begin = int(np.argmax(np.where(taken, -1.0, shares[node])))
            end = begin + 1
        elif score <= 0:
            continue  # all words are taken: see below
        take(node, begin, end)
    allowed = np.ones(high - low + 1, bool)
    allowed[:start] = allowed[stop + 1 :] = False
    for node in siblings:
        if node in gaps:
            allowed[gaps[node][0] - low + 1 : gaps[node][1] - low] = False
    for node in siblings:
        if node not in gaps:
            border = np.concatenate([[0.0], np.cumsum(spread.border(node.start, node.stop)[low:high])])
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

    def __init__(self, target: str, words: Sequence[tuple[int, int]], gaps: dict[Node, tuple[int, int]]):
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
            self._written.append(markup)
            if node.verbatim is not None:
                self._at = self._behind(last)
            return
        # It has no words: it goes to the word from which no space separates it, and has spaces where it had them.
        apart = node.space_before
        self._copy(min(self._before(first) if apart else self._behind(first), limit))
        if apart and self._at and not self._target[self._at - 1].isspace():
            self._written.append(" ")
        self._written.append(markup)

    def _close(self, node: Node) -> None:
        first, last = self._gaps[node]
        if first < last and node.side != "last":
            self._copy(self._behind(last))
        self._written.append(node.closing)
        behind = self._target[self._at : self._at + 1]
        if first == last and node.space_behind and behind and not behind.isspace():
            self._written.append(" ")

    def _copy(self, stop: int) -> None:
        if stop > self._at:
            self._written.append(escape(self._target[self._at : stop]))
            self._at = stop

    def _before(self, gap: int) -> int:
        return self._words[gap][0] if gap < len(self._words) else len(self._target)

    def _behind(self, gap: int) -> int:
        return self._words[gap - 1][1] if gap > 0 else 0
