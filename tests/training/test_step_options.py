import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.data.pipeline import PackedCorpus, Packing, TokenSide
from flax_transformer.experiment import DataConfig, Experiment, ScheduleConfig, TrainingConfig
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens
from flax_transformer.training.loss_scale import FIRST
from flax_transformer.training.optimizer import make_optimizer
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import Objective, TrainState, eval_step, loss_and_gradients, train_step

V, ROWS, DEVICES, PARTS = 31, 40, 8, 5
CONFIG = TransformerConfig(
    source_vocab_size=V, target_vocab_size=V, d_model=16, num_heads=2, d_ff=24, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.0, max_length=8,
)  # fmt: skip
MODEL = Transformer(CONFIG)
OPTIMIZER = make_optimizer(
    TrainingConfig(schedule=ScheduleConfig(name="constant", learning_rate=1e-2, warmup_steps=0)), CONFIG.d_model
)


@pytest.fixture(scope="module")
def batch():
    """Rows with unequal numbers of tokens, the last ones empty."""
    rng = np.random.default_rng(0)
    source, target = ([rng.integers(3, V, length).tolist() for length in rng.integers(1, 7, 120)] for _ in range(2))
    config = DataConfig(rows=37, source_slots=9, target_slots=11)
    sides = TokenSide.join(source), TokenSide.join(target)
    batch = PackedCorpus(*sides, Packing.plan(*sides, [1] * 120, config, 8), config, multiple=ROWS).batch(0)
    tokens = (batch.target.segments > 0).sum(1)
    assert len(tokens) == ROWS and tokens[-1] == 0
    # The parts of which a batch is made up differ in tokens, so that a mean of their means would be wrong.
    assert len({tokens[part::PARTS].sum() for part in range(PARTS)}) > 2
    return batch


@functools.cache
def state_of(model=MODEL, **options):
    create = functools.partial(TrainState.create, model, OPTIMIZER, **options)
    return jax.jit(create)(jax.random.key(0))


def objective_of(model=MODEL, label_smoothing=0.1, **parts):
    return Objective(model=model, label_smoothing=label_smoothing, **parts)


@functools.cache
def step_of(model=MODEL, **options):
    return jax.jit(functools.partial(train_step, objective=objective_of(model), optimizer=OPTIMIZER, **options))


def same(first, second):
    return jax.tree.all(jax.tree.map(jnp.array_equal, first, second))


def relative_difference(found, expected):
    return optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected)


