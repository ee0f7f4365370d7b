import dataclasses
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_transformer.experiment import Experiment
from flax_transformer.monitoring.report import Report
from flax_transformer.processes.interruption import Interrupted
from flax_transformer.training.evaluation import Evaluation, Scores
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.workdir import WorkDirectory
from tests.training.conftest import EVERY, STEPS, lines_of, losses_of, with_training, without_held_out

STOPPED_AT = 10


def same_checkpoint(first, second, step):
    """Whether two work directories hold the same bits of parameters and of the rest."""
    trees = []
    for item in ("params", "training"):
        for path in (first, second):
            with ocp.CheckpointManager(path / "checkpoints") as manager:
                args = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
                trees.append(jax.tree.leaves(manager.restore(step, args=args)[item]))
    return all(
        jax.numpy.array_equal(*leaves)
        for one, other in (trees[:2], trees[2:])
        for leaves in zip(one, other, strict=True)
    )


class Stopped(Exception):
    pass


def stop_after(monkeypatch, steps):
    """Lets the training fail after so many steps, between two checkpoints."""
    done = iter(range(steps - 1))

    def step_done(report):
        if next(done, None) is None:
            raise Stopped

    monkeypatch.setattr(Report, "step_done", step_done)


@pytest.fixture(scope="module", params=["pmap", pytest.param("jit", marks=pytest.mark.slow)])
def whole(request, experiment, tmp_path_factory):
    """A training that ran in one piece: its experiment, its folder, and what it returned."""
    path = tmp_path_factory.mktemp(request.param)
    experiment = with_training(experiment, **{"parallelism.layout": request.param})
    return experiment, path, train_and_evaluate(experiment, path)


def test_a_stopped_training_continues_to_the_same_bits(whole, tmp_path, monkeypatch):
    experiment, unbroken, scores = whole
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, STOPPED_AT)
        train_and_evaluate(experiment, tmp_path)
    before = losses_of(tmp_path)
    again = train_and_evaluate(experiment, tmp_path)
    after = losses_of(tmp_path)[len(before) :]
    expected = losses_of(unbroken)
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert before == expected[: len(before)] and EVERY < len(before) < STEPS
    assert after == expected[EVERY:]
    assert same_checkpoint(tmp_path, unbroken, STEPS)
    assert again == scores


@pytest.mark.slow
def test_a_recurrent_decoder_learns_and_continues_to_the_same_bits(experiment, tmp_path, monkeypatch):
    experiment = without_held_out(experiment).changed({"model.decoder_autoregression": "ssru"})
    changes = {"parallelism.layout": "data=2,fsdp=4", "schedule.name": "constant", "schedule.learning_rate": 1e-2}
    experiment = with_training(experiment, **changes)
    train_and_evaluate(experiment, tmp_path / "unbroken")
    losses = [loss for _, loss in losses_of(tmp_path / "unbroken")]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, STOPPED_AT)
        train_and_evaluate(experiment, tmp_path / "broken")
    train_and_evaluate(experiment, tmp_path / "broken")
    assert [line["step"] for line in lines_of(tmp_path / "broken", "start")] == [0, EVERY]
    assert same_checkpoint(tmp_path / "broken", tmp_path / "unbroken", STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_training_after_a_checkpoint_of_the_current_step(whole, tmp_path, monkeypatch, number):
    experiment, unbroken, scores = whole
    in_hand, handlers = 7, [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    done = iter(range(in_hand - 1))
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=f"{number.name}: .* step {in_hand};") as ended,
    ):
        patch.setattr(Report, "step_done", lambda report: next(done, None) is None and signal.raise_signal(number))
        train_and_evaluate(experiment, tmp_path)
    assert (ended.value.step, ended.value.exit_status) == (in_hand, 128 + number)
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    assert losses_of(tmp_path) == losses_of(unbroken)[:in_hand]
    assert train_and_evaluate(experiment, tmp_path) == scores
    assert losses_of(tmp_path) == losses_of(unbroken)
    assert same_checkpoint(tmp_path, unbroken, STEPS)


