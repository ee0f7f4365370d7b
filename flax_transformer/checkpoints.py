"""Writes and reads the checkpoints of a training (Orbax), and keeps only the newest and the best of them.

A checkpoint is written before it is scored, so a training that is killed during an evaluation loses nothing; the scores
of all steps are in a file of their own. This file handles parameters as pytrees and does not depend on the model.
"""

import contextlib
import gc
import os
import re
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from flax_transformer.atomic_files import move_aside
from flax_transformer.orbax_paths import literal
from flax_transformer.preservation import Best, Newest
from flax_transformer.processes import hosts
from flax_transformer.scores import Scores, StepScores

TREES = ("params", "ema", "training")

# The files without which Orbax cannot restore an item, for the two kinds of items.
FILES_OF_TREE = ("manifest.ocdbt", "_METADATA")
FILES_OF_NOTES = ("metadata",)


class Checkpoints:
    """The checkpoints of one training: parameters and possibly other trees, with the scores of evaluated steps."""

    def __init__(
        self,
        path: epath.Path,
        *,
        scores_file: epath.Path | None,
        keep_latest: int | None,
        keep_best: int,
        best_metric: str,
        found_by: Mapping[str, Any] = types.MappingProxyType({}),
        is_planned: Callable[[int], bool] = lambda step: True,
        read_only: bool,
    ):
        """Opens the checkpoints.

        Args:
            path: the folder of the checkpoints.
            scores_file: where their scores are stored; `None` for checkpoints that are never scored.
            keep_latest: as in `WorkDirectory.open_checkpoints`, like all the following arguments.
            keep_best: see there.
            best_metric: see there.
            found_by: see there.
            is_planned: see there.
            read_only: see there.
        """
        path = literal(path, read_only=read_only)
        self._path = path
        self._scores = StepScores(scores_file, best_metric, found_by)
        newest = Newest(keep_latest, is_planned)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, Best(self._scores, keep_best)]),
            # Removes what is left of a save that was killed. A reader must not: the save may still be in progress.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        # Only with handlers that are registered here can the manager read a checkpoint's metadata before restoring it.
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in TREES}
        handlers["notes"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
        if not read_only and keep_latest is not None:
            newest.found = self._planned_steps()
        # The step whose checkpoint is being written.
        self._writing: int | None = None
        # The files that must be in that step's folder once it is written; empty after they have been checked.
        self._expected: list[str] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with self._explain_failure():
                self._manager.close()
                self._check_files()
        except OSError:
            # If an OSError is already on its way, the failure has been reported.
            if kind is None or not issubclass(kind, OSError):
                raise

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step; `None` if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, or of the newest if none was scored; `None` if there is no checkpoint."""
        ranked = [step for step in self._scores.ranked() if step in self._manager.all_steps()]
        return ranked[0] if ranked else self.latest_step

    @property
    def all_steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return list(self._manager.all_steps())

    @property
    def scores(self) -> dict[int, Scores]:
        """The scores found with the current settings, by step, including steps whose checkpoints have been deleted."""
        return self._scores.comparable()

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations came after the first one with the best score; 0 if there was none."""
        return self._scores.since_best

    def record_scores(self, step: int, scores: Scores) -> None:
        """Records the scores of a step."""
        self._scores.record(step, scores)

    def forget_scores_after(self, step: int) -> None:
        """Removes the scores of later steps: training continues from this one, and will compute those steps again."""
        self._scores.forget_after(step)

    def _steps(self) -> list[int]:
        steps = self._manager.all_steps()
        if not steps:
            raise ValueError(f"{self._path} holds no checkpoint: train until one is written, or give another --workdir")
        return list(steps)

    def newest_steps(self, count: int) -> list[int]:
        """The steps of the `count` newest checkpoints, newest first; raises ValueError if there are fewer."""
        return self._take(count, sorted(self._steps(), reverse=True), "newest", "keep_latest")

    def best_steps(self, count: int) -> list[int]:
        """The steps of the `count` best checkpoints, best first; raises ValueError if fewer were scored."""
        steps = self._steps()
        return self._take(count, [step for step in self._scores.ranked() if step in steps], "best", "keep_best")

    def _take(self, count: int, steps: list[int], kind: str, setting: str) -> list[int]:
        if count < 1:
            raise ValueError(f"{count} of the {kind} checkpoints: ask for at least 1")
        if kind == "best" and not steps:
            raise ValueError(f"{self._path} has no scored checkpoint: take the newest, --last, or set data.valid")
        if count > len(steps):
            held = f"{len(steps)} {'scored ' if kind == 'best' else ''}checkpoints {sorted(steps)}, not {count}"
            mend = f"ask for fewer, or let training keep more with training.checkpoints.{setting}"
            raise ValueError(f"{self._path} holds {held}: {mend}")
        return steps[:count]

    def _planned_steps(self) -> frozenset[int]:
        """The steps of all checkpoints but the newest one if a signal caused it: older ones of signals are gone."""
        steps = frozenset(self._manager.all_steps())
        if steps:
            try:
                planned = self.read_notes().get("planned", True)
            except Exception:  # it is damaged, which `restore` will report
                planned = True
            steps -= set() if planned else {max(steps)}
        return steps

    def read_notes(self) -> dict[str, Any]:
        """The newest checkpoint's notes."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes

    def save(self, step: int, trees: Mapping[str, PyTree], notes: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint in the background; the arrays may be donated or deleted as soon as this returns.

        Args:
            step: the number of the checkpoint; if it exists already, nothing is written.
            trees: pytrees by name: "params", and possibly others of `TREES`. Every process passes its part of them.
            notes: plain values, stored as JSON.

        Raises:
            OSError: this checkpoint, or the previous one that was still being written, could not be written.
        """
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._explain_failure(), _without_garbage_collection():
            self._manager.wait_until_finished()
            self._check_files()
            self._writing = step
            self._manager.save(step, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave(dict(notes))))
            self._expected = [f"{name}/{file}" for name in items for file in FILES_OF_TREE]
            self._expected += [f"notes/{file}" for file in FILES_OF_NOTES]

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raises OSError if the last checkpoint could not be written; otherwise the next `save` would report it."""
        # Orbax's own `check_for_errors` finds nothing, because the thread that finishes a save clears the error first.
        if not self.is_writing:
            with self._explain_failure():
                self._manager.wait_until_finished()
                self._check_files()

    def _check_files(self) -> None:
        """Raises OSError if the checkpoint that was written lacks a file that a reader needs.

        Orbax reports some failures only in its log, and keeps a checkpoint that nobody can read.
        """
        expected, self._expected = self._expected, []
        if jax.process_index() != 0:  # only process 0 merges the parts of all processes
            return
        for name in expected:
            file = self._path / str(self._writing) / name
            if not file.exists() or not file.stat().length:
                raise OSError(f"{file} is missing or empty after the save, so the checkpoint cannot be read")

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Whatever Orbax and the storage raise, the remedy is the same.
            self._expected = []  # report a failure only once
            with contextlib.suppress(Exception):  # this error is the one to report
                self._manager.reload()  # Orbax may have forgotten a checkpoint that it has not removed
            complete = [step for step in self._manager.all_steps() if step != self._writing]
            goes_on = f"continues from step {max(complete)}" if complete else "starts again"
            raise OSError(
                f"the checkpoint of step {self._writing} could not be written to {self._path} ({_reason(error)}): "
                f"free some space or repair the disk; the same command {goes_on}"
            ) from error

    def restore(self, trees: Mapping[str, PyTree]) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read; returns `None` if there is no checkpoint at all.

        Newer ones that cannot be read are moved to `damaged/`, with a warning; training will write those steps again.

        Args:
            trees: which trees to read; the results have the placement and types of these.

        Returns:
            The step, its trees by name, and its notes.

        Raises:
            ValueError: there are checkpoints, but none can be read.
        """
        targets = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**targets, notes=ocp.args.JsonRestore()))
                found = {name: restored[name] for name in trees}, restored["notes"]
                _check_types(found[0], trees)
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise  # The device failed or memory ran out; the checkpoint is not damaged.
            except Exception as error:  # Orbax and its storage raise many kinds of errors.
                damaged[step] = _reason(error)
            if all(hosts.gather(step not in damaged)):  # all processes must choose the same checkpoint
                self._set_aside(damaged, step)
                return step, *found
            damaged.setdefault(step, "another process cannot read it")
        if damaged:
            newest = max(damaged)
            raise ValueError(
                f"none of the checkpoints {sorted(damaged)} in {self._path} can be read; the error of the newest is: "
                f"{damaged[newest]}; copy the folder again, or give another --workdir"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], instead: int) -> None:
        if not damaged:
            return
        folder = self._path.parent / "damaged"
        if hosts.is_first():
            for step, reason in damaged.items():
                move_aside(self._path / str(step), folder)
                warnings.warn(
                    f"the checkpoint of step {step} cannot be read ({reason}): it was moved to {folder}, and training "
                    f"continues from step {instead}",
                    stacklevel=3,
                )
        hosts.wait("damaged checkpoints are set aside")
        self._manager.reload()

    def restore_params(self, step: str | int, shapes: PyTree, *, ema: bool = False) -> PyTree:
        """Loads the parameters of one checkpoint to this process's first device.

        Args:
            step: "best" (the newest if none was scored), "latest" or a step number.
            shapes: the parameters' shapes and types.
            ema: whether to load their moving average instead.

        Raises:
            ValueError: there is no such checkpoint, or its parameters have other shapes.
        """
        steps = self._steps()
        number = self.best_step if step == "best" else self.latest_step if step == "latest" else step
        if number not in steps:
            raise ValueError(
                f"{self._path} holds no checkpoint {number!r}: choose best, latest, averaged or one of {steps}"
            )
        name = "ema" if ema else "params"
        self._check_shapes(number, name, shapes)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
        return self._manager.restore(number, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(target)}))[name]

    def average_params(self, steps: Sequence[int]) -> PyTree:
        """The mean of several checkpoints' parameters, as float32 NumPy arrays; needs memory for only two of them."""
        mean: PyTree = None
        for step in steps:
            try:
                target = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), self._stored(step, "params"))
                restore = ocp.args.Composite(params=ocp.args.StandardRestore(target))
                params = self._manager.restore(step, args=restore).params
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise
            except Exception as error:  # Orbax and its storage raise many kinds of errors.
                raise ValueError(
                    f"the checkpoint of step {step} cannot be read ({_reason(error)}): move {self._path / str(step)} "
                    "away, and average fewer; a training does so by itself"
                ) from error
            mean = jax.tree.map(np.zeros_like, target) if mean is None else mean
            jax.tree.map(lambda total, leaf: np.add(total, leaf, out=total), mean, params)
        return jax.tree.map(lambda total: np.divide(total, len(steps), out=total), mean)

    def _stored(self, step: int, name: str) -> PyTree:
        """The structure of a tree in the checkpoint: its leaves have `shape` and `dtype`, but no values."""
        self._manager.wait_until_finished()
        stored = self._manager.item_metadata(step).get(name)
        if stored is None:
            raise ValueError(
                f"{self._path / str(step)} is not complete: copy the folder again, or choose another checkpoint"
            )
        return stored.tree

    def _check_shapes(self, step: int, name: str, shapes: PyTree) -> None:
        """Raises ValueError for the first name or shape that differs from the checkpoint's; Orbax would list all."""
        stored, wanted = _named_shapes(self._stored(step, name)), _named_shapes(shapes)
        for leaf in wanted | stored:
            if stored.get(leaf) != wanted.get(leaf):
                raise ValueError(
                    f"{self._path / str(step)} does not fit config.json: {leaf} has the shape {stored.get(leaf)} there "
                    f"and {wanted.get(leaf)} by the config: put back the config.json that it was trained with"
                )


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pauses Python's garbage collector, which would run again and again for the many small objects that Orbax makes.

    These runs are a quarter of the time for which saving the base model blocks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax's message is the whole layout of an array; the cause says more
        error = error.__cause__
    # TensorStore gives the error number of the cause only after a thousand or so characters.
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …")


def _check_types(found: Mapping[str, PyTree], wanted: Mapping[str, PyTree]) -> None:
    """Raises ValueError for a wrong shape or type, as where a random key lost its file of types and became integers."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, leaf), other in leaves:
        if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} is {leaf.dtype}{leaf.shape}, not {other.dtype}{other.shape}")


def _named_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
