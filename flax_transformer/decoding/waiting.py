"""Holds the sentences that wait for a slot, so that the longest one that fits a gap is found at once, in fair turns."""

import bisect

from flax_transformer.decoding.requests import Request

FEW = 8  # submissions of so few sentences wait together: they cannot keep each other waiting for long
_Entry = tuple[int, int, Request]  # its need, its number counted downwards, and the request


class Waiting:
    """The requests that wait, ordered by the room that they need; of equal ones the first comes first.

    Each large submission takes turns with all others, so that thousands of sentences do not keep a single one waiting.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._by_turn: dict[int, list[_Entry]] = {}  # the first is the next in turn
        self._needs: list[int] = []
        self._number = 0

    def __len__(self) -> int:
        """How many wait, perhaps some that have been cancelled meanwhile."""
        return len(self._needs)

    def add(self, requests: list[Request]) -> None:
        """Lets requests wait, which may come from several submissions."""
        by_submission: dict[int, list[_Entry]] = {}
        for request in requests:
            self._number += 1
            by_submission.setdefault(request.submission, []).append((request.need, -self._number, request))
        for submission, entries in by_submission.items():
            turn = submission if len(entries) > FEW else 0
            line = self._by_turn.setdefault(turn, [])
            line += entries
            line.sort(key=_order)  # quick, since most are in order already
        self._needs += [request.need for request in requests]
        self._needs.sort()

    def count(self, above: int, at_most: int) -> int:
        """How many need more than `above` and at most `at_most` places."""
        return bisect.bisect_right(self._needs, at_most) - bisect.bisect_right(self._needs, above)

    def take(self, above: int, at_most: int) -> Request | None:
        """Takes out the one that needs the most places within these limits, from the submission whose turn it is.

        Returns:
            The request; `None` if there is none.
        """
        while self.count(above, at_most):
            turn, end = self._next(above, at_most)
            entries = self._by_turn.pop(turn)
            need, _, request = entries.pop(end - 1)
            self._needs.pop(bisect.bisect_left(self._needs, need))
            if entries:
                self._by_turn[turn] = entries  # behind all others
            if not request.done:
                return request
        return None

    def _next(self, above: int, at_most: int) -> tuple[int, int]:
        """Whose turn it is within these limits, and the place behind the entry that is to be taken."""
        for turn, entries in self._by_turn.items():
            end = _end(entries, at_most)
            if end > _end(entries, above):
                return turn, end
        raise AssertionError(f"no request needs more than {above} and at most {at_most} places")

    def take_all(self) -> list[Request]:
        """Takes out all of them."""
        requests = [entry[2] for entries in self._by_turn.values() for entry in entries]
        self._by_turn, self._needs = {}, []
        return requests

    def longest(self) -> int:
        """The most places that one of them needs; 0 if none waits."""
        return self._needs[-1] if self._needs else 0


def _order(entry: _Entry) -> tuple[int, int]:
    return entry[:2]


def _end(entries: list[_Entry], at_most: int) -> int:
    return bisect.bisect_right(entries, (at_most, 1), key=_order)
