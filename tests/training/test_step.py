import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.pipeline import PackedCorpus, Packing, TokenSide
from flax_transformer.experiment import DataConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from flax_transformer.model import Transformer
from flax_transformer.training.optimizer import make_optimizer
from flax_transformer.training.step import Objective, TrainState, eval_step, loss_and_gradients, train_step

ROWS, SOURCE_SLOTS, TARGET_SLOTS, V = 5, 9, 11, 31
CONFIG = TransformerConfig(
    source_vocab_size=V, target_vocab_size=V, d_model=16, num_heads=2, d_ff=24, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.2, max_length=8,
)  # fmt: skip
CLIP_NORM = 1e-3  # far below any gradient here; Adam does not mind
SETTINGS = TrainingConfig(
    schedule=ScheduleConfig(name="constant", learning_rate=1e-2, warmup_steps=0),
    optimizer=OptimizerConfig(clip_norm=CLIP_NORM),
)
MODEL, OPTIMIZER = Transformer(CONFIG), make_optimizer(SETTINGS, CONFIG.d_model)
create = jax.jit(functools.partial(TrainState.create, MODEL, OPTIMIZER))
OBJECTIVE = Objective(model=MODEL, label_smoothing=0.1)
gradients_of = jax.jit(functools.partial(loss_and_gradients, objective=OBJECTIVE))
step_of = jax.jit(functools.partial(train_step, objective=OBJECTIVE, optimizer=OPTIMIZER))
evaluate = jax.jit(functools.partial(eval_step, objective=OBJECTIVE))


@pytest.fixture(scope="module")
def batch():
    """Rows that hold several sentence pairs each, and padding."""
    rng = np.random.default_rng(0)
    source, target = ([rng.integers(3, V, length).tolist() for length in rng.integers(1, 7, 40)] for _ in range(2))
    config = DataConfig(rows=ROWS, source_slots=SOURCE_SLOTS, target_slots=TARGET_SLOTS)
    sides = TokenSide.join(source), TokenSide.join(target)
    packed = PackedCorpus(*sides, Packing.plan(*sides, [1] * 40, config, 8), config)
    batch = packed.batch(0)
    assert batch.target.segments.max() > 1 and not batch.target.segments.all()
    return batch


@pytest.fixture(scope="module")
def state():
    return create(jax.random.key(0))


def same(first, second):
    """Whether two trees hold the same bits."""
    return all(map(jnp.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def types_of(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def test_equal_states_and_batches_give_equal_results_to_the_bit(state, batch):
    first, second = step_of(state, batch), step_of(state, batch)
    assert same(first, second)
    # A step is no more than its state: going on from what was stored, made anew, is the same.
    key = jax.random.wrap_key_data(np.array(jax.random.key_data(first[0].rng)))
    none = jnp.int32(0)
    stored = TrainState(
        step=jnp.int32(1), params=first[0].params, opt_state=first[0].opt_state, rng=key, skipped=none,
        skipped_in_a_row=none,
    )  # fmt: skip
    assert same(step_of(first[0], batch), step_of(stored, batch))


def test_each_step_and_each_seed_drops_other_units(state, batch):
    losses = {float(step_of(state.replace(step=jnp.int32(step)), batch)[1].sums.smoothed) for step in range(5)}
    losses |= {float(step_of(state.replace(rng=jax.random.key(seed)), batch)[1].sums.smoothed) for seed in (1, 2)}
    assert len(losses) == 7


def test_a_step_counts_itself_keeps_its_key_and_moves_every_parameter(state, batch):
    after, metrics = step_of(state, batch)
    assert after.step == state.step + 1
    assert same(after.rng, state.rng)
    assert all(jax.tree.leaves(jax.tree.map(lambda old, new: (old != new).any(), state.params, after.params)))
    assert types_of(after) == types_of(state)
    assert metrics.sums.tokens == (batch.target.segments > 0).sum()


def test_the_gradient_is_that_of_the_mean_loss_over_all_tokens(state, batch):
    def mean_loss(params, batch):
        logits = MODEL.apply({"params": params}, batch.source, batch.target, deterministic=True)
        wanted = optax.smooth_labels(jax.nn.one_hot(batch.target.ids, V), 0.1)
        return jnp.mean(optax.softmax_cross_entropy(logits, wanted), where=batch.target.segments > 0)

    loss, expected = jax.jit(jax.value_and_grad(mean_loss))(state.params, batch)
    sums, gradients = gradients_of(state.params, batch)
    np.testing.assert_allclose(sums.smoothed / sums.tokens, loss, rtol=1e-6)
    assert relative_difference(gradients, expected) < 2e-6


def relative_difference(found, expected):
    return optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected)


def test_uneven_parts_of_a_batch_add_up_to_the_whole(state, batch):
    whole_sums, whole = gradients_of(state.params, batch)
    first_rows = np.arange(ROWS)[:, None] < 2
    parts = [
        gradients_of(state.params, jax.tree.map(lambda leaf, rows=rows: np.where(rows, leaf, 0), batch))
        for rows in (first_rows, ~first_rows)
    ]
    tokens = [float(sums.tokens) for sums, _ in parts]
    assert tokens[0] != tokens[1] and sum(tokens) == whole_sums.tokens
    first, second = (optax.tree.scale(count, gradients) for count, (_, gradients) in zip(tokens, parts, strict=True))
    total = optax.tree.scale(1 / sum(tokens), optax.tree.add(first, second))
    assert relative_difference(total, whole) < 2e-6
    np.testing.assert_allclose(sum(float(sums.smoothed) for sums, _ in parts), whole_sums.smoothed, rtol=1e-6)


def test_the_reported_norm_is_the_gradient_s_before_clipping(state, batch):
    _, metrics = step_of(state, batch)
    step_rng = jax.random.fold_in(state.rng, state.step)
    _, gradients = gradients_of(state.params, batch, dropout_rng=step_rng)
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(gradients), rtol=1e-5)
    assert metrics.gradient_norm > CLIP_NORM


def test_the_loss_on_one_batch_falls(state, batch):
    before = evaluate(state.params, batch)
    for _ in range(30):
        state, metrics = step_of(state, batch)
    after = evaluate(state.params, batch)
    assert state.step == 30
    assert after.cross_entropy < before.cross_entropy / 2
    assert after.correct > before.correct


def test_evaluating_drops_nothing_and_smooths_nothing(state, batch):
    sums = evaluate(state.params, batch)
    assert same(sums, evaluate(state.params, batch))
    assert sums.smoothed == sums.cross_entropy
    np.testing.assert_allclose(sums.cross_entropy, gradients_of(state.params, batch)[0].cross_entropy, rtol=1e-6)
    dropped = gradients_of(state.params, batch, dropout_rng=jax.random.key(0))[0]
    assert abs(dropped.cross_entropy - sums.cross_entropy) > 1e-3


def test_parameters_and_dropout_come_from_different_keys_of_one_seed():
    first, again, other = (create(jax.random.key(seed)) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first.params, other.params) and not same(first.rng, other.rng)
    assert not same(first.rng, jax.random.key(0))
