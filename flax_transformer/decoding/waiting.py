"""Holds the sentences that wait for a slot, so that the longest one that fits a gap is found at once."""

import bisect

from flax_transformer.decoding.requests import Request


class Waiting:
    """The requests that wait, ordered by the room that they need; of equal ones the first comes first."""

    def __init__(self) -> None:
        """Begins with none."""
        self._requests: list[tuple[int, int, Request]] = []
        self._number = 0

    def __len__(self) -> int:
        """How many wait, perhaps some that have been cancelled meanwhile."""
        return len(self._requests)

    def add(self, requests: list[Request]) -> None:
        """Lets requests wait."""
        for request in requests:
            self._number += 1
            self._requests.append((request.need, -self._number, request))
        self._requests.sort(key=lambda entry: entry[:2])  # quick, since most are in order already

    def count(self, above: int, at_most: int) -> int:
        """How many need more than `above` and at most `at_most` places."""
        return self._end(at_most) - self._end(above)

    def take(self, above: int, at_most: int) -> Request | None:
        """Takes out the one that needs the most places within these limits; `None` if there is none."""
        while (end := self._end(at_most)) > self._end(above):
            request = self._requests.pop(end - 1)[2]
            if not request.done:
                return request
        return None

    def take_all(self) -> list[Request]:
        """Takes out all of them."""
        requests, self._requests = [entry[2] for entry in self._requests], []
        return requests

    def longest(self) -> int:
        """The most places that one of them needs; 0 if none waits."""
        return self._requests[-1][0] if self._requests else 0

    def _end(self, at_most: int) -> int:
        return bisect.bisect_right(self._requests, (at_most, 1), key=lambda entry: entry[:2])
