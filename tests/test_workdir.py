"""Takes what a training leaves in a folder and leaves a verdict: it comes back to the bit, and the best is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import Experiment, TrainingConfig, VocabularyConfig
from flax_transformer.training.parallel import Parallelism
from flax_transformer.workdir import WorkDirectory

EXPERIMENT = Experiment(model=TransformerConfig.tiny(norm="pre"), training=TrainingConfig(steps=7, learning_rate=1e-3))


@pytest.fixture
def workdir(tmp_path):
    return WorkDirectory(tmp_path / "runs" / "first")  # made when something is written, and not before


def test_a_config_comes_back(workdir):
    assert not workdir.exists
    workdir.write_config(EXPERIMENT.to_mapping())
    assert workdir.exists
    assert Experiment.from_mapping(workdir.read_config()) == EXPERIMENT
    assert workdir.read_model_config() == EXPERIMENT.model


def test_a_folder_without_a_config_is_an_error_that_names_it_and_the_mend(workdir):
    with pytest.raises(
        ValueError, match=r"runs/first is not a work directory, config.json is missing: give .*--workdir"
    ):
        workdir.read_config()
    assert not workdir.path.parent.exists()


def test_metrics_come_back_in_order(workdir):
    assert workdir.read_metrics() == []
    workdir.write_config({})
    lines = [{"kind": "train", "step": 1, "loss": 2.5}, {"kind": "test", "signature": "ಕನ್ನಡ"}]
    for line in lines:
        workdir.append_metrics(line)
    assert workdir.read_metrics() == lines


@pytest.mark.parametrize("joint", [True, False])
def test_vocabularies_come_back(joint, workdir):
    source, target = ["one two three", "four five"], ["uno due tre", "quattro cinque"]
    vocabularies = VocabularyPair.train(source, target, VocabularyConfig(size=24, joint=joint, model_type="char"))
    assert not workdir.has_vocabularies()
    workdir.write_vocabularies(vocabularies)
    assert workdir.has_vocabularies()
    assert workdir.read_vocabularies().fingerprint() == vocabularies.fingerprint()
    assert workdir.read_vocabularies().joint == joint


def params_of(seed):
    rng = np.random.default_rng(seed)
    return {"encoder": {"kernel": jnp.float32(rng.normal(size=(3, 5))), "bias": jnp.float32(rng.normal(size=5))}}


def rest_of(seed, impl="threefry2x32"):
    """What a checkpoint holds beside the parameters: numbers, an optimizer's state, a typed key."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    _, opt_state = optimizer.update(params_of(seed), optimizer.init(params_of(seed)))
    return {"step": jnp.int32(seed), "opt_state": opt_state, "rng": jax.random.key(seed, impl=impl)}


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    leaves = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    return all(one.dtype == other.dtype and jnp.array_equal(one, other) for one, other in leaves)


def write(workdir, metrics, **options):
    """Writes one checkpoint for each step of `metrics`, its parameters made from the step."""
    with workdir.open_checkpoints(**options) as checkpoints:
        for step, values in metrics.items():
            checkpoints.save(step, params_of(step), rest_of(step), {"seconds": step / 2}, values)


