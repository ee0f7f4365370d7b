"""Takes parameters and what else training needs and leaves them as numbered checkpoints (Orbax), newest and best kept.

It knows pytrees, no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

LESS_IS_BETTER = ("loss",)


class Checkpoints:
    """Checkpoints of parameters, of what else training needs, and of metrics."""

    def __init__(self, path: epath.Path, keep_latest: int | None, keep_best: int, best_metric: str, read_only: bool):
        """Opens them; arguments as in `WorkDirectory.open_checkpoints`."""
        self._path = path
        self._best_metric = best_metric

        def metric(metrics: Mapping[str, float]) -> float:
            return metrics[best_metric]

        # BestN sorts upwards and keeps the last ones.
        best = checkpoint_managers.BestN(
            get_metric_fn=metric,
            reverse=best_metric in LESS_IS_BETTER,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,
            best_mode="min" if best_metric in LESS_IS_BETTER else "max",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(keep_latest), best]
            ),
            # What is left of a save that was killed; to a reader it may be one that is under way.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        # Handlers that are named here, rather than found when first used, can tell what a checkpoint holds.
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "training": ocp.StandardCheckpointHandler(),
            "notes": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, `None` if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, the newest where none was scored, `None` if there is none."""
        best = self._manager.best_step()
        return self.latest_step if best is None else best

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
        sign = -1 if self._best_metric in LESS_IS_BETTER else 1
        scored = []
        for step in self._steps():
            if metrics := self._manager.metrics(step):
                scored.append((sign * metrics[self._best_metric], step))
        return self._take(count, [step for _, step in sorted(scored, reverse=True)], "best", "keep_best")

    def _take(self, count: int, steps: list[int], kind: str, setting: str) -> list[int]:
        if count < 1:
            raise ValueError(f"{count} of the {kind} checkpoints: ask for at least 1")
        if count > len(steps):
            scored = "scored " if kind == "best" else ""
            raise ValueError(
                f"{self._path} holds {len(steps)} {scored}checkpoints {sorted(steps)}, not {count}: ask for fewer, or "
                f"let training keep more with training.{setting}"
            )
        return steps[:count]

    def read_notes(self) -> dict[str, Any]:
        """The newest checkpoint's notes."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes

    def save(
        self,
        step: int,
        params: PyTree,
        training: PyTree | None,
        notes: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Begins to write a checkpoint; the arrays may be spent as soon as it returns.

        Args:
            step: its number; one that exists already is left as it is.
            params: the model's parameters.
            training: what else training needs to go on; `None` where none will.
            notes: plain values, kept as JSON.
            metrics: of the validation corpus, if it was scored at this step.
        """
        if step in self._manager.all_steps():
            return
        items = {"params": ocp.args.StandardSave(params), "notes": ocp.args.JsonSave(dict(notes))}
        if training is not None:
            items["training"] = ocp.args.StandardSave(training)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, params: PyTree, training: PyTree) -> tuple[PyTree, PyTree, dict[str, Any]]:
        """The newest checkpoint's parameters, training state and notes, placed and typed as the given trees are."""
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                training=ocp.args.StandardRestore(training),
                notes=ocp.args.JsonRestore(),
            ),
        )
        return restored.params, restored.training, restored.notes

    def restore_params(self, step: str | int, shapes: PyTree) -> PyTree:
        """One checkpoint's parameters, on this process's first device.

        Args:
            step: "best" (the newest where none was scored), "latest" or a number.
            shapes: the parameters' shapes and types.

        Raises:
            ValueError: there is no such checkpoint, or it holds other shapes.
        """
        steps = self._steps()
        number = self.best_step if step == "best" else self.latest_step if step == "latest" else step
        if number not in steps:
            raise ValueError(
                f"{self._path} holds no checkpoint {number!r}: choose best, latest, averaged or one of {steps}"
            )
        self._check_shapes(number, shapes)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
        return self._manager.restore(number, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))).params

    def average_params(self, steps: Sequence[int]) -> PyTree:
        """The mean of some checkpoints' parameters, float32 numpy arrays; two trees are in memory, however many."""
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), self._stored(steps[0]))
        mean = jax.tree.map(np.zeros_like, target)
        for step in steps:
            params = self._manager.restore(
                step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))
            ).params
            jax.tree.map(lambda total, leaf: np.add(total, leaf, out=total), mean, params)
        return jax.tree.map(lambda total: np.divide(total, len(steps), out=total), mean)

    def _stored(self, step: int) -> PyTree:
        """What the checkpoint's parameters are, without their values: leaves with `shape` and `dtype`."""
        self._manager.wait_until_finished()
        stored = self._manager.item_metadata(step).get("params")
        if stored is None:
            raise ValueError(
                f"{self._path / str(step)} is not complete: copy the folder again, or choose another checkpoint"
            )
        return stored.tree

    def _check_shapes(self, step: int, shapes: PyTree) -> None:
        """Checks names and shapes against the checkpoint's; Orbax would list every one of them."""
        stored, wanted = _named_shapes(self._stored(step)), _named_shapes(shapes)
        for name in wanted | stored:
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self._path / str(step)} does not fit config.json: {name} has the shape {stored.get(name)} there "
                    f"and {wanted.get(name)} by the config: put back the config.json that it was trained with"
                )


def _named_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
