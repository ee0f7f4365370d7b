"""Keeps the validation scores of a training's steps in `scores.json`, each with the settings that it was found by.

Only scores that were found alike are compared: BLEU of ten sentences says nothing about BLEU of a thousand.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

Scores = Mapping[str, float]

LESS_IS_BETTER = ("loss",)
# The settings of training that each metric depends on.
_OF_TRANSLATIONS = ("weights", "evaluate_sentences", "beam_size", "alpha")
DEPENDS_ON = {
    "loss": ("weights",),
    "chrf": _OF_TRANSLATIONS,
    "exact_match": _OF_TRANSLATIONS,
    "bleu": (*_OF_TRANSLATIONS, "tokenize"),
}
# The key beside a step's scores that holds these settings.
FOUND_BY = "found_by"
# What is known of scores without that key: BLEU had no other tokeniser when they were written.
BEFORE = {"tokenize": "13a"}


class StepScores:
    """The scores of a training's steps."""

    def __init__(self, file: epath.Path | None, best_metric: str, found_by: Mapping[str, Any]):
        """Reads them.

        Args:
            file: where they are, if there are any.
            best_metric: the metric by which steps are compared.
            found_by: today's settings; scores that were found by others are not compared with today's.

        Raises:
            ValueError: the file is damaged.
        """
        self._file, self._best_metric, self._found_by = file, best_metric, dict(found_by)
        self._scores, self._settings = _read(file)

    def comparable(self) -> dict[int, Scores]:
        """By step, the scores that were found as today's are."""
        return {step: scores for step, scores in self._scores.items() if self._is_comparable(step)}

    def ranked(self) -> list[int]:
        """The steps with such scores, the best first, of equally good ones the newest."""
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
        """Writes down how good the parameters of a step are, found by today's settings."""
        self._scores[step], self._settings[step] = dict(scores), self._found_by
        self._write()

    def forget_after(self, step: int) -> None:
        """Drops the scores of later steps: training goes on from this one, and they will have other parameters."""
        later = [scored for scored in self._scores if scored > step]
        for scored in later:
            del self._scores[scored]
            self._settings.pop(scored, None)
        if later:
            self._write()

    def _write(self) -> None:
        assert self._file is not None, "only a training's checkpoints are scored"
        if jax.process_index() != 0:
            return
        content = {
            step: scores | ({FOUND_BY: settings} if (settings := self._settings.get(step)) else {})
            for step, scores in self._scores.items()
        }
        draft = self._file.with_name(f"{self._file.name}.tmp")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(self._file)

    def _is_comparable(self, step: int) -> bool:
        if self._best_metric not in self._scores[step]:
            return False
        settings = self._settings.get(step, BEFORE)
        names = DEPENDS_ON.get(self._best_metric, ())
        return all(
            settings[name] == self._found_by[name] for name in names if name in settings and name in self._found_by
        )

    def _value(self, step: int) -> float:
        """A step's score, larger is better."""
        value = self._scores[step][self._best_metric]
        return -math.inf if math.isnan(value) else -value if self._best_metric in LESS_IS_BETTER else value


def _read(file: epath.Path | None) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, Any]]]:
    """The scores of each step, and the settings that they were found by where these are told."""
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
