import dataclasses
import json

import jax
import numpy as np
import pytest

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.interop.marian import from_marian, to_marian
from flax_transformer.monitoring.report import Report
from flax_transformer.trained_model import TrainedModel, param_shapes
from flax_transformer.training.loop import train_and_evaluate
from tests.training.conftest import STEPS, lines_of, losses_of, with_training, without_held_out


@pytest.fixture(scope="module")
def start(experiment, tmp_path_factory):
    """A converted model of random parameters, in a work directory."""
    path = tmp_path_factory.mktemp("start")
    with open(experiment.data.train.removeprefix("files:").split(",")[0]) as file:
        lines = file.read().splitlines()
    pair = VocabularyPair.train(lines, lines, VocabularyConfig(size=50, byte_fallback=False))
    size = pair.source.size
    config = dataclasses.replace(experiment.model, source_vocab_size=size, target_vocab_size=size, dropout_rate=0.0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype("float32"), param_shapes(config))
    to_marian(TrainedModel(config, params, pair), path / "downloaded")
    from_marian(path / "downloaded", path / "work")
    return path / "work"


@pytest.fixture(scope="module")
def finetuning(experiment, start):
    """The experiment that starts from it; its dropout is its own."""
    model = dataclasses.replace(TrainedModel.load(start).config, dropout_rate=0.2)
    experiment = dataclasses.replace(without_held_out(experiment), model=model)
    return with_training(
        experiment,
        start_from=str(start),
        **{"schedule.name": "constant", "schedule.learning_rate": 1e-2, "schedule.warmup_steps": 1},
    )


def params_of(path):
    return TrainedModel.load(path, step="latest").params


@pytest.mark.parametrize(
    "parallelism", ["jit", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("pmap", "fsdp"))]
)
def test_finetuning_starts_with_the_model_and_its_vocabulary(finetuning, start, tmp_path, parallelism):
    still = with_training(
        finetuning,
        **{"schedule.learning_rate": 0.0},
        steps=1,
        **{"parallelism.layout": parallelism, "optimizer.ema_decay": 0.9},
    )
    train_and_evaluate(still, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), TrainedModel.load(start).params)
    found = TrainedModel.load(tmp_path).vocabularies
    assert isinstance(found.source, MarianVocabulary)
    assert found.fingerprint() == TrainedModel.load(start).vocabularies.fingerprint()


@pytest.mark.slow
def test_the_loss_of_finetuning_falls_and_the_model_can_be_exported(finetuning, start, tmp_path):
    train_and_evaluate(finetuning, tmp_path / "run")
    losses = [loss for _, loss in losses_of(tmp_path / "run")]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    model = TrainedModel.load(tmp_path / "run")
    to_marian(model, tmp_path / "again")
    again = from_marian(tmp_path / "again", tmp_path / "work")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["dropout"] == 0.2


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_stopped_finetuning_continues_without_the_initial_model(finetuning, start, tmp_path, monkeypatch):
    train_and_evaluate(finetuning, tmp_path / "whole")
    done = iter(range(7))

    def step_done(report):
        if next(done, None) is None:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Report, "step_done", step_done)
        train_and_evaluate(finetuning, tmp_path / "parts")
    moved = start.with_name("moved")
    start.rename(moved)
    try:
        train_and_evaluate(finetuning, tmp_path / "parts")
    finally:
        moved.rename(start)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "whole"), params_of(tmp_path / "parts"))
    assert [line["step"] for line in lines_of(tmp_path / "parts", "start")] == [0, 5]


@pytest.mark.parametrize(
    ("freeze", "others"),
    [
        ("embeddings", {"parallelism.layout": "pmap", "optimizer.ema_decay": 0.9}),
        pytest.param("encoder", {"parallelism.layout": "fsdp"}, marks=pytest.mark.slow),
        pytest.param("embeddings,encoder", {"optimizer.clip_norm": 1.0}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_frozen_parameters_stay_and_all_others_change(finetuning, start, tmp_path, freeze, others):
    """Also where the training is begun and goes on."""
    frozen = with_training(finetuning, freeze=freeze, **{"optimizer.weight_decay": 0.1}, **others)
    for steps in (2, 4):
        train_and_evaluate(with_training(frozen, steps=steps), tmp_path)
    before, after = TrainedModel.load(start).params, params_of(tmp_path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        name = path[0].key
        stays = ("encoder" in freeze and name == "encoder") or ("embeddings" in freeze and name == "shared_embedding")
        old = before
        for part in path:
            old = old[part.key]
        # The gradient of a key's bias is zero except for rounding, so it may or may not change where it is free.
        if stays or [part.key for part in path[-2:]] != ["key", "bias"]:
            assert np.array_equal(leaf, old) == stays, jax.tree_util.keystr(path)


def test_another_initial_model_in_the_same_folder_is_an_error(finetuning, tmp_path):
    train_and_evaluate(with_training(finetuning, steps=1), tmp_path)
    with pytest.raises(ValueError, match="was begun with training.start_from = .*: set it back"):
        train_and_evaluate(with_training(finetuning, start_from=""), tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"d_ff": 24}, "model.d_ff is 24, in training.start_from = .* it is 12"),
        ({"norm": "pre"}, "model.norm is 'pre'"),
    ],
)
def test_a_config_that_differs_from_the_initial_model_is_an_error(finetuning, tmp_path, change, match):
    other = dataclasses.replace(finetuning, model=dataclasses.replace(finetuning.model, **change))
    with pytest.raises(ValueError, match=match):
        train_and_evaluate(other, tmp_path / "run")
    # After the correction the same command works.
    train_and_evaluate(with_training(finetuning, steps=1), tmp_path / "run")


def test_a_model_without_a_training_says_how_to_start_from_it(finetuning, start):
    before = sorted(path.name for path in start.iterdir())
    with pytest.raises(ValueError, match="holds a model and no training: .*--config=finetune:"):
        train_and_evaluate(with_training(finetuning, start_from=""), start)
    assert before == sorted(path.name for path in start.iterdir() if path.name != "training.lock")
