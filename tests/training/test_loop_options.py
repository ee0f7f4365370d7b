import dataclasses
import signal

import jax
import numpy as np
import pytest

import flax_transformer.training.loop as loop
import flax_transformer.training.step as step_module
from flax_transformer.decoding.translator import Translator
from flax_transformer.monitoring.report import Report
from flax_transformer.processes.interruption import Interrupted
from flax_transformer.training.evaluation import Evaluation, Scores
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.training.parallel import ParallelStep
from flax_transformer.training.step_statistics import STEPS_IN_FLIGHT
from flax_transformer.workdir import WorkDirectory
from tests.training.conftest import EVERY, STEPS, lines_of, losses_of, with_training, without_held_out


def let_losses_be(monkeypatch, values):
    """Makes the validations return these losses in order; returns the list of the parameters that were evaluated."""
    scored, left = [], list(values)

    def score(evaluation, params, **options):
        scored.append(jax.device_get(params))
        loss = left.pop(0)
        scores = Scores(loss=loss, bleu=-loss, chrf=-loss, exact_match=0.0, sentences=4, signature="")
        return scores, [""] * len(evaluation.source)

    monkeypatch.setattr(Evaluation, "score", score)
    return scored


def same(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def train_with_a_break(experiment, path, monkeypatch, *, after):
    """Trains to the end, with a SIGTERM after so many steps, between two checkpoints."""
    done = iter(range(after - 1))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(
            Report, "step_done", lambda report: next(done, None) is None and signal.raise_signal(signal.SIGTERM)
        )
        train_and_evaluate(experiment, path)
    train_and_evaluate(experiment, path)


def params_of(path, step):
    return Translator.from_workdir(path, step=step).params


class Died(Exception):
    pass


@pytest.mark.slow
def test_a_training_that_dies_during_an_evaluation_has_its_checkpoint_and_evaluates_first_when_continued(
    experiment, tmp_path, monkeypatch
):
    experiment = with_training(experiment, **{"evaluation.every": 4, "checkpoints.every": 100})
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    scores = train_and_evaluate(experiment, unbroken)

    def die(evaluation, params, **options):
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Evaluation, "score", die)
        train_and_evaluate(experiment, broken)
    with WorkDirectory(broken).open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == 4 and checkpoints.scores == {}
    assert train_and_evaluate(experiment, broken) == scores
    assert (broken / "scores.json").read_text() == (unbroken / "scores.json").read_text()
    assert [line["step"] for line in lines_of(broken, "valid")] == [4, 8, 12]


@pytest.mark.slow
def test_a_signal_during_an_evaluation_stops_it_after_the_current_batch(experiment, tmp_path, monkeypatch):
    experiment = with_training(experiment, **{"evaluation.every": 4})
    batches = []
    whole = Evaluation.score

    def score(evaluation, params, *, after_each):
        def told_in_the_second():
            batches.append("done")
            if len(batches) == 2:
                signal.raise_signal(signal.SIGTERM)
            after_each()

        return whole(evaluation, params, after_each=told_in_the_second)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM: .* step 4;") as ended:
        patch.setattr(Evaluation, "score", score)
        train_and_evaluate(experiment, tmp_path)
    assert len(batches) == 2 and ended.value.exit_status == 143
    with WorkDirectory(tmp_path).open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == 4 and checkpoints.scores == {}
    train_and_evaluate(experiment, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path, "valid")] == [4, 8, 12]


@pytest.mark.parametrize(
    ("losses", "ended_at"),
    [
        ([5.0, 4.0, 4.0, 4.5, 3.0], 4),  # equal is not better
        pytest.param([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], 6, marks=pytest.mark.slow),
        pytest.param([3.0, 5.0, 4.0, 1.0, 1.0, 1.0], 3, marks=pytest.mark.slow),
    ],
)
def test_patience_ends_a_training_whose_metric_does_not_improve(losses, ended_at, experiment, tmp_path, monkeypatch):
    experiment = with_training(experiment, steps=6, **{"evaluation.every": 1, "evaluation.patience": 2})
    scored = let_losses_be(monkeypatch, [*losses, *[9.0] * 3])
    train_and_evaluate(experiment, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path, "valid")] == list(range(1, ended_at + 1))
    with WorkDirectory(tmp_path).open_checkpoints(best_metric="loss") as checkpoints:
        assert checkpoints.latest_step == ended_at
        best = checkpoints.best_step
    # The test corpus came last, with the best checkpoint.
    assert same(scored[-1], scored[best - 1]) and len(scored) == ended_at + 1
    # The same command does not train any further.
    train_and_evaluate(experiment, tmp_path)
    assert len(scored) == ended_at + 2 and losses_of(tmp_path)[-1][0] == ended_at


