import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.training.parallel import Parallelism
from flax_transformer.workdir import WorkDirectory

# A failed read or write leaves Orbax tasks whose errors are never retrieved.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def workdir(tmp_path):
    return WorkDirectory(tmp_path / "runs" / "first")  # made when something is written, and not before


def params_of(seed):
    rng = np.random.default_rng(seed)
    # The kernel is large enough for a file of its own.
    return {"encoder": {"kernel": jnp.float32(rng.normal(size=(30, 50))), "bias": jnp.float32(rng.normal(size=5))}}


def rest_of(seed, impl="threefry2x32"):
    """The contents of a checkpoint besides the parameters: numbers, an optimizer's state, a typed key."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    _, opt_state = optimizer.update(params_of(seed), optimizer.init(params_of(seed)))
    return {"step": jnp.int32(seed), "opt_state": opt_state, "rng": jax.random.key(seed, impl=impl)}


def trees_of(seed, impl="threefry2x32"):
    return {"params": params_of(seed), "training": rest_of(seed, impl)}


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    leaves = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    return all(one.dtype == other.dtype and jnp.array_equal(one, other) for one, other in leaves)


def write(workdir, metrics, **options):
    """Writes one checkpoint for each step of `metrics`, its parameters made from the step."""
    with workdir.open_checkpoints(**options) as checkpoints:
        for step, values in metrics.items():
            planned = options.get("is_planned", bool)(step)
            checkpoints.save(step, trees_of(step), {"seconds": step / 2, "planned": planned})
            if values is not None:
                checkpoints.record_scores(step, values)


def steps_of(workdir):
    return {int(path.name) for path in (workdir.path / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_newest_checkpoint_is_restored_to_the_bit(impl, workdir):
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        checkpoints.save(3, trees_of(3, impl), {"seconds": 1.5})
        checkpoints.save(5, trees_of(5, impl), {"seconds": 2.5})
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == 5
        step, trees, notes = checkpoints.restore(trees_of(0, impl))
        assert checkpoints.read_notes() == notes == {"seconds": 2.5} and step == 5
    assert same(trees, trees_of(5, impl))


def test_a_restored_key_gives_the_same_random_numbers(workdir):
    write(workdir, {4: None})
    with workdir.open_checkpoints() as checkpoints:
        _, trees, _ = checkpoints.restore(trees_of(0))
    draws = (jax.random.normal(jax.random.fold_in(tree["rng"], 7), (3,)) for tree in (trees["training"], rest_of(4)))
    assert jnp.array_equal(*draws)


def test_arrays_may_be_overwritten_as_soon_as_save_returns(workdir):
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0, keep_unused=True)
    with workdir.open_checkpoints() as checkpoints:
        params = params_of(2)
        checkpoints.save(2, {"params": params}, {})
        overwrite(params)
        assert same(checkpoints.restore_params(2, params_of(0)), params_of(2))


def test_saving_an_existing_step_changes_nothing(workdir):
    with workdir.open_checkpoints() as checkpoints:
        checkpoints.save(2, trees_of(2), {"seconds": 1.0})
        checkpoints.save(2, trees_of(9), {"seconds": 9.0})
    with workdir.open_checkpoints() as checkpoints:
        _, trees, notes = checkpoints.restore(trees_of(0))
    assert same(trees, trees_of(2)) and notes == {"seconds": 1.0}


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
    # By all other metrics the third checkpoint is the best.
    metrics = {
        step: {"bleu": float(step == 3), "loss": float(step != 3), "exact_match": float(step == 3), best_metric: value}
        for step, value in enumerate(values, 1)
    }
    write(workdir, metrics, keep_latest=2, keep_best=1, best_metric=best_metric)
    assert steps_of(workdir) == kept
    with workdir.open_checkpoints(best_metric=best_metric) as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (best, 5)
        assert same(checkpoints.restore_params("best", params_of(0)), params_of(best))


def test_the_best_is_kept_across_unscored_checkpoints_and_an_interruption(workdir):
    options = {"keep_latest": 1, "keep_best": 1, "best_metric": "bleu"}
    write(workdir, {1: {"bleu": 7.0}, 2: None, 3: {"bleu": 5.0}}, **options)
    write(workdir, {4: None, 5: {"bleu": 6.0}, 6: None}, **options)
    assert steps_of(workdir) == {1, 6}


def test_checkpoints_of_signals_do_not_count_among_the_newest(workdir):
    options = {"keep_latest": 2, "is_planned": lambda step: step % 10 == 0}
    write(workdir, dict.fromkeys([10, 20, 24]), **options)
    assert steps_of(workdir) == {10, 20, 24}
    write(workdir, dict.fromkeys([28, 30]), **options)
    assert steps_of(workdir) == {20, 30}
    write(workdir, dict.fromkeys([31, 33]), **options)
    assert steps_of(workdir) == {20, 30, 33}


def test_checkpoints_of_earlier_intervals_count_among_the_newest(workdir):
    write(workdir, dict.fromkeys([10, 20, 30, 40]), keep_latest=4, is_planned=lambda step: step % 10 == 0)
    # A training goes on with a longer interval, and starts twice.
    longer = {"keep_latest": 4, "is_planned": lambda step: step % 100 == 0}
    for step in (60, 70, 100):
        with workdir.open_checkpoints(**longer) as checkpoints:
            checkpoints.save(step, trees_of(step), {"planned": step == 100})  # signals ended the first two starts
    assert steps_of(workdir) == {20, 30, 40, 100}


def test_a_checkpoint_that_cannot_be_read_is_named_where_the_mean_is_made(workdir):
    write(workdir, dict.fromkeys([1, 2, 3]))
    (workdir.path / "checkpoints" / "2" / "params" / "manifest.ocdbt").write_bytes(b"")
    for steps in ([3, 2, 1], [2, 1]):
        with workdir.open_checkpoints() as checkpoints:
            with pytest.raises(ValueError, match=r"the checkpoint of step 2 cannot be read \(.*\): move .*/2 away"):
                checkpoints.average_params(steps)


def test_keep_best_keeps_several_of_the_best(workdir):
    values = dict(enumerate([5.0, 1.0, 3.0, 4.0, 2.0, 6.0], 1))
    write(workdir, {step: {"loss": value} for step, value in values.items()}, keep_latest=1, keep_best=2)
    assert steps_of(workdir) == {2, 5, 6}


def test_without_scores_the_newest_is_the_best(workdir):
    write(workdir, {1: None, 2: None, 3: None}, keep_latest=2)
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.best_step == 3
        assert same(checkpoints.restore_params("best", params_of(0)), params_of(3))


def test_a_save_that_was_killed_is_ignored_and_removed(workdir):
    write(workdir, {1: None, 2: None})
    unfinished = workdir.path / "checkpoints" / "3.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    with workdir.open_checkpoints() as checkpoints:
        assert checkpoints.latest_step == 2
        checkpoints.save(3, trees_of(3), {})
    assert not unfinished.exists() and steps_of(workdir) == {1, 2, 3}


def test_a_checkpoint_of_eight_devices_is_restored_on_one_and_back(workdir):
    eight, one = Parallelism("pmap"), Parallelism("jit")

    def add_one(state, batch, *, axis_name=None):
        return jax.tree.map(lambda leaf: leaf + 1, state)

    state = eight.compile(add_one, donate_state=True)(eight.place(params_of(1)), np.zeros((8, 1), "float32"))
    with workdir.open_checkpoints() as checkpoints:
        checkpoints.save(1, {"params": state, "training": eight.place(rest_of(1))}, {})
    expected = add_one(params_of(1), None)
    for parallelism in (one, eight):
        with workdir.open_checkpoints() as checkpoints:
            _, trees, _ = checkpoints.restore(parallelism.place(trees_of(0)))
        assert same(trees, {"params": expected, "training": rest_of(1)})
        for leaf in jax.tree.leaves(trees):
            assert leaf.sharding.device_set == set(parallelism.devices)


def test_scores_are_the_same_bits_after_reopening_including_nan(workdir):
    write(workdir, {1: {"loss": 1 / 3}, 2: None, 3: {"loss": math.nan}})
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.scores.keys() == {1, 3} and checkpoints.scores[1] == {"loss": 1 / 3}
        assert math.isnan(checkpoints.scores[3]["loss"]) and checkpoints.best_step == 1


def test_a_checkpoint_can_become_the_best_after_it_was_written(workdir):
    write(workdir, {1: None, 2: None, 3: None})
    with workdir.open_checkpoints() as checkpoints:
        for step, loss, best in ((2, 4.0, 2), (3, 5.0, 2), (1, 3.0, 1)):
            checkpoints.record_scores(step, {"loss": loss})
            assert checkpoints.best_step == best
    shutil.rmtree(workdir.path / "checkpoints" / "1")
    with workdir.open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.best_step == 2 and checkpoints.scores[1] == {"loss": 3.0}


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("bleu", [], 0),
        ("bleu", [1.0, 2.0, 3.0], 0),
        ("bleu", [3.0, 1.0, 2.0], 2),
        ("loss", [3.0, 1.0, 2.0], 1),
        ("bleu", [1.0, 3.0, 3.0], 1),  # an equal score is not better
        ("loss", [2.0, math.nan, math.nan], 2),
        ("loss", [math.nan, 2.0], 0),
        ("bleu", [math.nan, 0.0, math.nan], 1),
    ],
)
def test_evaluations_are_counted_since_the_first_with_the_best_score(metric, values, expected, workdir):
    metrics = {step: {"bleu": 0.0, "loss": 0.0, metric: value} for step, value in enumerate(values, 1)}
    for scored in (metrics, {}):  # and again after reopening
        with workdir.open_checkpoints(best_metric=metric) as checkpoints:
            for step, scores in scored.items():
                checkpoints.record_scores(step, scores)
            assert checkpoints.evaluations_since_best == expected


def test_forgotten_scores_stay_forgotten(workdir):
    write(workdir, {1: {"loss": 1.0}, 2: {"loss": 2.0}})
    with workdir.open_checkpoints() as checkpoints:
        assert (checkpoints.best_step, checkpoints.evaluations_since_best) == (1, 1)
    workdir.forget_scores()
    with workdir.open_checkpoints() as checkpoints:
        assert (checkpoints.best_step, checkpoints.evaluations_since_best, checkpoints.scores) == (2, 0, {})
    workdir.forget_scores()  # there are none


@pytest.mark.parametrize("content", [b"", b'{"1": {"loss"', b"3", b"[1]", b'{"1": 3}', b'{"x": {}}', b"\xff\0"])
def test_damaged_scores_are_an_error_of_one_line_with_a_remedy(content, workdir):
    write(workdir, {1: {"loss": 1.0}})
    (workdir.path / "scores.json").write_bytes(content)
    message = (
        r"^.*first/scores\.json is damaged \(.*\): put back the file .*, or remove it to forget which .* the best$"
    )
    with pytest.raises(ValueError, match=message) as caught:
        workdir.open_checkpoints()
    assert "\n" not in str(caught.value)


def test_a_moving_average_is_stored_with_the_parameters(workdir):
    trees = trees_of(3) | {"ema": params_of(8)}
    with workdir.open_checkpoints() as checkpoints:
        checkpoints.save(3, trees, {})
    with workdir.open_checkpoints() as checkpoints:
        _, restored, _ = checkpoints.restore(trees_of(0) | {"ema": params_of(0)})
        assert same(restored, trees)
        assert same(checkpoints.restore_params(3, params_of(0), ema=True), params_of(8))
        assert same(checkpoints.restore_params(3, params_of(0)), params_of(3))
