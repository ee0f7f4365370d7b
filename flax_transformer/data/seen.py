"""Remembers which texts have been seen, by numbers of 64 bits that stand for them, in eight bytes for each."""

import numpy as np
from jaxtyping import Bool, UInt64


class Seen:
    """A set of 64-bit numbers that grows. That any two of a billion texts share a number has a chance of 3 %.

    The numbers are kept in sorted runs, each more than twice as long as the next, so that a hundred million of them
    take 800 MB, and adding many at once takes little time.
    """

    def __init__(self):
        """Starts with no numbers."""
        self._runs: list[np.ndarray] = []

    def has(self, keys: UInt64[np.ndarray, "keys"]) -> Bool[np.ndarray, "keys"]:
        """Which of these numbers are there."""
        known = np.zeros(len(keys), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            known |= run[places] == keys
        return known

    def add(self, keys: UInt64[np.ndarray, "keys"]) -> Bool[np.ndarray, "keys"]:
        """Adds these numbers, and returns which of them are new; of equal ones, only the first is."""
        unique, first = np.unique(keys, return_index=True)
        new = ~self.has(unique)
        fresh = np.zeros(len(keys), bool)
        fresh[first[new]] = True
        if new.any():
            self._runs.append(unique[new])
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return fresh
