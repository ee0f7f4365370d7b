"""Takes what training makes and leaves it in one folder, from which training goes on and a translator is loaded.

The folder holds `config.json`, the vocabulary, `checkpoints/` and `averaged/` (Orbax), `metrics.jsonl` and TensorBoard
events. It knows pytrees, no model.
"""

import contextlib
import json
import os
import types
import warnings
from collections.abc import Mapping
from typing import Any

from etils import epath
from jaxtyping import PyTree

from flax_transformer.checkpoints import Checkpoints
from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import scored_by
from flax_transformer.files import OWN_FILES, OWN_FOLDERS, work_directory_of


class WorkDirectory:
    """One work directory.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: epath.PathLike):
        """Names the folder; nothing is read or written yet.

        Raises:
            ValueError: the name is empty, or has a character with which checkpoints cannot be stored.
        """
        _check_name(os.fspath(path))
        path = epath.Path(path).expanduser()
        # Orbax takes absolute paths only; `resolve` would take gs:// for a folder here.
        self.path = path if path.is_absolute() else path.resolve()
        _check_name(str(self.path))

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store such as gs://, where files cannot be locked or appended to."""
        return "://" in str(self.path)

    def check_place(self) -> None:
        """Checks, before anything is made, that the folder can be made or written to.

        Raises:
            ValueError: it cannot be; names the file or folder that is in the way.
        """
        if self.is_remote:
            return
        place = str(self.path)
        if any(len(os.fsencode(part)) > 255 for part in place.split(os.sep)):
            raise ValueError(f"a name in {place[:80]}… is longer than 255 bytes: choose a shorter one")
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise ValueError(f"the folder {self.path} cannot be made: {place} is no folder; name another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"the folder {self.path} cannot be written to: you may not write in {place}; name another")
        for name in (*OWN_FILES, *OWN_FOLDERS):
            part = os.path.join(self.path, name)
            if not os.path.lexists(part):
                continue
            if os.path.isdir(part) != (name in OWN_FOLDERS):
                kind = "folder" if name in OWN_FOLDERS else "file"
                raise ValueError(f"{part} is in the way of the {kind} of that name: move it, or name another folder")
            if not os.access(part, os.W_OK):
                raise ValueError(f"{part} cannot be written to: give yourself the right to, or name another folder")
        if owner := work_directory_of(str(self.path)):
            raise ValueError(f"{self.path} lies in what belongs to the work directory {owner}: name another folder")

    @property
    def _config_file(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def _fingerprints_file(self) -> epath.Path:
        return self.path / "fingerprints.json"

    @property
    def _scores_file(self) -> epath.Path:
        return self.path / "scores.json"

    @property
    def _metrics_file(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def exists(self) -> bool:
        """Whether a training has begun here."""
        return self._config_file.exists()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes `config.json`: its sections are model, vocabulary, data and training."""
        self._write(self._config_file, config)

    def _write(self, file: epath.Path, content: Mapping[str, Any]) -> None:
        """Writes JSON; a reader never sees half of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.tmp")
        draft.write_text(json.dumps(content, indent=2) + "\n")
        draft.replace(file)

    def read_config(self) -> dict[str, Any]:
        """Reads `config.json`; raises ValueError where there is none, or where it does not hold sections."""
        if not self.exists:
            raise ValueError(
                f"{self.path} is not a work directory, config.json is missing: give the --workdir of a training"
            )
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
        except (TypeError, ValueError) as error:  # a text where a number belongs, or a number out of its range
            raise self._damaged(str(error).partition("\n")[0]) from error

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self._config_file} is damaged ({reason}): put back the file that train.py wrote there")

    def has_vocabularies(self) -> bool:
        """Whether a vocabulary is stored here."""
        return VocabularyPair.is_in(self.path)

    def write_vocabularies(self, vocabularies: VocabularyPair) -> None:
        """Stores the vocabulary."""
        self.path.mkdir(parents=True, exist_ok=True)
        vocabularies.save(self.path)

    def read_vocabularies(self) -> VocabularyPair:
        """The vocabulary stored here; raises ValueError if it is not the one that the model was trained with."""
        vocabularies = VocabularyPair.load(self.path)
        if self.read_fingerprints().get("vocabulary", vocabularies.fingerprint()) != vocabularies.fingerprint():
            raise ValueError(
                f"the vocabulary in {self.path} is not the one that the model was trained with: put that one back, or "
                "give another --workdir"
            )
        return vocabularies

    def write_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """Writes down by which vocabulary and texts the training is known."""
        self._write(self._fingerprints_file, dict(fingerprints))

    def read_fingerprints(self) -> dict[str, str]:
        """What `write_fingerprints` wrote, nothing if it did not; ValueError where it is damaged."""
        if not self._fingerprints_file.exists():
            return {}
        try:
            return dict(json.loads(self._fingerprints_file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self._fingerprints_file} is damaged ({error}): put back the file that train.py wrote there, or "
                "remove it if vocabulary and texts are what they were"
            ) from error

    def forget_scores(self) -> None:
        """Drops the scores of all checkpoints: those of another text cannot be compared."""
        self._scores_file.unlink(missing_ok=True)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`; after an interruption some steps come twice, and the later line counts.

        NaN and infinity, which JSON does not know, become null.
        """
        values = json.loads(json.dumps(metrics), parse_constant=lambda name: None)
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        before = self._read_metrics_file()
        if before and not before.endswith(b"\n"):  # a kill or a full disk cut that line off; this one must not join it
            line = b"\n" + line
        if self.is_remote:
            # Object stores cannot append. They change a whole object at once, so that a draft would gain nothing.
            self._metrics_file.write_bytes(before + line)
        else:
            with self._metrics_file.open("ab") as file:
                file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`, none if there are none; a line that was cut off is passed over."""
        lines = []
        # As bytes: a text splits at more than "\n", and is none where a character was cut in two.
        for line in self._read_metrics_file().split(b"\n"):
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def _read_metrics_file(self) -> bytes:
        try:
            return self._metrics_file.read_bytes()
        except FileNotFoundError:
            return b""

    def open_checkpoints(
        self,
        *,
        keep_latest: int | None = None,
        keep_best: int = 1,
        best_metric: str = "loss",
        found_by: Mapping[str, Any] = types.MappingProxyType({}),
        read_only: bool = False,
    ) -> "Checkpoints":
        """The checkpoints; use it in a `with` statement, which waits for the last one to be written.

        Args:
            keep_latest: how many of the newest are kept; all if not given.
            keep_best: how many of the best are kept as well.
            best_metric: the metric by which they are compared.
            found_by: the settings of training by which scores are found today (`TrainingConfig`'s, or a part of them);
                scores that others gave are not compared with these.
            read_only: leaves the folder as it is; a training may be writing to it.
        """
        return Checkpoints(
            self.path / "checkpoints",
            scores_file=self._scores_file,
            keep_latest=keep_latest,
            keep_best=keep_best,
            best_metric=best_metric,
            found_by=found_by,
            read_only=read_only,
        )

    def restore_params(self, step: str | int, shapes: PyTree) -> PyTree:
        """One checkpoint's parameters, or the average, on this process's first device.

        Where the config's `training.weights` is "ema", those of a checkpoint are their moving average.

        Args:
            step: "chosen" ("averaged" where `training.weights` is that and there is an average, else "best"), "best" by
                training's own metric (the newest where none was scored), "latest", a number, or "averaged", what
                `average_checkpoints` wrote last.
            shapes: the parameters' shapes and types.

        Raises:
            ValueError: there is no such checkpoint, or it holds other shapes.
        """
        # A converted model has no training section.
        weights = self.read_config().get("training", {}).get("weights", "trained")
        if step == "chosen":
            step = "averaged" if weights == "averaged" and self._has_average() else "best"
        if step != "averaged":
            with self._read_checkpoints() as checkpoints:
                return checkpoints.restore_params(step, shapes, ema=weights == "ema")
        with self._open_averages(read_only=True) as averages:
            if averages.latest_step is None:
                raise ValueError(
                    f"{self.path} holds no average: write one with `flax-transformer average --workdir={self.path}`"
                )
            return averages.restore_params("latest", shapes)

    def _has_average(self) -> bool:
        with self._open_averages(read_only=True) as averages:
            return averages.latest_step is not None

    def averages_after(self, step: int) -> bool:
        """Whether there is an average, and checkpoints of later steps are part of it."""
        with self._open_averages(read_only=True) as averages:
            return averages.latest_step is not None and max(averages.read_notes().get("steps", []), default=0) > step

    def set_average_aside(self, step: int) -> None:
        """Moves the average to `damaged/`, with a warning, since training goes on from an earlier step."""
        folder = self.path / "damaged"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.glob("averaged-*"))) + 1
        (self.path / "averaged").rename(folder / f"averaged-{number}")
        warnings.warn(
            f"the average in {self.path} is of checkpoints after step {step}, from which training goes on: it was "
            f"moved to {folder}",
            stacklevel=2,
        )

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
            averages.save((averages.latest_step or 0) + 1, {"params": params}, {"steps": steps})
        return steps

    def _read_checkpoints(self) -> "Checkpoints":
        # A converted model has no training section.
        training = self.read_config().get("training", {})
        best_metric = training.get("best_metric", "loss")
        return self.open_checkpoints(best_metric=best_metric, found_by=scored_by(training), read_only=True)

    def _open_averages(self, *, read_only: bool) -> "Checkpoints":
        return Checkpoints(
            self.path / "averaged",
            scores_file=None,
            keep_latest=1,
            keep_best=1,
            best_metric="loss",
            read_only=read_only,
        )


def _check_name(path: str) -> None:
    """Raises ValueError for a path under which checkpoints could be neither written nor read."""
    if not path.strip():
        raise ValueError("the name of the work directory is empty (a shell variable that is not set?): give one")
    if "\0" in path or path.encode(errors="replace").decode() != path:
        raise ValueError(f"the work directory {path!r} has bytes in its name that are no UTF-8: choose another name")
    if os.sep == "/" and "\\" in path:
        raise ValueError(
            f"the work directory's path {path} holds a backslash, which TensorStore takes for a slash: choose another"
        )
