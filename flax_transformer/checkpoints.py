"""Takes the trees of a training and leaves them as numbered checkpoints (Orbax), the newest and the best of them kept.

A checkpoint is written first and scored later, so that a training that is killed while it evaluates has lost nothing:
the scores of all steps stand in a file of their own. It knows pytrees, no model.
"""

import contextlib
import gc
import os
import re
import textwrap
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from flax_transformer.orbax_paths import literal
from flax_transformer.scores import Scores, StepScores

TREES = ("params", "ema", "training")

# What Orbax cannot restore an item without, by the kind of item.
FILES_OF_TREE = ("manifest.ocdbt", "_METADATA")
FILES_OF_NOTES = ("metadata",)


class Checkpoints:
    """Checkpoints, each with the parameters and whatever trees else, and the scores of the steps that have some."""

    def __init__(
        self,
        path: epath.Path,
        *,
        scores_file: epath.Path | None,
        keep_latest: int | None,
        keep_best: int,
        best_metric: str,
        found_by: Mapping[str, Any] = types.MappingProxyType({}),
        read_only: bool,
    ):
        """Opens them; arguments as in `WorkDirectory.open_checkpoints`, and where the scores are, if there are any."""
        path = literal(path, read_only=read_only)
        self._path = path
        self._scores = StepScores(scores_file, best_metric, found_by)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(keep_latest), _Best(self._scores, keep_best)]
            ),
            # What is left of a save that was killed; to a reader it may be one that is under way.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        # Handlers that are named here, rather than found when first used, can tell what a checkpoint holds.
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in TREES}
        handlers["notes"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
        # The step whose checkpoint is being written.
        self._writing: int | None = None
        # The files that must be in the folder of that step when it is written; none where they have been looked at.
        self._expected: list[str] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with self._explain_failure():
                self._manager.close()
                self._check_files()
        except OSError:
            # A failure that has been told of is not told twice.
            if kind is None or not issubclass(kind, OSError):
                raise

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, `None` if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, the newest where none was scored, `None` if there is none."""
        ranked = [step for step in self._scores.ranked() if step in self._manager.all_steps()]
        return ranked[0] if ranked else self.latest_step

    @property
    def all_steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return list(self._manager.all_steps())

    @property
    def scores(self) -> dict[int, Scores]:
        """The scores that can be compared with today's, by step, also of those whose checkpoints are gone."""
        return self._scores.comparable()

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations came after the first one with the best score; 0 if there was none."""
        return self._scores.since_best

    def record_scores(self, step: int, scores: Scores) -> None:
        """Writes down how good the parameters of a step are."""
        self._scores.record(step, scores)

    def forget_scores_after(self, step: int) -> None:
        """Drops the scores of later steps: training goes on from this one, and they will have other parameters."""
        self._scores.forget_after(step)

    def _steps(self) -> list[int]:
        steps = self._manager.all_steps()
        if not steps:
            raise ValueError(f"{self._path} holds no checkpoint: train until one is written, or give another --workdir")
        return list(steps)

    def newest_steps(self, count: int) -> list[int]:
        """The steps of so many of the newest checkpoints, newest first; ValueError where there are fewer."""
        return self._take(count, sorted(self._steps(), reverse=True), "newest", "keep_latest")

    def best_steps(self, count: int) -> list[int]:
        """The steps of so many of the best checkpoints, best first; ValueError where fewer were scored."""
        steps = self._steps()
        return self._take(count, [step for step in self._scores.ranked() if step in steps], "best", "keep_best")

    def _take(self, count: int, steps: list[int], kind: str, setting: str) -> list[int]:
        if count < 1:
            raise ValueError(f"{count} of the {kind} checkpoints: ask for at least 1")
        if count > len(steps):
            scored = "scored " if kind == "best" else ""
            raise ValueError(
                f"{self._path} holds {len(steps)} {scored}checkpoints {sorted(steps)}, not {count}: ask for fewer, or "
                f"let training keep more with training.checkpoints.{setting}"
            )
        return steps[:count]

    def read_notes(self) -> dict[str, Any]:
        """The newest checkpoint's notes."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes

    def save(self, step: int, trees: Mapping[str, PyTree], notes: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays may be spent as soon as it returns.

        Args:
            step: its number; one that exists already is left as it is.
            trees: by name: "params", and what else there is of `TREES`; of all processes together.
            notes: plain values, kept as JSON.

        Raises:
            OSError: this one, or the one before, which was still being written, could not be.
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
        """Raises OSError if the checkpoint that is being written cannot be; else it would be told at the next one."""
        # Not Orbax's own `check_for_errors`: the thread that ends a save takes the error before anyone can look.
        if not self.is_writing:
            with self._explain_failure():
                self._manager.wait_until_finished()
                self._check_files()

    def _check_files(self) -> None:
        """Raises OSError where the checkpoint that was written lacks a file that a reader needs.

        Of some failures Orbax tells only in its log, and keeps a checkpoint that nobody can read.
        """
        expected, self._expected = self._expected, []
        if jax.process_index() != 0:  # the process that puts the parts of all others together
            return
        for name in expected:
            file = self._path / str(self._writing) / name
            if not file.exists() or not file.stat().length:
                raise OSError(f"{file} is missing or empty after the save, so that nobody could read the checkpoint")

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Whatever Orbax and the storage under it raise, the mend is the same.
            self._expected = []  # a failure is told once
            complete = [step for step in self._manager.all_steps() if step != self._writing]
            goes_on = f"goes on from step {max(complete)}" if complete else "begins anew"
            raise OSError(
                f"the checkpoint of step {self._writing} could not be written to {self._path} ({_reason(error)}): "
                f"make room or mend the disk; the same command {goes_on}"
            ) from error

    def restore(self, trees: Mapping[str, PyTree]) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """The newest checkpoint that can be read, `None` if there is none at all.

        Newer ones that cannot be read are moved to `damaged/`, with a warning: their steps will be written again.

        Args:
            trees: what is read, placed and typed as these trees are.

        Returns:
            The step, its trees by name, and its notes.

        Raises:
            ValueError: there are checkpoints, and none can be read.
        """
        targets = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**targets, notes=ocp.args.JsonRestore()))
                found = {name: restored[name] for name in trees}, restored["notes"]
                _check_types(found[0], trees)
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise  # The device failed, or memory is short: the checkpoint is as good as it was.
            except Exception as error:  # Orbax and what it reads with raise many kinds.
                damaged[step] = _reason(error)
            if _on_all_processes(step not in damaged):
                self._set_aside(damaged, step)
                return step, *found
            damaged.setdefault(step, "another process cannot read it")
        if damaged:
            newest = max(damaged)
            raise ValueError(
                f"none of the checkpoints {sorted(damaged)} in {self._path} can be read, the newest because of: "
                f"{damaged[newest]}: copy the folder again, or give another --workdir"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], instead: int) -> None:
        if not damaged:
            return
        folder = self._path.parent / "damaged"
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            for step, reason in damaged.items():
                number = len(list(folder.glob(f"{step}-*"))) + 1
                (self._path / str(step)).rename(folder / f"{step}-{number}")
                warnings.warn(
                    f"the checkpoint of step {step} cannot be read ({reason}): it was moved to {folder}, and training "
                    f"goes on from step {instead}",
                    stacklevel=3,
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def restore_params(self, step: str | int, shapes: PyTree, *, ema: bool = False) -> PyTree:
        """One checkpoint's parameters, on this process's first device.

        Args:
            step: "best" (the newest where none was scored), "latest" or a number.
            shapes: the parameters' shapes and types.
            ema: whether their moving average is read in their place.

        Raises:
            ValueError: there is no such checkpoint, or it holds other shapes.
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
        """The mean of some checkpoints' parameters, float32 numpy arrays; two trees are in memory, however many."""
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), self._stored(steps[0], "params"))
        mean = jax.tree.map(np.zeros_like, target)
        for step in steps:
            params = self._manager.restore(
                step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))
            ).params
            jax.tree.map(lambda total, leaf: np.add(total, leaf, out=total), mean, params)
        return jax.tree.map(lambda total: np.divide(total, len(steps), out=total), mean)

    def _stored(self, step: int, name: str) -> PyTree:
        """What a tree of the checkpoint is, without its values: leaves with `shape` and `dtype`."""
        self._manager.wait_until_finished()
        stored = self._manager.item_metadata(step).get(name)
        if stored is None:
            raise ValueError(
                f"{self._path / str(step)} is not complete: copy the folder again, or choose another checkpoint"
            )
        return stored.tree

    def _check_shapes(self, step: int, name: str, shapes: PyTree) -> None:
        """Checks names and shapes against the checkpoint's; Orbax would list every one of them."""
        stored, wanted = _named_shapes(self._stored(step, name)), _named_shapes(shapes)
        for leaf in wanted | stored:
            if stored.get(leaf) != wanted.get(leaf):
                raise ValueError(
                    f"{self._path / str(step)} does not fit config.json: {leaf} has the shape {stored.get(leaf)} there "
                    f"and {wanted.get(leaf)} by the config: put back the config.json that it was trained with"
                )


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the best checkpoints, by scores that may have come after they were written."""

    def __init__(self, scores: StepScores, count: int):
        self._scores, self._count = scores, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = [step for step in self._scores.ranked() if step in steps][: self._count]
        return [step in best for step in steps]


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keeps Python from looking for garbage: of the many small objects that Orbax makes it would look again and again.

    That is a quarter of the time that a save of the base model blocks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _on_all_processes(good: bool) -> bool:
    """Whether all is well on every process, so that all take the same checkpoint."""
    return good if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(good)).all())


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax shows the whole layout of an array, and the cause behind it
        error = error.__cause__
    # TensorStore's number of the cause stands behind some thousand characters.
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …")


def _check_types(found: Mapping[str, PyTree], wanted: Mapping[str, PyTree]) -> None:
    """Checks that keys come back as keys: of those whose file of types is gone, Orbax returns the bits alone."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, leaf), other in leaves:
        if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} is {leaf.dtype}{leaf.shape}, not {other.dtype}{other.shape}")


def _named_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
