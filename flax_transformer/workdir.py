"""Takes what training makes and leaves it in one folder, from which training goes on and a translator is loaded.

The folder holds `config.json`, the vocabulary, `checkpoints/` and `averaged/` (Orbax), `metrics.jsonl` and TensorBoard
events. It knows pytrees, no model.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.data.vocabulary import VocabularyPair

LESS_IS_BETTER = ("loss",)


class WorkDirectory:
    """One work directory.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: epath.PathLike):
        """Names the folder; nothing is read or written yet."""
        path = epath.Path(path).expanduser()
        # Orbax takes absolute paths only; `resolve` would take gs:// for a folder here.
        self.path = path if path.is_absolute() else path.resolve()

    @property
    def _config_file(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def _metrics_file(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def exists(self) -> bool:
        """Whether a training has begun here."""
        return self._config_file.exists()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes `config.json`: its sections are model, vocabulary, data and training."""
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / "config.json.tmp"
        draft.write_text(json.dumps(config, indent=2) + "\n")
        draft.replace(self._config_file)

    def read_config(self) -> dict[str, Any]:
        """Reads `config.json`; raises ValueError where there is none, or where it does not hold sections."""
        if not self.exists:
            raise ValueError(f"{self.path} is not a work directory, config.json is missing: give train.py's --workdir")
        try:
            config = json.loads(self._config_file.read_bytes())
        except ValueError as error:  # no JSON, or no UTF-8
            raise self._damaged(str(error)) from error
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise self._damaged("no mapping of sections")
        return config

    def read_model_config(self) -> TransformerConfig:
        """The model's section of `config.json`; raises ValueError as above, or where the section is not there."""
        config = self.read_config()
        if "model" not in config:
            raise self._damaged('no section "model"')
        try:
            return from_mapping(TransformerConfig, config["model"], "model")
        except TypeError as error:  # a text where a number belongs
            raise self._damaged(str(error).partition("\n")[0]) from error

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self._config_file} is damaged ({reason}): put back the file that train.py wrote there")

    def has_vocabularies(self) -> bool:
        """Whether a vocabulary is stored here."""
        return any(self.path.glob("*.model")) if self.path.exists() else False

    def write_vocabularies(self, vocabularies: VocabularyPair) -> None:
        """Stores the vocabulary."""
        self.path.mkdir(parents=True, exist_ok=True)
        vocabularies.save(self.path)

    def read_vocabularies(self) -> VocabularyPair:
        """The vocabulary stored here."""
        return VocabularyPair.load(self.path)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`; after an interruption some steps come twice, and the later line counts."""
        with self._metrics_file.open("a") as file:
            file.write(json.dumps(metrics, ensure_ascii=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`, none if there are none."""
        if not self._metrics_file.exists():
            return []
        return [json.loads(line) for line in self._metrics_file.read_text().splitlines()]

    def open_checkpoints(
        self,
        *,
        keep_latest: int | None = None,
        keep_best: int = 1,
        best_metric: str = "loss",
        read_only: bool = False,
    ) -> "Checkpoints":
        """The checkpoints; use it in a `with` statement, which waits for the last one to be written.

        Args:
            keep_latest: how many of the newest are kept; all if not given.
            keep_best: how many of the best are kept as well.
            best_metric: the metric by which they are compared.
            read_only: leaves the folder as it is; a training may be writing to it.
        """
        return Checkpoints(self.path / "checkpoints", keep_latest, keep_best, best_metric, read_only)

    def restore_params(self, step: str | int, shapes: PyTree) -> PyTree:
        """One checkpoint's parameters, or the average, on this process's first device.

        Args:
            step: "best" by training's own metric (the newest where none was scored), "latest", a number, or
                "averaged", what `average_checkpoints` wrote last.
            shapes: the parameters' shapes and types.

        Raises:
            ValueError: there is no such checkpoint, or it holds other shapes.
        """
        if step != "averaged":
            with self._read_checkpoints() as checkpoints:
                return checkpoints.restore_params(step, shapes)
        with self._open_averages(read_only=True) as averages:
            if averages.latest_step is None:
                raise ValueError(
                    f"{self.path} holds no average: write one with `flax-transformer average --workdir={self.path}`"
                )
            return averages.restore_params("latest", shapes)

    def average_checkpoints(self, *, last: int | None = None, best: int | None = None) -> list[int]:
        """Writes the mean of some checkpoints' parameters to `averaged/`, in place of an older one.

        Args:
            last: so many of the newest checkpoints are averaged.
            best: so many of the best by training's own metric are; give one of the two.

        Returns:
            The steps averaged, the newest or the best first.

        Raises:
            ValueError: both or neither is given, or there are fewer checkpoints.
        """
        if (last is None) == (best is None):
            raise ValueError(f"last is {last} and best is {best}: give one of them, the number to average")
        with self._read_checkpoints() as checkpoints:
            if last is not None:
                steps = checkpoints.newest_steps(last)
            else:
                assert best is not None, "one of the two is given"
                steps = checkpoints.best_steps(best)
            params = checkpoints.average_params(steps)
        # Numbered upwards, so that the old average goes only when the new one is complete.
        with self._open_averages(read_only=False) as averages:
            averages.save((averages.latest_step or 0) + 1, params, None, {"steps": steps}, None)
        return steps

    def _read_checkpoints(self) -> "Checkpoints":
        # A converted model has no training section.
        best_metric = self.read_config().get("training", {}).get("best_metric", "loss")
        return self.open_checkpoints(best_metric=best_metric, read_only=True)

    def _open_averages(self, *, read_only: bool) -> "Checkpoints":
        return Checkpoints(self.path / "averaged", keep_latest=1, keep_best=1, best_metric="loss", read_only=read_only)


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
