"""Rejects, before the first step, settings that would fail only after the last one."""

import dataclasses
import warnings

from flax_transformer.experiment import Experiment, scored_by
from flax_transformer.processes import hosts
from flax_transformer.workdir import WorkDirectory


def check_ahead(experiment: Experiment, workdir: WorkDirectory) -> None:
    """Checks that a training, new or resumed, will have the checkpoints and scores that its end needs.

    Args:
        experiment: with the tokeniser filled in.
        workdir: the work directory, whose checkpoints count, too.

    Raises:
        ValueError: more checkpoints are to be averaged than there will be, or scores are needed and no checkpoint will
            be scored.
    """
    config = experiment.training
    newest, best = _steps_so_far(experiment, workdir)
    first = max(newest, default=0)
    if first >= config.steps:
        return  # An error would not help now: the checkpoints that exist are averaged and tested.
    checkpoints, evaluation = config.checkpoints, config.evaluation
    is_scored = bool(experiment.data.valid) and evaluation.every > 0
    if not is_scored:
        lacking = "training.evaluation.every is 0" if experiment.data.valid else "data.valid is empty"
        remedy = "set it, or " if experiment.data.valid else "name a validation corpus, or "
        if evaluation.patience:
            raise ValueError(
                f"training.evaluation.patience is {evaluation.patience}, but {lacking}: no evaluation could end "
                f"training early; {remedy}set training.evaluation.patience=0"
            )
        if checkpoints.average_best > len(best):
            raise ValueError(
                f"training.checkpoints.average_best is {checkpoints.average_best}, but {lacking}: no checkpoint will "
                f"be scored; {remedy}set training.checkpoints.average_best=0 and "
                f"training.checkpoints.average_last={checkpoints.average_best}"
            )
        if checkpoints.keep_best > 1 and hosts.is_first():
            warnings.warn(
                f"training.checkpoints.keep_best is {checkpoints.keep_best}, but {lacking}: no checkpoint will be "
                "scored, and only the newest are kept",
                stacklevel=2,
            )
    if checkpoints.average_last:
        intervals = [checkpoints.every, evaluation.every]
        _check_count("last", "checkpoints.every", checkpoints.average_last, newest, first, config.steps, intervals)
    elif checkpoints.average_best:
        intervals = [evaluation.every if is_scored else 0]
        _check_count("best", "evaluation.every", checkpoints.average_best, best, first, config.steps, intervals)


def _steps_so_far(experiment: Experiment, workdir: WorkDirectory) -> tuple[set[int], set[int]]:
    """The steps of the existing checkpoints, and of those among them that have comparable scores."""
    if not workdir.exists:
        return set(), set()
    config = experiment.training
    with workdir.open_checkpoints(
        best_metric=config.evaluation.best_metric, found_by=scored_by(dataclasses.asdict(config)), read_only=True
    ) as checkpoints:
        steps = set(checkpoints.all_steps)
        return steps, steps & checkpoints.scores.keys()


def _check_count(
    kind: str, setting: str, wanted: int, there: set[int], first: int, steps: int, intervals: list[int]
) -> None:
    """Raises ValueError if the intervals give too few checkpoints; only warns if some of them have been lost."""
    kept = "checkpoints" if kind == "last" else "scored checkpoints"
    planned = _due(0, steps, intervals, wanted)
    expected = there | _due(first, steps, intervals, wanted)
    if len(expected) >= wanted:
        return
    if len(planned) >= wanted:
        if hosts.is_first():
            warnings.warn(
                f"training.checkpoints.average_{kind} is {wanted}, but from step {first} on there will be only "
                f"{len(expected)} {kept}, because earlier ones are missing: the mean of these will be used",
                stacklevel=3,
            )
        return
    lower = f"lower training.{setting} to {steps // wanted}, or " if steps >= wanted else ""
    raise ValueError(
        f"training.checkpoints.average_{kind} is {wanted}, but training.steps = {steps} leaves {len(expected)} {kept}: "
        f"{lower}set training.checkpoints.average_{kind}={max(1, len(expected))}"
    )


def _due(first: int, steps: int, intervals: list[int], most: int) -> set[int]:
    """The steps after `first` that the intervals select; with many of them, only the last ones, but at least `most`."""
    due = set()
    for every in filter(None, intervals):
        last = steps // every
        due |= {number * every for number in range(max(last - most, first // every) + 1, last + 1)} | {steps}
    return due