def test_lines_of_metrics_have_the_mean_loss_the_rate_and_the_speed(whole):
    experiment, path, _ = whole
    for line in lines_of(path, "train"):
        n, warmup = line["step"], experiment.training.schedule.warmup_steps
        assert line["learning_rate"] == pytest.approx(8**-0.5 * min(n**-0.5, n * warmup**-1.5), rel=1e-6)
        assert line["loss"] >= 0 and line["cross_entropy"] >= 0 and 0 <= line["accuracy"] <= 1
        assert line["gradient_norm"] > 0
        # The first was compiled in its time.
        assert "tokens_per_second" not in line if n == 1 else line["tokens_per_second"] > 0


def test_a_finished_training_does_not_train_and_prints_its_scores_again(whole):
    experiment, path, scores = whole
    train, test = lines_of(path, "train"), lines_of(path, "test")
    assert train_and_evaluate(experiment, path) == scores
    assert lines_of(path, "train") == train
    assert lines_of(path, "test") == test + test[-1:]
    assert test[-1] == {"kind": "test", "step": STEPS} | dataclasses.asdict(scores)


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """A finished training that other tests continue, without held-out corpora."""
    experiment = without_held_out(experiment)
    path = tmp_path_factory.mktemp("finished")
    assert train_and_evaluate(experiment, path) is None
    return experiment, path


def test_with_more_steps_training_continues_from_the_last(finished, capsys):
    experiment, path = finished
    before = losses_of(path)
    train_and_evaluate(with_training(experiment, steps=STEPS + 3, **{"schedule.learning_rate": 0.5}), path)
    assert [step for step, _ in losses_of(path)[len(before) :]] == [STEPS + 1, STEPS + 2, STEPS + 3]
    assert f"jit on 1 cpu device, steps {STEPS} to {STEPS + 3}" in capsys.readouterr().out
    assert WorkDirectory(path).read_config()["training"]["steps"] == STEPS + 3


def test_fewer_steps_than_were_made_train_nothing(finished):
    experiment, path = finished
    before = losses_of(path)
    train_and_evaluate(with_training(experiment, steps=3), path)
    assert losses_of(path) == before


def test_the_best_checkpoint_is_tested(experiment, tmp_path, monkeypatch):
    scored = []
    losses = [3.0, 1.0, 2.0]  # of the validations at steps 4, 8 and 12; the test is after them

    def score(evaluation, params, **options):
        scored.append(jax.device_get(params))
        loss = losses[len(scored) - 1] if len(scored) <= 3 else 7.0
        scores = Scores(loss=loss, bleu=loss, chrf=loss, exact_match=loss, sentences=4, signature="")
        return scores, [""] * len(evaluation.source)

    monkeypatch.setattr(Evaluation, "score", score)
    changes = {"evaluation.every": 4, "checkpoints.every": 100, "checkpoints.keep_latest": 1}
    scores = train_and_evaluate(with_training(experiment, **changes), tmp_path)
    fourth, eighth, twelfth, tested = (jax.tree.leaves(params) for params in scored)
    assert all(map(np.array_equal, tested, eighth))
    assert not any(map(np.array_equal, tested, fourth)) and not any(map(np.array_equal, tested, twelfth))
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path, "valid")] == [(4, 3.0), (8, 1.0), (12, 2.0)]
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path, "test")] == [(8, 7.0)]
    assert scores.loss == 7.0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "8"]


def test_a_missing_training_corpus_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="data.train is empty: name a corpus, e.g. --config.data.train=files:"):
        train_and_evaluate(Experiment(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_after_a_mistake_is_corrected_training_works_in_the_same_folder(experiment, tmp_path):
    experiment = with_training(without_held_out(experiment), steps=1)
    mistake = dataclasses.replace(
        experiment,
        vocabulary=dataclasses.replace(experiment.vocabulary, size=40),
        data=dataclasses.replace(experiment.data, source_slots=1),
    )
    with pytest.raises(ValueError, match="none of 40 sentence pairs fits .*: raise data.source_slots"):
        train_and_evaluate(mistake, tmp_path)
    train_and_evaluate(experiment, tmp_path)
    assert WorkDirectory(tmp_path).read_vocabularies().source.size == 50