@pytest.mark.parametrize("kind", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_micro_batches_give_the_sums_and_the_gradient_of_the_whole(kind, batch):
    def gradients_of(parallelism, micro_batches):
        function = functools.partial(loss_and_gradients, objective=objective_of(micro_batches=micro_batches))
        return parallelism.compile(function, donate_state=False)(parallelism.place(state_of().params), batch)

    sums, expected = jax.device_get(gradients_of(Parallelism("jit"), 1))
    found_sums, found = jax.device_get(gradients_of(Parallelism(kind), PARTS))
    assert found_sums.tokens == sums.tokens == (batch.target.segments > 0).sum()
    np.testing.assert_allclose(found_sums.smoothed, sums.smoothed, rtol=1e-6)
    assert relative_difference(found, expected) < 2e-6


@pytest.mark.slow
def test_micro_batches_need_less_memory(batch):
    def temporaries(micro_batches):
        def gradients_of(params, rows):
            return loss_and_gradients(params, rows, objective=objective_of(micro_batches=micro_batches))[1]

        return jax.jit(gradients_of).lower(state_of().params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(PARTS) < temporaries(1) / 2


@pytest.mark.slow
def test_a_loss_in_chunks_holds_the_logits_of_one_chunk():
    """From the compiler: all logits of this batch in float32 are 21 MB, those of a chunk a tenth of it."""
    vocabulary, slots = 16_001, 20
    config = dataclasses.replace(CONFIG, source_vocab_size=vocabulary, target_vocab_size=vocabulary, max_length=slots)
    model = Transformer(config)
    side = np.ones((17, slots), np.int32)
    rows = Batch(Tokens(side, side, side), Tokens(side, side, side))

    def temporaries(loss_chunks):
        def gradients_of(params, batch):
            return loss_and_gradients(params, batch, objective=objective_of(model, loss_chunks=loss_chunks))[1]

        return jax.jit(gradients_of).lower(state_of(model).params, rows).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * 17 * slots * vocabulary
    assert temporaries(1) > all_logits
    assert temporaries(10) < all_logits / 2


def test_the_loss_of_a_held_out_batch_is_the_same_in_parts(batch):
    params = state_of().params
    whole, parts = (
        jax.jit(functools.partial(eval_step, objective=objective_of(micro_batches=count)))(params, batch)
        for count in (1, PARTS)
    )
    assert whole.tokens == parts.tokens and whole.correct == parts.correct
    np.testing.assert_allclose(whole.cross_entropy, parts.cross_entropy, rtol=1e-6)


def test_the_objective_has_the_settings_of_the_experiment():
    model = dataclasses.replace(CONFIG, banned_ids=(7,), suppressed_ids=(9,))
    plain = Objective.of(Experiment(model=model), 3)
    assert (plain.label_smoothing, plain.freeze) == (0.1, "")
    assert plain.model.config == model and (plain.micro_batches, plain.loss_chunks) == (3, 1)
    settings = {"label_smoothing": 0.2, "freeze": "encoder", "parallelism.loss_chunks": 2}
    changed = Experiment(model=model).changed({f"training.{name}": value for name, value in settings.items()})
    found = Objective.of(changed, 1)
    assert (found.label_smoothing, found.freeze, found.loss_chunks) == (0.2, "encoder", 2)


@pytest.mark.slow
def test_each_part_drops_units_of_its_own(batch):
    model = Transformer(dataclasses.replace(CONFIG, dropout_rate=0.5))
    row = jax.tree.map(lambda leaf: np.tile(leaf[:1], (2, 1)), batch)
    losses = jax.jit(functools.partial(loss_and_gradients, objective=objective_of(model, 0.0, micro_batches=2)))
    once = jax.jit(functools.partial(loss_and_gradients, objective=objective_of(model, 0.0)))
    rng, params = jax.random.key(1), state_of().params
    part = jax.tree.map(lambda leaf: leaf[:1], row)
    first, second = (once(params, part, dropout_rng=jax.random.fold_in(rng, number))[0].smoothed for number in (0, 1))
    assert abs(first - second) > 1e-3
    np.testing.assert_allclose(losses(params, row, dropout_rng=rng)[0].smoothed, first + second, rtol=1e-6)


def test_rows_are_divided_so_that_a_device_takes_no_more_than_it_may():
    eight = Parallelism("pmap")
    for rows, limit, expected in ((64, 0, 1), (64, 8, 1), (64, 7, 2), (64, 3, 3), (65, 8, 2), (1, 1, 1), (80, 1, 10)):
        assert eight.micro_batches(rows, limit) == expected, (rows, limit)
    assert Parallelism("jit").micro_batches(64, 7) == 10


def poisoned(state):
    """The same state, but for a parameter that makes every loss infinite or no number."""
    params = jax.tree.map(lambda leaf: leaf, state.params)
    params["shared_embedding"]["embedding"] = params["shared_embedding"]["embedding"].at[3].set(jnp.inf)
    return state.replace(params=params)


def test_an_update_that_is_not_finite_is_left_out_whole_and_counted(batch):
    step = step_of(ema_decay=0.9)
    good, _ = step(state_of(with_ema=True), batch)
    bad = poisoned(good)
    after, metrics = step(bad, batch)
    assert not jnp.isfinite(metrics.gradient_norm)
    for name in ("params", "opt_state", "ema", "rng"):
        assert same(getattr(after, name), getattr(bad, name)), name
    assert (after.step, after.skipped, after.skipped_in_a_row) == (2, 1, 1)
    again, metrics = step(after, batch)
    assert (again.step, again.skipped, again.skipped_in_a_row) == (3, 2, 2)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (2, 2)
    healed, metrics = step(again.replace(params=good.params), batch)
    assert (healed.step, healed.skipped, healed.skipped_in_a_row) == (4, 2, 0)
    assert jnp.isfinite(metrics.gradient_norm) and not same(healed.params, good.params)


def test_an_update_after_a_left_out_one_is_the_one_that_would_have_come(batch):
    step = step_of()
    state = state_of()
    expected, _ = step(state, batch)
    after, _ = step(poisoned(state), batch)
    found, _ = step(after.replace(params=state.params), batch)
    assert same((found.params, found.opt_state), (expected.params, expected.opt_state))


def test_the_norms_of_the_modules_make_up_the_global_norm_and_name_what_is_not_finite(batch):
    _, metrics = step_of()(state_of(), batch)
    assert set(metrics.module_norms) == {"shared_embedding/embedding", "encoder/layers_0", "decoder/layers_0"}
    squares = sum(float(norm) ** 2 for norm in metrics.module_norms.values())
    np.testing.assert_allclose(squares**0.5, metrics.gradient_norm, rtol=1e-6)
    _, gradients = jax.jit(functools.partial(loss_and_gradients, objective=objective_of()))(state_of().params, batch)
    expected = optax.tree.norm(gradients["decoder"]["layers_0"])
    np.testing.assert_allclose(metrics.module_norms["decoder/layers_0"], expected, rtol=1e-6)


def test_the_moving_average_follows_the_parameters(batch):
    decay, step = 0.95, step_of(ema_decay=0.95)
    state = state_of(with_ema=True)
    assert same(state.ema, state.params) and state_of().ema is None
    expected = jax.device_get(state.params)
    for number in range(1, 4):
        state, _ = step(state, batch)
        keep = min(decay, number / (number + 9))
        expected = jax.tree.map(
            lambda old, new, keep=keep: keep * old + (1 - keep) * new, expected, jax.device_get(state.params)
        )
        assert relative_difference(state.ema, expected) < 1e-6
    late, _ = step(state.replace(step=jnp.int32(10_000)), batch)
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, expected, late.params)
    assert relative_difference(late.ema, expected) < 1e-6


@pytest.fixture(scope="module")
def half():
    return Transformer(dataclasses.replace(CONFIG, dtype="float16"))


def test_a_state_has_a_loss_scale_in_float16_only(half):
    assert state_of(half).loss_scale.factor == FIRST
    for dtype in ("float32", "bfloat16"):
        assert state_of(Transformer(dataclasses.replace(CONFIG, dtype=dtype))).loss_scale is None


@pytest.mark.parametrize("options", [{}, {"micro_batches": PARTS}, {"loss_chunks": 11}])
def test_the_loss_scale_leaves_the_gradient_as_it_is(half, options, batch):
    state = state_of(half)
    _, expected = jax.jit(functools.partial(loss_and_gradients, objective=objective_of()))(state.params, batch)
    sums, found = jax.jit(functools.partial(loss_and_gradients, objective=objective_of(half, **options)))(
        state.params, batch, loss_scale=state.loss_scale
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    # float16 has 11 bits.
    assert relative_difference(found, expected) < 5e-3
    assert sums.tokens == (batch.target.segments > 0).sum()


def test_a_loss_scale_saves_gradients_that_float16_would_lose(half, batch):
    state = state_of(half)
    small = jax.tree.map(lambda leaf: leaf, state.params)
    # A loss a millionth of its size: what it sends back into float16 is below its smallest number.
    kernel = small["decoder"]["layers_0"]["feed_forward"]["outer"]["kernel"]
    small["decoder"]["layers_0"]["feed_forward"]["outer"]["kernel"] = kernel * 1e-6
    lost, kept, expected = (
        jax.jit(functools.partial(loss_and_gradients, objective=objective_of(model)))(small, batch, loss_scale=scale)[1]
        for model, scale in (
            (half, state.loss_scale._replace(factor=jnp.float32(1.0))),
            (half, state.loss_scale),
            (MODEL, None),
        )
    )

    def inner(gradients):
        return gradients["decoder"]["layers_0"]["feed_forward"]["inner"]["kernel"]

    assert relative_difference(inner(kept), inner(expected)) < 0.1
    assert relative_difference(inner(lost), inner(expected)) > 0.5


def test_an_overflow_in_float16_lowers_the_factor_until_updates_go_on(half, batch):
    step, state = step_of(half), state_of(half)
    state = state.replace(loss_scale=state.loss_scale._replace(factor=jnp.float32(2.0**30)))
    factors = []
    for _ in range(20):
        state, metrics = step(state, batch)
        factors.append(float(state.loss_scale.factor))
    left_out = int(state.skipped)
    assert 2 < left_out < 20 and not metrics.skipped_in_a_row
    assert factors == [2.0 ** (30 - min(number, left_out)) for number in range(1, 21)]


def test_the_loss_falls_in_float16(half, batch):
    step, state, losses = step_of(half), state_of(half), []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics.sums.cross_entropy / metrics.sums.tokens))
    assert losses[-1] < losses[0] / 2
