import concurrent.futures
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import EvaluationConfig, Experiment, ScheduleConfig, TrainingConfig, VocabularyConfig
from flax_transformer.training.parallel import Parallelism
from flax_transformer.workdir import WorkDirectory

EXPERIMENT = Experiment(
    model=TransformerConfig.tiny(norm="pre"),
    training=TrainingConfig(steps=7, schedule=ScheduleConfig(learning_rate=1e-3)),
)


@pytest.fixture
def workdir(tmp_path):
    return WorkDirectory(tmp_path / "runs" / "first")  # made when something is written, and not before


def test_a_config_can_be_read_back(workdir):
    assert not workdir.exists
    workdir.write_config(EXPERIMENT.to_mapping())
    assert workdir.exists
    assert Experiment.from_mapping(workdir.read_config()) == EXPERIMENT
    assert workdir.read_model_config() == EXPERIMENT.model


def test_a_folder_without_a_config_is_an_error_with_a_remedy(workdir):
    with pytest.raises(
        ValueError, match=r"runs/first is not a work directory, config.json is missing: give .*--workdir"
    ):
        workdir.read_config()
    assert not workdir.path.parent.exists()


def test_metrics_are_read_back_in_order(workdir):
    assert workdir.read_metrics() == []
    workdir.write_config({})
    lines = [{"kind": "train", "step": 1, "loss": 2.5}, {"kind": "test", "signature": "ಕನ್ನಡ"}]
    for line in lines:
        workdir.append_metrics(line)
    assert workdir.read_metrics() == lines


@pytest.mark.parametrize("joint", [True, False])
def test_vocabularies_can_be_read_back(joint, workdir):
    source, target = ["one two three", "four five"], ["uno due tre", "quattro cinque"]
    vocabularies = VocabularyPair.train(
        source, target, VocabularyConfig(size=24, byte_fallback=False, joint=joint, model_type="char")
    )
    assert not workdir.has_vocabularies()
    workdir.write_vocabularies(vocabularies)
    assert workdir.has_vocabularies()
    assert workdir.read_vocabularies().fingerprint() == vocabularies.fingerprint()
    assert workdir.read_vocabularies().joint == joint


def params_of(seed):
    rng = np.random.default_rng(seed)
    return {"encoder": {"kernel": jnp.float32(rng.normal(size=(3, 5))), "bias": jnp.float32(rng.normal(size=5))}}


def trees_of(seed):
    return {"params": params_of(seed), "ema": params_of(seed + 100), "training": {"step": jnp.int32(seed)}}


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    leaves = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    return all(one.dtype == other.dtype and jnp.array_equal(one, other) for one, other in leaves)


def write(workdir, metrics, **options):
    """Writes one checkpoint for each step of `metrics`, its parameters made from the step."""
    with workdir.open_checkpoints(**options) as checkpoints:
        for step, values in metrics.items():
            checkpoints.save(step, trees_of(step), {"seconds": step / 2})
            if values is not None:
                checkpoints.record_scores(step, values)


def steps_of(workdir):
    return {int(path.name) for path in (workdir.path / "checkpoints").iterdir() if path.name.isdigit()}


def test_a_work_directory_may_be_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with WorkDirectory("runs/first").open_checkpoints() as checkpoints:
        checkpoints.save(1, {"params": params_of(1), "training": params_of(2)}, {"seconds": 0.0})
    with WorkDirectory(tmp_path / "runs/first").open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.latest_step == 1
    assert str(WorkDirectory("gs://bucket/runs").path) == "gs://bucket/runs"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"model": {', "Expecting property name"),
        (b"\xff", "can't decode"),
        (b'{"model": 3}', "it has no sections"),
        (b'{"data": {}}', 'no section "model"'),
        (b'{"model": {"d_model": "wide"}}', "not supported|TransformerConfig"),
    ],
)
def test_a_damaged_config_is_an_error_of_one_line_with_a_remedy(content, reason, workdir):
    workdir.write_config({})
    (workdir.path / "config.json").write_bytes(content)
    message = rf"^.*config\.json is damaged \(.*({reason}).*\): put back the file that training wrote there$"
    with pytest.raises(ValueError, match=message) as caught:
        workdir.read_model_config()
    assert "\n" not in str(caught.value)


