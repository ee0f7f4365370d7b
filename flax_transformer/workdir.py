"""Takes what training makes and leaves it in one folder, from which training goes on and a translator is loaded.

The folder holds `config.json`, the vocabulary, `checkpoints/` and `averaged/` (Orbax), `metrics.jsonl` and TensorBoard
events. It knows pytrees, no model.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from jaxtyping import PyTree

from flax_transformer.checkpoints import Checkpoints
from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.data.vocabulary import VocabularyPair


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