@pytest.mark.slow
def test_evaluations_and_translations_use_the_moving_average_if_configured(experiment, tmp_path, monkeypatch):
    experiment = with_training(experiment, **{"evaluation.every": 6, "optimizer.ema_decay": 0.9}, weights="ema")
    scored = let_losses_be(monkeypatch, [2.0, 1.0, 7.0])
    train_and_evaluate(experiment, tmp_path)
    middle, last, tested = scored
    assert same(tested, last) and not same(middle, last)
    for step in ("chosen", "best", "latest", STEPS):
        assert same(params_of(tmp_path, step), last), step
    config = WorkDirectory(tmp_path).read_config()
    config["training"]["weights"] = "trained"
    WorkDirectory(tmp_path).write_config(config)
    trained = params_of(tmp_path, "chosen")
    assert not same(trained, last)


@pytest.mark.slow
def test_a_stopped_training_continues_to_the_same_moving_average(experiment, tmp_path, monkeypatch):
    experiment = with_training(without_held_out(experiment), **{"optimizer.ema_decay": 0.9}, weights="ema")
    train_and_evaluate(experiment, tmp_path / "unbroken")
    train_with_a_break(experiment, tmp_path / "broken", monkeypatch, after=8)
    assert same(params_of(tmp_path / "broken", "latest"), params_of(tmp_path / "unbroken", "latest"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["last", "best"])
def test_a_training_ends_by_averaging_checkpoints_and_testing_the_average(kind, experiment, tmp_path, monkeypatch):
    changes = {
        "evaluation.every": 3,
        "checkpoints.every": 3,
        "checkpoints.keep_latest": 2,
        "checkpoints.keep_best": 2,
        "weights": "averaged",
    }
    experiment = with_training(experiment, **changes, **{f"average_{kind}": 2})
    scored = let_losses_be(monkeypatch, [1.0, 2.0, 3.0, 4.0, 7.0])
    train_and_evaluate(experiment, tmp_path)
    *validated, tested = scored
    first, second = {"last": validated[2:], "best": validated[:2]}[kind]
    mean = jax.tree.map(lambda one, other: (one + other) / 2, first, second)
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6), tested, mean)
    assert same(params_of(tmp_path, "chosen"), tested)
    assert same(params_of(tmp_path, "averaged"), tested)
    assert not same(params_of(tmp_path, "best"), tested)


def explode_from(monkeypatch, first, last):
    """Makes the gradient of some steps infinite, depending on the batch: on its first segment's number."""
    step = step_module.train_step

    def train_step(state, batch, **options):
        bad = (state.step + 1 >= first) & (state.step + 1 <= last)
        broken = jax.tree.map(lambda leaf: jax.numpy.where(bad, jax.numpy.inf, leaf), state.params)
        after, metrics = step(state.replace(params=broken), batch, **options)
        kept = jax.tree.map(lambda old, new: jax.numpy.where(bad, old, new), state.params, after.params)
        return after.replace(params=kept), metrics

    monkeypatch.setattr(step_module, "train_step", train_step)
    # Not the function that is kept for this experiment.
    monkeypatch.setattr(loop, "make_train_step", step_module.make_train_step.__wrapped__)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_counted_and_reported(experiment, tmp_path, monkeypatch):
    experiment = with_training(without_held_out(experiment), max_skipped=4, log_every=2)
    explode_from(monkeypatch, 5, 7)
    train_and_evaluate(experiment, tmp_path)
    lines = lines_of(tmp_path, "train")
    assert [(line["step"], line["skipped"]) for line in lines] == [(2, 0), (4, 0), (6, 2), (8, 3), (10, 3), (12, 3)]
    # A window without a single update has no mean; the others are means of what was made.
    assert [line["step"] for line in lines if line["loss"] is None] == [6]
    # The schedule does not advance while the parameters stay the same.
    n = 12 - 3
    assert lines[-1]["learning_rate"] == pytest.approx(8**-0.5 * n**-0.5, rel=1e-6)


