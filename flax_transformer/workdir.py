"""The work directory: one folder that holds everything needed to continue a training, or to translate.

It contains `config.json`, the vocabulary, `checkpoints/` and `averaged/` (Orbax), `metrics.jsonl` and TensorBoard
events. This file handles parameters as pytrees and does not depend on the model.
"""

import contextlib
import json
import os
import shlex
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from jaxtyping import PyTree

from flax_transformer.atomic_files import move_aside, write_file
from flax_transformer.checkpoints import Checkpoints
from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import scored_by
from flax_transformer.files import OWN_FILES, OWN_FOLDERS, is_remote, work_directory_of
from flax_transformer.moved_settings import by_new_names


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
        self._unwritten: list[bytes] = []  # lines of metrics for which an object store gave an error
        path = epath.Path(path).expanduser()
        # Orbax accepts only absolute paths; `resolve` would turn gs:// into a local folder.
        self.path = path if path.is_absolute() else path.resolve()
        _check_name(str(self.path))

    @property
    def is_remote(self) -> bool:
        """Whether it is in an object store such as gs://, where files cannot be locked or appended to."""
        return is_remote(str(self.path))

    def check_place(self) -> None:
        """Checks, without changing anything, that the folder can be created or written to.

        Raises:
            ValueError: it cannot be; names the file or folder that prevents it.
        """
        if self.is_remote:
            return
        place = str(self.path)
        if any(len(os.fsencode(part)) > 255 for part in place.split(os.sep)):
            raise ValueError(f"a name in {place[:80]}… is longer than 255 bytes: choose a shorter one")
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise ValueError(f"the folder {self.path} cannot be made: {place} is not a folder; name another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"the folder {self.path} cannot be written to: you may not write in {place}; name another")
        for name in (*OWN_FILES, *OWN_FOLDERS):
            part = os.path.join(self.path, name)
            if not os.path.lexists(part):
                continue
            if os.path.isdir(part) != (name in OWN_FOLDERS):
                kind = "folder" if name in OWN_FOLDERS else "file"
                raise ValueError(f"{part} is in the way of the {kind} of that name: move it, or give another folder")
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
        """Whether a training has been started here."""
        return self._config_file.exists()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes `config.json`: its sections are model, vocabulary, data and training."""
        self._write(self._config_file, config)

    def _write(self, file: epath.Path, content: Mapping[str, Any]) -> None:
        write_file(file, json.dumps(content, indent=2).encode() + b"\n")

    def read_config(self) -> dict[str, Any]:
        """Reads `config.json`, old names as new ones; raises ValueError if it is missing or has no sections."""
        if not self.exists:
            raise ValueError(
                f"{self.path} is not a work directory, config.json is missing: give the --workdir of a training"
            )
        try:
            config = json.loads(self._config_file.read_bytes())
        except ValueError as error:  # no JSON, or no UTF-8
            raise self._damaged(str(error)) from error
        if isinstance(config, dict) and "model_type" in config:
            raise ValueError(
                f"{self.path} has a model in the format of transformers: convert it first, flax-transformer convert "
                "from-marian or from-nllb"
            )
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise self._damaged("it has no sections")
        return by_new_names(config)

    def read_model_config(self) -> TransformerConfig:
        """Reads the model section of `config.json`; raises ValueError if either is missing or invalid."""
        config = self.read_config()
        if "model" not in config:
            raise self._damaged('no section "model"')
        try:
            return from_mapping(TransformerConfig, config["model"], "model")
        except (TypeError, ValueError) as error:  # a string instead of a number, or a number out of range
            raise self._damaged(str(error).partition("\n")[0]) from error

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self._config_file} is damaged ({reason}): put back the file that training wrote there")

    def has_vocabularies(self) -> bool:
        """Whether a vocabulary is stored here."""
        return VocabularyPair.is_in(self.path)

    def write_vocabularies(self, vocabularies: VocabularyPair) -> None:
        """Stores the vocabulary."""
        vocabularies.save(self.path)

    def read_vocabularies(self) -> VocabularyPair:
        """Reads the vocabulary; raises ValueError if it is not the one that the model was trained with."""
        vocabularies = VocabularyPair.load(self.path)
        if self.read_fingerprints().get("vocabulary", vocabularies.fingerprint()) != vocabularies.fingerprint():
            raise ValueError(
                f"the vocabulary in {self.path} is not the one that the model was trained with: put that one back, or "
                "give another --workdir"
            )
        return vocabularies

    def write_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """Records checksums of the vocabulary and the texts that the training uses."""
        self._write(self._fingerprints_file, dict(fingerprints))

    def read_fingerprints(self) -> dict[str, str]:
        """Reads these checksums, an empty dict if there are none; raises ValueError if the file is damaged."""
        if not self._fingerprints_file.exists():
            return {}
        try:
            return dict(json.loads(self._fingerprints_file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self._fingerprints_file} is damaged ({error}): put back the file that training wrote there, or "
                "remove it if vocabulary and texts are what they were"
            ) from error

    def forget_fingerprints(self) -> None:
        """Removes the checksums that a start recorded which failed before it wrote `config.json`."""
        self._fingerprints_file.unlink(missing_ok=True)

    def forget_scores(self) -> None:
        """Removes the scores of all checkpoints: the validation text has changed, so they cannot be compared."""
        self._scores_file.unlink(missing_ok=True)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`; after an interruption some steps appear twice, and the later line counts.

        NaN and infinity, which JSON cannot represent, become null.
        """
        values = json.loads(json.dumps(metrics), parse_constant=lambda name: None)
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        # A kill or a full disk may have cut off the last line; then a new one is begun.
        if self.is_remote:
            self._unwritten.append(line)
            try:
                before = self._read_metrics_file()
                begin = b"\n" if before and not before.endswith(b"\n") else b""
                # Object stores cannot append. They replace objects atomically, so a draft is not needed.
                self._metrics_file.write_bytes(before + begin + b"".join(self._unwritten))
                self._unwritten.clear()
            except Exception as error:  # the stores' clients have errors of their own
                if len(self._unwritten) == 1:
                    warnings.warn(
                        f"{self._metrics_file} cannot be written ({type(error).__name__}: {error}): training goes on, "
                        "and tries it again with the next line",
                        stacklevel=2,
                    )
            return
        with open(self._metrics_file, "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            last = file.read()
            file.write((b"\n" if last and last != b"\n" else b"") + line)

    def finish_metrics(self) -> None:
        """Writes lines that an object store did not take before; raises OSError if it still does not."""
        lines = self._unwritten
        if lines:
            last = json.loads(lines.pop())
            self.append_metrics(last)
        if lines:
            raise OSError(f"the last {len(lines)} lines of {self._metrics_file} could not be written: check the access")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Reads the lines of `metrics.jsonl`, skipping any that was cut off."""
        lines = []
        # As bytes: str has more line ends than "\n", and a line may end inside a character.
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
        is_planned: Callable[[int], bool] = lambda step: True,
        read_only: bool = False,
    ) -> Checkpoints:
        """Opens the checkpoints; use it in a `with` statement, which waits until the last one is written.

        Args:
            keep_latest: how many of the newest to keep; all if not given.
            keep_best: how many of the best to keep as well.
            best_metric: the metric that ranks them.
            found_by: the current settings of evaluation, from `scored_by`; scores that were found with other settings
                are not compared with new ones.
            is_planned: whether a training that is never stopped has a checkpoint at this step. Others do not count for
                `keep_latest`, and are removed when there is a newer one.
            read_only: changes nothing in the folder, to which a training may be writing.
        """
        return Checkpoints(
            self.path / "checkpoints",
            scores_file=self._scores_file,
            keep_latest=keep_latest,
            keep_best=keep_best,
            best_metric=best_metric,
            found_by=found_by,
            is_planned=is_planned,
            read_only=read_only,
        )

    def restore_params(self, step: str | int, shapes: PyTree) -> PyTree:
        """Loads the parameters of one checkpoint, or the average of several, to this process's first device.

        If the config's `training.weights` is "ema", it loads the moving average that the checkpoint holds.

        Args:
            step: "best" by `training.evaluation.best_metric` (the newest if no checkpoint was scored), "latest", a step
                number, "averaged" (what `average_checkpoints` wrote last), or "chosen": "averaged" if
                `training.weights` is "averaged" and there is an average, else "best".
            shapes: the parameters' shapes and types.

        Raises:
            ValueError: there is no such checkpoint, or its parameters have other shapes.
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
                    f"{self.path} holds no average: write one, e.g. with `flax-transformer average --last=5 "
                    f"--workdir={shlex.quote(str(self.path))}`"
                )
            return averages.restore_params("latest", shapes)

    def check_chosen(self) -> None:
        """Raises ValueError if there are no parameters that `restore_params("chosen", ...)` could load."""
        weights = self.read_config().get("training", {}).get("weights", "trained")
        if not (weights == "averaged" and self._has_average()):
            with self._read_checkpoints() as checkpoints:
                checkpoints.newest_steps(1)

    def _has_average(self) -> bool:
        with self._open_averages(read_only=True) as averages:
            return averages.latest_step is not None

    def averages_after(self, step: int) -> bool:
        """Whether there is an average that includes checkpoints of later steps, or does not tell of which."""
        with self._open_averages(read_only=True) as averages:
            if averages.latest_step is None:
                return False
            try:
                return max(averages.read_notes().get("steps", []), default=0) > step
            except Exception:  # Orbax and its storage raise many kinds of errors for a damaged file
                return True

    def set_average_aside(self, step: int) -> None:
        """Moves the average to `damaged/`, with a warning, because training continues from an earlier step."""
        folder = self.path / "damaged"
        move_aside(self.path / "averaged", folder)
        warnings.warn(
            f"the average in {self.path} includes checkpoints after step {step}, from which training continues, or is "
            f"damaged: it was moved to {folder}",
            stacklevel=2,
        )

    def average_checkpoints(self, *, last: int | None = None, best: int | None = None) -> list[int]:
        """Writes the mean of some checkpoints' parameters to `averaged/`, replacing an older mean.

        Args:
            last: how many of the newest checkpoints to average.
            best: how many of the best by `training.evaluation.best_metric` to average; give one of the two.

        Returns:
            The averaged steps, the newest or the best first.

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
        # With increasing numbers, so that the old average is removed only when the new one is complete.
        with self._open_averages(read_only=False) as averages:
            averages.save((averages.latest_step or 0) + 1, {"params": params}, {"steps": steps})
        return steps

    def _read_checkpoints(self) -> Checkpoints:
        # A converted model has no training section.
        training = self.read_config().get("training", {})
        best_metric = training.get("evaluation", {}).get("best_metric", "loss")
        return self.open_checkpoints(best_metric=best_metric, found_by=scored_by(training), read_only=True)

    def _open_averages(self, *, read_only: bool) -> Checkpoints:
        return Checkpoints(
            self.path / "averaged",
            scores_file=None,
            keep_latest=1,
            keep_best=1,
            best_metric="loss",
            read_only=read_only,
        )


def _check_name(path: str) -> None:
    """Raises ValueError for a path in which Orbax can neither write nor read checkpoints."""
    if not path.strip():
        raise ValueError("the name of the work directory is empty (a shell variable that is not set?): give one")
    if "\0" in path or path.encode(errors="replace").decode() != path:
        raise ValueError(f"the work directory {path!r} has bytes in its name that are not UTF-8: choose another name")
    if os.sep == "/" and "\\" in path:
        raise ValueError(
            f"the work directory's path {path} has a backslash, which TensorStore treats as a slash: choose another"
        )
