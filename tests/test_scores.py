import json

import pytest
from etils import epath

from flax_transformer.scores import DEPENDS_ON, StepScores

TODAY = {"weights": "trained", "evaluate_sentences": 0, "beam_size": 1, "alpha": 0.6, "tokenize": "13a"}
OTHER = {"weights": "ema", "evaluate_sentences": 9, "beam_size": 4, "alpha": 1.0, "tokenize": "zh"}


def scores_of(value):
    return dict.fromkeys(DEPENDS_ON, value)


@pytest.fixture
def file(tmp_path):
    return epath.Path(tmp_path / "scores.json")


def test_scores_are_stored_with_the_settings_of_their_evaluation(file):
    StepScores(file, "bleu", TODAY).record(5, {"bleu": 1 / 3})
    assert StepScores(file, "bleu", TODAY).comparable() == {5: {"bleu": 1 / 3}}
    assert json.loads(file.read_text()) == {"5": {"bleu": 1 / 3, "found_by": TODAY}}


@pytest.mark.parametrize("metric", DEPENDS_ON)
@pytest.mark.parametrize("name", TODAY)
def test_scores_with_another_setting_are_not_compared(name, metric, file):
    before = StepScores(file, metric, TODAY | {name: OTHER[name]})
    before.record(1, scores_of(9.0))
    before.record(2, scores_of(8.0))
    now = StepScores(file, metric, TODAY)
    depends = name in DEPENDS_ON[metric]
    assert list(now.comparable()) == ([] if depends else [1, 2])
    now.record(3, scores_of(7.0))
    assert now.ranked()[-1] == 3 or metric == "loss"
    assert now.since_best == (0 if depends or metric == "loss" else 2)
    # With the earlier settings its scores count again, since nothing was deleted.
    assert list(StepScores(file, metric, TODAY | {name: OTHER[name]}).comparable()) == (
        [1, 2] if depends else [1, 2, 3]
    )


def test_scores_without_recorded_settings_count_as_13a(file):
    file.write_text(json.dumps({"1": scores_of(3.0), "2": scores_of(4.0)}))
    for metric in DEPENDS_ON:
        for found_by in ({}, TODAY, OTHER | {"tokenize": "13a"}):
            assert list(StepScores(file, metric, found_by).comparable()) == [1, 2]
    assert StepScores(file, "bleu", OTHER).comparable() == {}
    assert list(StepScores(file, "chrf", OTHER).comparable()) == [1, 2]


def test_later_scores_are_removed_permanently_and_earlier_ones_stay(file):
    scores = StepScores(file, "loss", TODAY)
    for step in (10, 20, 30):
        scores.record(step, scores_of(float(step)))
    scores.forget_after(20)
    assert list(scores.comparable()) == list(StepScores(file, "loss", TODAY).comparable()) == [10, 20]
    scores.forget_after(20)
    scores.forget_after(0)
    assert scores.ranked() == [] and scores.since_best == 0 and json.loads(file.read_text()) == {}


def test_a_step_without_a_score_of_the_metric_is_not_ranked(file):
    file.write_text('{"1": {"loss": 1.0}, "2": {"bleu": 3.0}}')
    assert StepScores(file, "bleu", {}).ranked() == [2] and StepScores(file, "chrf", {}).ranked() == []
