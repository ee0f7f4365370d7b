"""Takes what training makes and leaves it in one folder, from which training goes on and a translator is loaded.

The folder holds `config.json`, the vocabulary, `checkpoints/` (Orbax), `metrics.jsonl` and TensorBoard events. It
knows pytrees, no model.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
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
        """Reads `config.json`; raises ValueError where there is none."""
        if not self.exists:
            raise ValueError(f"{self.path} is not a work directory, config.json is missing: give train.py's --workdir")
        return json.loads(self._config_file.read_text())

    def read_model_config(self) -> TransformerConfig:
        """The model's section of `config.json`."""
        return from_mapping(TransformerConfig, self.read_config()["model"], "model")

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


class Checkpoints:
    """Checkpoints of parameters, of what else training needs, and of metrics."""

    def __init__(self, path: epath.Path, keep_latest: int | None, keep_best: int, best_metric: str, read_only: bool):
        """Opens them; arguments as in `WorkDirectory.open_checkpoints`."""
        self._path = path

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
        self._manager = ocp.CheckpointManager(path, options=options)

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

    def read_notes(self) -> dict[str, Any]:
        """The newest checkpoint's notes."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes

    def save(
        self, step: int, params: PyTree, training: PyTree, notes: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Begins to write a checkpoint; the arrays may be spent as soon as it returns.

        Args:
            step: its number; one that exists already is left as it is.
            params: the model's parameters.
            training: what else training needs to go on.
            notes: plain values, kept as JSON.
            metrics: of the validation corpus, if it was scored at this step.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            notes=ocp.args.JsonSave(dict(notes)),
        )
        self._manager.save(step, args=items, metrics=metrics)

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
            ValueError: there is no such checkpoint.
        """
        steps = self._manager.all_steps()
        if not steps:
            raise ValueError(f"{self._path} holds no checkpoint: train until one is written, or give another --workdir")
        number = self.best_step if step == "best" else self.latest_step if step == "latest" else step
        if number not in steps:
            raise ValueError(f"{self._path} holds no checkpoint {number!r}: choose best, latest or one of {steps}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
        return self._manager.restore(number, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))).params