def steps_of(workdir):
    return {int(path.name) for path in (workdir.path / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_newest_checkpoint_comes_back_to_the_bit(impl, workdir):
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        checkpoints.save(3, params_of(3), rest_of(3, impl), {"seconds": 1.5}, None)
        checkpoints.save(5, params_of(5), rest_of(5, impl), {"seconds": 2.5}, None)
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == 5
        params, rest, notes = checkpoints.restore(params_of(0), rest_of(0, impl))
        assert checkpoints.read_notes() == notes == {"seconds": 2.5}
    assert same(params, params_of(5)) and same(rest, rest_of(5, impl))


def test_a_restored_key_gives_the_same_random_numbers(workdir):
    write(workdir, {4: None})
    with workdir.open_checkpoints() as checkpoints:
        _, rest, _ = checkpoints.restore(params_of(0), rest_of(0))
    draws = (jax.random.normal(jax.random.fold_in(tree["rng"], 7), (3,)) for tree in (rest, rest_of(4)))
    assert jnp.array_equal(*draws)


def test_arrays_may_be_overwritten_as_soon_as_save_returns(workdir):
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0, keep_unused=True)
    with workdir.open_checkpoints() as checkpoints:
        params = params_of(2)
        checkpoints.save(2, params, rest_of(2), {}, None)
        overwrite(params)
        assert same(checkpoints.restore_params(2, params_of(0)), params_of(2))


def test_a_step_that_is_saved_already_is_left_as_it_is(workdir):
    with workdir.open_checkpoints() as checkpoints:
        checkpoints.save(2, params_of(2), rest_of(2), {"seconds": 1.0}, {"loss": 1.0})
        checkpoints.save(2, params_of(9), rest_of(9), {"seconds": 9.0}, {"loss": 9.0})
    with workdir.open_checkpoints() as checkpoints:
        params, rest, notes = checkpoints.restore(params_of(0), rest_of(0))
    assert same(params, params_of(2)) and same(rest, rest_of(2)) and notes == {"seconds": 1.0}


@pytest.mark.parametrize(
    ("best_metric", "values", "kept", "best"),
    [
        ("bleu", [1.0, 9.0, 2.0, 3.0, 4.0], {2, 4, 5}, 2),
        ("loss", [9.0, 1.0, 4.0, 3.0, 2.0], {2, 4, 5}, 2),
        ("bleu", [1.0, 2.0, 3.0, 4.0, 9.0], {4, 5}, 5),
        ("exact_match", [9.0, 1.0, 2.0, 3.0, 4.0], {1, 4, 5}, 1),
    ],
)
def test_the_newest_and_the_best_by_the_metric_are_kept(best_metric, values, kept, best, workdir):
    # The other metrics all speak for the third checkpoint.
    metrics = {
        step: {"bleu": float(step == 3), "loss": float(step != 3), "exact_match": float(step == 3), best_metric: value}
        for step, value in enumerate(values, 1)
    }
    write(workdir, metrics, keep_latest=2, keep_best=1, best_metric=best_metric)
    assert steps_of(workdir) == kept
    with workdir.open_checkpoints(best_metric=best_metric) as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (best, 5)
        assert same(checkpoints.restore_params("best", params_of(0)), params_of(best))


def test_the_best_is_kept_among_checkpoints_without_scores_and_over_an_interruption(workdir):
    options = {"keep_latest": 1, "keep_best": 1, "best_metric": "bleu"}
    write(workdir, {1: {"bleu": 7.0}, 2: None, 3: {"bleu": 5.0}}, **options)
    write(workdir, {4: None, 5: {"bleu": 6.0}, 6: None}, **options)
    assert steps_of(workdir) == {1, 6}


def test_several_best_are_kept_where_several_are_asked_for(workdir):
    values = dict(enumerate([5.0, 1.0, 3.0, 4.0, 2.0, 6.0], 1))
    write(workdir, {step: {"loss": value} for step, value in values.items()}, keep_latest=1, keep_best=2)
    assert steps_of(workdir) == {2, 5, 6}


def test_without_scores_the_newest_is_the_best(workdir):
    write(workdir, {1: None, 2: None, 3: None}, keep_latest=2)
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.best_step == 3
        assert same(checkpoints.restore_params("best", params_of(0)), params_of(3))


def test_parameters_alone_come_back_by_name_or_number(workdir):
    write(workdir, {1: {"loss": 2.0}, 2: {"loss": 1.0}, 3: {"loss": 3.0}})
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        shapes = jax.eval_shape(lambda: params_of(0))
        for step, number in {"best": 2, "latest": 3, 1: 1, 3: 3}.items():
            restored = checkpoints.restore_params(step, shapes)
            assert same(restored, params_of(number))
            assert all(leaf.devices() == {jax.local_devices()[0]} for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("step", [4, "newest"])
def test_a_checkpoint_that_is_not_there_is_an_error_that_names_those_that_are(step, workdir):
    write(workdir, {1: None, 2: None})
    message = rf"checkpoints holds no checkpoint {step!r}: choose best, latest or one of \[1, 2\]"
    with workdir.open_checkpoints() as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore_params(step, params_of(0))


@pytest.mark.parametrize("read_only", [False, True])
def test_no_checkpoint_at_all_is_an_error_that_names_the_mend(read_only, workdir):
    workdir.write_config({})
    with (
        pytest.raises(ValueError, match="holds no checkpoint: train until one is written, or give another --workdir"),
        workdir.open_checkpoints(read_only=read_only) as checkpoints,
    ):
        checkpoints.restore_params("best", params_of(0))


def test_reading_alone_removes_nothing(workdir):
    write(workdir, {1: None, 2: None})
    unfinished = workdir.path / "checkpoints" / "3.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.latest_step == 2
    assert unfinished.exists() and steps_of(workdir) == {1, 2}


def test_a_save_that_was_killed_is_passed_over_and_cleared_away(workdir):
    write(workdir, {1: None, 2: None})
    unfinished = workdir.path / "checkpoints" / "3.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == 2
        checkpoints.save(3, params_of(3), rest_of(3), {}, None)
    assert not unfinished.exists() and steps_of(workdir) == {1, 2, 3}


def test_a_checkpoint_moves_between_eight_devices_and_one(workdir):
    eight, one = Parallelism("pmap"), Parallelism("jit")

    def add_one(state, batch, *, axis_name=None):
        return jax.tree.map(lambda leaf: leaf + 1, state)

    state = eight.compile(add_one, donate_state=True)(eight.place(params_of(1)), np.zeros((8, 1), "float32"))
    with workdir.open_checkpoints() as checkpoints:
        checkpoints.save(1, state, eight.place(rest_of(1)), {}, None)
    expected = add_one(params_of(1), None)
    for parallelism in (one, eight):
        with workdir.open_checkpoints() as checkpoints:
            params, rest, _ = checkpoints.restore(parallelism.place(params_of(0)), parallelism.place(rest_of(0)))
        assert same(params, expected) and same(rest, rest_of(1))
        for leaf in jax.tree.leaves((params, rest)):
            assert leaf.sharding.device_set == set(parallelism.devices)


def test_a_relative_path_is_a_work_directory_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with WorkDirectory("runs/first").open_checkpoints() as checkpoints:
        checkpoints.save(1, params_of(1), params_of(2), {"seconds": 0.0}, None)
    with WorkDirectory(tmp_path / "runs/first").open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.latest_step == 1
    assert str(WorkDirectory("gs://bucket/runs").path) == "gs://bucket/runs"
