"""Which checkpoints a training keeps: the newest of those that it planned, and the best by their scores."""

from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from flax_transformer.scores import StepScores


class Newest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoint, and the newest of those that the training would have had it never been stopped.

    So a training that was stopped now and then has at its end the same checkpoints as one that was not.

    Attributes:
        found: the steps of the planned checkpoints that were there at the start, perhaps by other intervals.
    """

    def __init__(self, count: int | None, is_planned: Callable[[int], bool]):
        """Takes how many of the planned ones to keep, all for `None`, and whether there is one planned at a step."""
        self._count, self._is_planned = count, is_planned
        self.found: frozenset[int] = frozenset()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether to keep each checkpoint; Orbax prescribes the name."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        planned = [step for step in steps if step in self.found or self._is_planned(step)]
        planned = steps if self._count is None else planned[-self._count :]
        return [checkpoint.step in (*planned, steps[-1]) for checkpoint in checkpoints]


class Best(checkpoint_managers.PreservationPolicy):
    """Keeps the best checkpoints, even though their scores are recorded after they are written."""

    def __init__(self, scores: StepScores, count: int):
        """Takes the scores, which grow while training goes on, and how many of the best to keep."""
        self._scores, self._count = scores, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether to keep each checkpoint; Orbax prescribes the name."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = [step for step in self._scores.ranked() if step in steps][: self._count]
        return [step in best for step in steps]
