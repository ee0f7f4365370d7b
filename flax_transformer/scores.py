"""Keeps the validation scores of each evaluated step in `scores.json`, with the settings of that evaluation.

Only scores with the same settings are compared: the BLEU of ten sentences says nothing about the BLEU of a thousand.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from flax_transformer.atomic_files import write_file
from flax_transformer.processes import hosts

Scores = Mapping[str, float]

LESS_IS_BETTER = ("loss",)
# The settings that each metric depends on, by their names in `scores.json`.
_OF_TRANSLATIONS = ("weights", "evaluate_sentences", "beam_size", "alpha")
DEPENDS_ON = {
    "loss": ("weights",),
    "chrf": _OF_TRANSLATIONS,
    "exact_match": _OF_TRANSLATIONS,
    "bleu": (*_OF_TRANSLATIONS, "tokenize"),
}
# The key beside a step's scores under which these settings are stored.
FOUND_BY = "found_by"
# Settings of scores without that key, which are from before there was a setting `tokenize`.
BEFORE = {"tokenize": "13a"}


class StepScores:
    """The validation scores of one training."""

    def __init__(self, file: epath.Path | None, best_metric: str, found_by: Mapping[str, Any]):
        """Reads the scores that have been recorded.

        Args:
            file: where they are stored; `None` for checkpoints that are never scored.
            best_metric: the metric by which steps are compared.
            found_by: the current settings; scores with other settings are not compared with new ones.

        Raises:
            ValueError: the file is damaged.
        """
        self._file, self._best_metric, self._found_by = file, best_metric, dict(found_by)
        self._scores, self._settings = _read(file)

    def comparable(self) -> dict[int, Scores]:
        """The scores with the current settings, by step."""
        return {step: scores for step, scores in self._scores.items() if self._is_comparable(step)}

    def ranked(self) -> list[int]:
        """The steps with comparable scores, the best first; among equally good ones, the newest first."""
        return sorted(self.comparable(), key=lambda step: (self._value(step), step), reverse=True)

    @property
    def since_best(self) -> int:
        """How many evaluations came after the first one with the best score; 0 if there was none."""
        values = {step: self._value(step) for step in self.comparable()}
        if not values:
            return 0
        first = min(step for step, value in values.items() if value == max(values.values()))
        return sum(step > first for step in values)

    def record(self, step: int, scores: Scores) -> None:
        """Records the scores of a step, found with the current settings."""
        self._scores[step], self._settings[step] = dict(scores), self._found_by
        self._write()

    def forget_after(self, step: int) -> None:
        """Removes the scores of later steps: training continues from this one, and will compute those steps again."""
        later = [scored for scored in self._scores if scored > step]
        for scored in later:
            del self._scores[scored]
            self._settings.pop(scored, None)
        if later:
            self._write()

    def _write(self) -> None:
        assert self._file is not None, "only a training's checkpoints are scored"
        if not hosts.is_first():
            return
        content = {
            step: scores | ({FOUND_BY: settings} if (settings := self._settings.get(step)) else {})
            for step, scores in self._scores.items()
        }
        write_file(self._file, json.dumps(content, indent=1).encode() + b"\n")

    def _is_comparable(self, step: int) -> bool:
        if self._best_metric not in self._scores[step]:
            return False
        settings = self._settings.get(step, BEFORE)
        names = DEPENDS_ON.get(self._best_metric, ())
        return all(
            settings[name] == self._found_by[name] for name in names if name in settings and name in self._found_by
        )

    def _value(self, step: int) -> float:
        """A step's score, negated if less is better, so that larger is always better."""
        value = self._scores[step][self._best_metric]
        return -math.inf if math.isnan(value) else -value if self._best_metric in LESS_IS_BETTER else value


def _read(file: epath.Path | None) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, Any]]]:
    """The scores of each step, and the settings that they were found with if these were recorded."""
    if file is None or not file.exists():
        return {}, {}
    try:
        scores = {int(step): dict(found) for step, found in json.loads(file.read_bytes()).items()}
        settings = {step: dict(found.pop(FOUND_BY)) for step, found in scores.items() if FOUND_BY in found}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): put back the file that training wrote there, or remove it to forget which "
            "checkpoint was the best"
        ) from error
    return scores, settings
