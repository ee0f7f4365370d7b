import dataclasses
import shutil
import warnings

import pytest

from flax_transformer.decoding.translator import Translator
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.workdir import WorkDirectory
from tests.training.conftest import lines_of, with_training
from tests.training.test_loop_options import let_losses_be, same

AVERAGED = {"weights": "averaged", "checkpoints.keep_latest": 9}


def without_valid(experiment):
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, valid=""))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"checkpoints.average_last": 5, "checkpoints.every": 6},
            r"average_last is 5, .* leaves 2 .*[.]every to 2, or .*=2",
        ),
        (
            {"checkpoints.average_last": 3, "checkpoints.every": 100},
            r"average_last is 3, .* leaves 1 .*checkpoints.every to 4, or",
        ),
        (
            {"checkpoints.average_best": 5, "checkpoints.keep_best": 9, "evaluation.every": 4},
            r"average_best is 5, .* leaves 3 .*evaluation.every to 2, or .*=3",
        ),
        (
            {"checkpoints.average_best": 2, "checkpoints.keep_best": 2},
            r"average_best is 2, but training.evaluation.every is 0: .*average_last=2",
        ),
        (
            {"evaluation.patience": 2, "weights": "trained"},
            r"patience is 2, but training.evaluation.every is 0: .*set .*patience=0",
        ),
    ],
)
def test_settings_that_cannot_work_at_the_end_are_refused_before_the_start(changes, message, experiment, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(with_training(experiment, **(AVERAGED | changes)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes", [{"checkpoints.average_best": 2, "weights": "averaged"}, {"evaluation.patience": 2}]
)
def test_scores_need_a_validation_corpus(changes, experiment, tmp_path):
    experiment = with_training(
        without_valid(experiment), **{"evaluation.every": 3, "checkpoints.keep_best": 1 + (len(changes) > 1)}, **changes
    )
    with pytest.raises(ValueError, match="but data.valid is empty: .* name a validation corpus, or"):
        train_and_evaluate(experiment, tmp_path)


@pytest.mark.slow
def test_keeping_best_checkpoints_without_evaluations_is_a_warning(experiment, tmp_path):
    experiment = with_training(without_valid(experiment), steps=1, **{"checkpoints.keep_best": 4})
    with pytest.warns(UserWarning, match="keep_best is 4, but data.valid is empty"):
        train_and_evaluate(experiment, tmp_path)


@pytest.mark.slow
def test_a_continued_training_counts_existing_checkpoints_and_keeps_the_test(experiment, tmp_path, monkeypatch):
    experiment = with_training(experiment, **(AVERAGED | {"weights": "trained"}), **{"checkpoints.every": 2}, steps=6)
    let_losses_be(monkeypatch, [1.0] * 9)
    train_and_evaluate(experiment, tmp_path / "run")
    averaged = {**AVERAGED, "checkpoints.average_last": 4, "checkpoints.every": 100}
    # 2, 4 and 6 are there, and the end at 9 is the fourth, which the settings alone would not give.
    path = shutil.copytree(tmp_path / "run", tmp_path / "enough")
    assert train_and_evaluate(with_training(experiment, steps=9, **averaged), path) is not None
    for step in (2, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    path = shutil.copytree(tmp_path / "run", tmp_path / "few")
    with pytest.raises(ValueError, match="average_last is 4, but training.steps = 9 leaves 2 checkpoints: lower"):
        train_and_evaluate(with_training(experiment, steps=9, **averaged), path)
    # The last step was made, so the existing checkpoints are averaged and tested.
    with pytest.warns(UserWarning, match="there are 1 checkpoints, not the 4 whose mean is wanted"):
        assert train_and_evaluate(with_training(experiment, **averaged), tmp_path / "run") is not None
    assert lines_of(tmp_path / "run", "test")[-1]["loss"] == 1.0


@pytest.mark.slow
def test_after_early_stopping_the_existing_checkpoints_are_averaged(experiment, tmp_path, monkeypatch):
    changes = AVERAGED | {
        "checkpoints.average_best": 5,
        "checkpoints.keep_best": 9,
        "evaluation.every": 1,
        "evaluation.patience": 2,
    }
    let_losses_be(monkeypatch, [1.0, 2.0, 3.0, 7.0])
    with pytest.warns(UserWarning, match="there are 3 scored checkpoints, not the 5"):
        assert train_and_evaluate(with_training(experiment, steps=9, **changes), tmp_path).loss == 7.0


def roll_back(path, *steps):
    for step in steps:
        shutil.rmtree(path / "checkpoints" / str(step))


@pytest.mark.slow
def test_after_a_rollback_removed_steps_are_scored_again_and_patience_ignores_them(experiment, tmp_path, monkeypatch):
    changes = {
        "steps": 4,
        "evaluation.every": 1,
        "checkpoints.every": 1,
        "checkpoints.keep_latest": 9,
        "evaluation.patience": 2,
    }
    experiment = with_training(experiment, **changes)
    let_losses_be(monkeypatch, [1.0, 2.0, 3.0, 9.0])  # ends at step 3, then tests
    train_and_evaluate(experiment, tmp_path)
    roll_back(tmp_path, 2, 3)
    scored = let_losses_be(monkeypatch, [0.8, 0.5, 0.6, 9.0])
    train_and_evaluate(with_training(experiment, **{"schedule.learning_rate": 0.5}), tmp_path)
    assert [line["step"] for line in lines_of(tmp_path, "valid")] == [1, 2, 3, 2, 3, 4]
    with WorkDirectory(tmp_path).open_checkpoints(best_metric="loss") as checkpoints:
        assert {step: scores["loss"] for step, scores in checkpoints.scores.items()} == {1: 1.0, 2: 0.8, 3: 0.5, 4: 0.6}
        assert checkpoints.best_step == 3
    assert same(scored[-1], scored[1])
    assert same(Translator.from_workdir(tmp_path, step="best").params, scored[1])


@pytest.mark.slow
def test_an_average_of_removed_steps_is_not_used_while_training_continues(experiment, tmp_path, monkeypatch):
    changes = {"steps": 3, "checkpoints.every": 1, "checkpoints.average_last": 2}
    experiment = with_training(experiment, **(AVERAGED | changes))
    train_and_evaluate(experiment, tmp_path)
    roll_back(tmp_path, 2, 3)

    def stop(evaluation, *arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flax_transformer.training.loop._Training._steps", stop)
        with pytest.warns(UserWarning, match="includes checkpoints after step 1, .* it was moved to .*damaged"):
            with pytest.raises(KeyboardInterrupt):
                train_and_evaluate(experiment, tmp_path)
    assert (tmp_path / "damaged" / "averaged-1").is_dir()
    chosen, first = (Translator.from_workdir(tmp_path, step=step).params for step in ("chosen", 1))
    assert same(chosen, first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*includes checkpoints")
        train_and_evaluate(experiment, tmp_path)
    assert not same(Translator.from_workdir(tmp_path, step="chosen").params, first)


@pytest.mark.slow
def test_scores_with_other_settings_are_ignored_and_the_step_is_scored_again(experiment, tmp_path, monkeypatch):
    changes = {
        "steps": 2,
        "evaluation.every": 1,
        "checkpoints.every": 1,
        "checkpoints.keep_latest": 9,
        "evaluation.best_metric": "exact_match",
    }
    experiment = with_training(experiment, **changes)
    let_losses_be(monkeypatch, [1.0, 2.0, 9.0])
    train_and_evaluate(experiment, tmp_path)
    let_losses_be(monkeypatch, [5.0, 6.0, 9.0])
    train_and_evaluate(with_training(experiment, steps=3, **{"evaluation.sentences": 2}), tmp_path)
    assert [line["step"] for line in lines_of(tmp_path, "valid")] == [1, 2, 2, 3]
    let_losses_be(monkeypatch, [9.0])
    train_and_evaluate(
        with_training(experiment, steps=3, **{"evaluation.sentences": 2}), tmp_path
    )  # now they are its own
    assert [line["step"] for line in lines_of(tmp_path, "valid")] == [1, 2, 2, 3]