def test_parameters_can_be_restored_by_name_or_number(workdir):
    write(workdir, {1: {"loss": 2.0}, 2: {"loss": 1.0}, 3: {"loss": 3.0}})
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        shapes = jax.eval_shape(lambda: params_of(0))
        for step, number in {"best": 2, "latest": 3, 1: 1, 3: 3}.items():
            restored = checkpoints.restore_params(step, shapes)
            assert same(restored, params_of(number))
            assert all(leaf.devices() == {jax.local_devices()[0]} for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("step", [4, "newest"])
def test_a_missing_checkpoint_is_an_error_that_lists_the_existing_ones(step, workdir):
    write(workdir, {1: None, 2: None})
    message = rf"checkpoints holds no checkpoint {step!r}: choose best, latest, averaged or one of \[1, 2\]"
    with workdir.open_checkpoints() as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore_params(step, params_of(0))


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_without_checkpoints_is_an_error_with_a_remedy(read_only, workdir):
    workdir.write_config({})
    with (
        pytest.raises(ValueError, match="holds no checkpoint: train until one is written, or give another --workdir"),
        workdir.open_checkpoints(read_only=read_only) as checkpoints,
    ):
        checkpoints.restore_params("best", params_of(0))


def test_reading_removes_nothing(workdir):
    write(workdir, {1: None, 2: None})
    unfinished = workdir.path / "checkpoints" / "3.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.latest_step == 2
    assert unfinished.exists() and steps_of(workdir) == {1, 2}


def is_mean_of(steps, params):
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *map(params_of, steps))
    return jax.tree.all(jax.tree.map(lambda one, other: np.allclose(one, other, rtol=0, atol=1e-6), mean, params))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda params: jax.tree.map(lambda leaf: leaf[:2], params), "encoder/(kernel|bias)"),
        (lambda params: jax.tree.map(lambda leaf: leaf.T, params), "encoder/kernel"),  # as many numbers as before
        (lambda params: {"encoder": {"kernel": params["encoder"]["kernel"]}}, "encoder/bias"),
        (lambda params: {**params, "decoder": params["encoder"]}, "decoder/(kernel|bias)"),
    ],
)
def test_parameters_of_another_model_are_an_error_that_names_the_first_difference(change, name, workdir):
    workdir.write_config({})
    write(workdir, {1: None})
    workdir.average_checkpoints(last=1)
    for step in (1, "latest", "averaged"):
        message = rf"1 does not fit config\.json: {name} has the shape .* by the config: put back the config\.json"
        with pytest.raises(ValueError, match=message) as caught:
            workdir.restore_params(step, change(params_of(0)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["params", "params/_METADATA"])
def test_an_incomplete_checkpoint_is_an_error_with_a_remedy(missing, workdir):
    workdir.write_config({})
    write(workdir, {1: None})
    part = workdir.path / "checkpoints" / "1" / missing
    part.rmtree() if part.is_dir() else part.unlink()
    with pytest.raises(ValueError, match="checkpoints/1 is not complete: copy the folder again, or choose another"):
        workdir.restore_params("latest", params_of(0))


SCORES = {1: {"loss": 4.0}, 2: {"loss": 1.0}, 3: None, 4: {"loss": 2.0}, 5: {"loss": 3.0}}


@pytest.mark.parametrize(
    ("choice", "steps"),
    [({"last": 1}, [5]), ({"last": 5}, [5, 4, 3, 2, 1]), ({"best": 1}, [2]), ({"best": 3}, [2, 4, 5])],
)
def test_the_average_is_the_mean_of_the_parameters_chosen(choice, steps, workdir):
    workdir.write_config({"training": {"evaluation": {"best_metric": "loss"}}})
    write(workdir, SCORES)
    assert workdir.average_checkpoints(**choice) == steps
    average = workdir.restore_params("averaged", params_of(0))
    assert is_mean_of(steps, average)
    for leaf in jax.tree.leaves(average):
        assert leaf.dtype == jnp.float32 and leaf.devices() == {jax.local_devices()[0]}
    assert steps_of(workdir) == set(SCORES)
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.latest_step == 5


@pytest.mark.parametrize(("metric", "steps"), [("bleu", [3, 2]), ("chrf", [1, 3]), ("loss", [1, 2])])
def test_the_best_checkpoints_are_the_best_by_the_metric_of_training(metric, steps, workdir):
    experiment = dataclasses.replace(
        EXPERIMENT, training=TrainingConfig(evaluation=EvaluationConfig(best_metric=metric))
    )
    workdir.write_config(experiment.to_mapping())
    rows = [(1.0, 9.0, 1.0), (2.0, 7.0, 2.0), (3.0, 8.0, 3.0)]
    metrics = {step: dict(zip(("bleu", "chrf", "loss"), row, strict=True)) for step, row in enumerate(rows, 1)}
    write(workdir, metrics, best_metric=metric)
    assert workdir.average_checkpoints(best=2) == steps
    best = workdir.restore_params("best", params_of(0))
    assert same(best, params_of(steps[0]))


def test_a_new_average_replaces_the_old_one_and_records_its_steps(workdir):
    workdir.write_config({})
    write(workdir, {1: None, 2: None, 3: None})
    for last in (1, 2, 2, 1):
        steps = workdir.average_checkpoints(last=last)
        (folder,) = (workdir.path / "averaged").iterdir()
        assert json.loads((folder / "notes" / "metadata").read_text()) == {"steps": steps}
        assert is_mean_of(steps, workdir.restore_params("averaged", params_of(0)))


def test_a_new_average_replaces_the_old_one_without_a_gap(workdir):
    workdir.write_config({})
    write(workdir, {1: None, 2: None})
    workdir.average_checkpoints(last=1)
    with concurrent.futures.ThreadPoolExecutor() as executor:
        averaging = executor.submit(workdir.average_checkpoints, last=2)
        looks = 0
        while not averaging.done():
            assert any(path.name.isdigit() for path in (workdir.path / "averaged").iterdir())
            looks += 1
    assert averaging.result() == [2, 1] and looks > 10


@pytest.mark.parametrize(
    ("weights", "before", "after"),
    [
        ({}, params_of(2), None),  # a converted model has no such section
        ({"weights": "trained"}, params_of(2), None),
        ({"weights": "ema", "optimizer": {"ema_decay": 0.9}}, params_of(102), None),
        ({"weights": "averaged", "checkpoints": {"average_last": 2}}, params_of(2), "averaged"),
    ],
)
def test_the_chosen_weights_are_those_that_the_config_names(weights, before, after, workdir):
    workdir.write_config({"training": weights} if weights else {})
    write(workdir, {1: {"loss": 4.0}, 2: {"loss": 1.0}, 3: {"loss": 2.0}})
    assert same(workdir.restore_params("chosen", params_of(0)), before)
    assert same(workdir.restore_params("best", params_of(0)), before)
    assert same(workdir.restore_params(3, params_of(0)), params_of(103 if "optimizer" in weights else 3))
    workdir.average_checkpoints(last=2)
    chosen = workdir.restore_params("chosen", params_of(0))
    assert is_mean_of([2, 3], chosen) if after == "averaged" else same(chosen, before)


def test_checkpoints_of_eight_devices_can_be_averaged_on_one(workdir):
    workdir.write_config({})
    eight = Parallelism("pmap")
    with workdir.open_checkpoints() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, eight.place(trees_of(step)), {})
    assert workdir.average_checkpoints(last=2) == [2, 1]
    assert is_mean_of([1, 2], workdir.restore_params("averaged", params_of(0)))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"last": 5},
            r"checkpoints holds 3 checkpoints \[1, 2, 3\], not 5: ask for fewer, or .*training.checkpoints.keep_latest",
        ),
        (
            {"best": 3},
            r"checkpoints holds 2 scored checkpoints \[1, 3\], not 3: ask for fewer, or .*training.*keep_best",
        ),
        ({"last": 0}, "0 of the newest checkpoints: ask for at least 1"),
        ({"best": -1}, "-1 of the best checkpoints: ask for at least 1"),
        ({}, "last is None and best is None: give one of them"),
        ({"last": 2, "best": 2}, "last is 2 and best is 2: give one of them"),
    ],
)
def test_an_average_that_cannot_be_made_is_an_error_with_a_remedy(choice, message, workdir):
    workdir.write_config({})
    write(workdir, {1: {"loss": 1.0}, 2: None, 3: {"loss": 2.0}})
    with pytest.raises(ValueError, match=message):
        workdir.average_checkpoints(**choice)
    assert not (workdir.path / "averaged").exists()


def test_an_average_is_set_aside_under_a_free_name(workdir):
    for taken in (2, 3):
        (workdir.path / "damaged" / f"averaged-{taken}").mkdir(parents=True)
    for _ in range(2):
        (workdir.path / "averaged").mkdir()
        with pytest.warns(UserWarning, match="it was moved to"):
            workdir.set_average_aside(1)
    assert {path.name for path in (workdir.path / "damaged").iterdir()} == {f"averaged-{n}" for n in range(1, 5)}


def test_a_missing_average_is_an_error_that_names_the_command(workdir):
    workdir.write_config({})
    write(workdir, {1: None})
    with pytest.raises(
        ValueError, match=r"first holds no average: write one, e.g. with `flax-transformer average --last=5 --workdir=/"
    ):
        workdir.restore_params("averaged", params_of(0))
    assert not (workdir.path / "averaged").exists()
    (workdir.path / "checkpoints" / "1").rmtree()
    with pytest.raises(ValueError, match="holds no checkpoint: train until one is written, or give another --workdir"):
        workdir.average_checkpoints(last=1)