@pytest.mark.slow
def test_too_many_updates_in_a_row_that_are_not_finite_end_the_training(experiment, tmp_path, monkeypatch):
    experiment = with_training(without_held_out(experiment), max_skipped=3)
    with monkeypatch.context() as patch:
        explode_from(patch, 7, STEPS)
        with pytest.raises(ValueError, match="3 updates in a row were left out .* the last at step 9 ") as error:
            train_and_evaluate(experiment, tmp_path)
        message = str(error.value)
        assert "\n" not in message and "lower training.schedule.learning_rate" in message
        for module in ("encoder/layers_0", "decoder/layers_0", "shared_embedding/embedding"):
            assert any(f"{module} {norm}" in message for norm in ("nan", "inf")), message
    with WorkDirectory(tmp_path).open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == EVERY
    # The sentences of the step that is named.
    text = loop.load_texts(experiment)["train"]
    pairs = [line.split("\t") for line in (tmp_path / "not_finite_9.tsv").read_text().splitlines()]
    assert pairs and all(
        (source, target) == (text.source[int(number) - 1], text.target[int(number) - 1])
        for number, source, target in pairs
    )
    # When the cause is removed, training continues from the last checkpoint.
    train_and_evaluate(experiment, tmp_path)
    assert losses_of(tmp_path)[-1][0] == STEPS


def test_the_reported_sentences_are_those_of_the_batch(experiment, tmp_path, monkeypatch):
    """The step's batch, spelled by the vocabulary, holds exactly the sentences of the file."""
    experiment = with_training(without_held_out(experiment), max_skipped=1)
    explode_from(monkeypatch, 6, 6)
    with pytest.raises(ValueError, match="at step 6 "):
        train_and_evaluate(experiment, tmp_path)
    workdir = WorkDirectory(tmp_path)
    named = sorted(line.split("\t")[1] for line in (tmp_path / "not_finite_6.tsv").read_text().splitlines())
    text, vocabularies = loop.load_texts(experiment)["train"], workdir.read_vocabularies()
    packed = loop.prepare(
        experiment, {"train": text}, workdir, loop.Parallelism("jit"), accept_changed_corpus=False
    ).train
    batch = packed.batch(5)
    spelled = [
        vocabularies.source.decode([row[segments == number]])[0]
        for row, segments in zip(batch.source.ids, batch.source.segments, strict=True)
        for number in range(1, segments.max() + 1)
    ]
    assert sorted(spelled) == named


@pytest.mark.slow
def test_micro_batches_give_the_losses_of_the_whole_batch(experiment, tmp_path, capsys):
    experiment = without_held_out(experiment)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dropout_rate=0.0))
    train_and_evaluate(experiment, tmp_path / "whole")
    train_and_evaluate(with_training(experiment, **{"parallelism.rows_per_device": 1}), tmp_path / "parts")
    assert "4 micro-batches a device" in capsys.readouterr().out
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert [step for step, _ in whole] == [step for step, _ in parts] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in whole], [loss for _, loss in parts], rtol=1e-4)


@pytest.mark.slow
def test_a_stopped_training_in_half_precision_continues_to_the_same_bits(experiment, tmp_path, monkeypatch):
    experiment = without_held_out(experiment)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dtype="float16"))
    train_and_evaluate(experiment, tmp_path / "unbroken")
    train_with_a_break(experiment, tmp_path / "broken", monkeypatch, after=7)
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "unbroken")
    assert same(params_of(tmp_path / "broken", "latest"), params_of(tmp_path / "unbroken", "latest"))


@pytest.mark.slow
def test_the_time_for_which_a_save_blocks_training_is_recorded(experiment, tmp_path):
    train_and_evaluate(without_held_out(experiment), tmp_path)
    lines = lines_of(tmp_path, "checkpoint")
    assert [line["step"] for line in lines] == [EVERY, 2 * EVERY, STEPS]
    assert all(0 < line["blocked_seconds"] < 10 for line in lines)


@pytest.mark.slow
def test_the_time_to_the_first_step_is_reported(experiment, tmp_path, capsys):
    experiment = without_held_out(experiment)
    train_and_evaluate(with_training(experiment, steps=EVERY), tmp_path)
    assert "step 1 was done " in capsys.readouterr().out
    train_and_evaluate(experiment, tmp_path)
    assert f"step {EVERY + 1} was done " in capsys.readouterr().out


@pytest.mark.slow
def test_the_host_runs_ahead_of_devices_by_a_limited_number_of_steps(experiment, tmp_path, monkeypatch):
    under_way, most = [], []
    make, check = ParallelStep.__call__, loop._Training._check_finite

    def counted(step, state, batch):
        under_way.append(len(most) + 1)
        most.append(len(under_way))
        return make(step, state, batch)

    def fetched(training, step, metrics):
        under_way.remove(step)
        check(training, step, metrics)

    monkeypatch.setattr(ParallelStep, "__call__", counted)
    monkeypatch.setattr(loop._Training, "_check_finite", fetched)
    train_and_evaluate(with_training(without_held_out(experiment), **{"checkpoints.every": STEPS}), tmp_path)
    assert most == [1, *[STEPS_IN_FLIGHT] * (STEPS - 1)]
