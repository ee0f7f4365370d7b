import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.pipeline import PackedCorpus, Packing, TokenSide
from flax_transformer.experiment import DataConfig, ScheduleConfig, TrainingConfig
from flax_transformer.model import Transformer
from flax_transformer.training.optimizer import make_optimizer
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import Objective, TrainState, batch_sums, loss_and_gradients, train_step
from flax_transformer.workdir import WorkDirectory

DEVICES, V = 8, 31
CONFIG = TransformerConfig(
    source_vocab_size=V, target_vocab_size=V, d_model=16, num_heads=2, d_ff=24, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.2, max_length=8,
)  # fmt: skip
MODEL = Transformer(CONFIG)
OPTIMIZER = make_optimizer(TrainingConfig(schedule=ScheduleConfig(warmup_steps=2)), CONFIG.d_model)
OBJECTIVE = Objective(model=MODEL, label_smoothing=0.1)
gradients_of = functools.partial(loss_and_gradients, objective=OBJECTIVE)
step_of = functools.partial(train_step, objective=OBJECTIVE, optimizer=OPTIMIZER)


@pytest.fixture(scope="module")
def batch():
    """Thirteen rows and three empty ones, two a device: the last device has no token, the others unequal numbers."""
    rng = np.random.default_rng(0)
    source, target = ([rng.integers(3, V, length).tolist() for length in rng.integers(1, 7, 60)] for _ in range(2))
    config = DataConfig(rows=13, source_slots=9, target_slots=11)
    sides = TokenSide.join(source), TokenSide.join(target)
    batch = PackedCorpus(*sides, Packing.plan(*sides, [1] * 60, config, 8), config, multiple=DEVICES).batch(0)
    tokens = (batch.target.segments > 0).reshape(DEVICES, -1).sum(1)
    assert tokens[-1] == 0 and len(set(tokens)) > 3
    return batch


@pytest.fixture(scope="module")
def state():
    return jax.jit(functools.partial(TrainState.create, MODEL, OPTIMIZER))(jax.random.key(0))


KINDS = ["jit", "pmap", "data", "fsdp", "data=2,fsdp=4"]


@pytest.fixture(scope="module")
def made():
    """The state before the first step, created by each kind of parallelism."""
    create = functools.partial(TrainState.create, MODEL, OPTIMIZER)
    return {kind: Parallelism(kind).create(create, jax.random.key(0)) for kind in KINDS}


@pytest.fixture(scope="module")
def after_step(state, batch):
    """The state after one step on one device."""
    return Parallelism("jit").compile(step_of, donate_state=False)(state, batch)[0]


@pytest.fixture(scope="module")
def expected(state, batch):
    """The sums and the gradient on one device."""
    one = Parallelism("jit")
    return jax.device_get(one.compile(gradients_of, donate_state=False)(one.place(state.params), batch))


@pytest.mark.parametrize(
    ("kind", "loss_chunks"),
    [
        ("pmap", 1),
        ("data=2,fsdp=4", 1),
        ("data=2,fsdp=4", 11),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("data", 1), ("fsdp", 1), ("pmap", 11))),
    ],
)
def test_eight_devices_give_the_sums_and_the_gradient_of_one(kind, loss_chunks, expected, state, batch):
    eight = Parallelism(kind)
    objective = dataclasses.replace(OBJECTIVE, loss_chunks=loss_chunks)
    compiled = eight.compile(functools.partial(loss_and_gradients, objective=objective), donate_state=False)
    eight_sums, found = jax.device_get(compiled(eight.place(state.params), batch))
    sums, gradients = expected
    assert eight_sums.tokens == sums.tokens == (batch.target.segments > 0).sum()
    for name in ("smoothed", "cross_entropy", "correct"):
        np.testing.assert_allclose(getattr(eight_sums, name), getattr(sums, name), rtol=1e-6)

    differences = jax.tree.map(lambda *leaves: np.subtract(*leaves), found, gradients)
    assert optax.tree.norm(differences) / optax.tree.norm(gradients) < 2e-6
    leaves = jax.tree.leaves_with_path(differences)
    for (path, difference), gradient in zip(leaves, jax.tree.leaves(gradients), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("key/bias"):  # moves all scores of a query alike: its gradient is 0 but for rounding
            assert max(abs(difference)) < 1e-7, name
        else:
            assert np.linalg.norm(difference) / np.linalg.norm(gradient) < 1e-5, name


@pytest.mark.parametrize("kind", ["pmap", pytest.param("data=2,fsdp=4", marks=pytest.mark.slow)])
def test_eight_devices_give_the_sums_and_the_gradient_of_one_for_a_recurrent_decoder(kind, batch):
    model = Transformer(dataclasses.replace(CONFIG, decoder_autoregression="ssru", num_decoder_layers=2, remat=True))
    params = jax.jit(functools.partial(TrainState.create, model, OPTIMIZER))(jax.random.key(0)).params
    step = functools.partial(loss_and_gradients, objective=dataclasses.replace(OBJECTIVE, model=model))
    one, eight = (
        jax.device_get(each.compile(step, donate_state=False)(each.place(params), batch))
        for each in (Parallelism("jit"), Parallelism(kind))
    )
    np.testing.assert_allclose(eight[0].smoothed, one[0].smoothed, rtol=1e-6)
    difference = optax.tree.norm(jax.tree.map(np.subtract, eight[1], one[1]))
    assert difference / optax.tree.norm(one[1]) < 2e-6
    unit = one[1]["decoder"]["layers_1"]["recurrence"]
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(unit))


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        pytest.param("pmap", 1, marks=pytest.mark.slow),
        pytest.param("data", 1, marks=pytest.mark.slow),
        pytest.param("fsdp", 8, marks=pytest.mark.slow),
        ("data=2,fsdp=4", 4),
    ],
)
def test_over_fsdp_each_device_keeps_a_part_of_parameters_and_optimizer_from_step_to_step(kind, share, made, batch):
    eight = Parallelism(kind)
    state = jax.tree.map(jnp.copy, made[kind])  # the step below donates it
    compiled = eight.compile(step_of, donate_state=True)
    for _ in range(3):
        mean = state.opt_state[0].mu
        for tree in (state.params, mean):
            kernel = tree["encoder"]["layers_0"]["feed_forward"]["inner"]["kernel"]
            assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // share}
            norm = tree["encoder"]["layers_0"]["feed_forward_norm"]["scale"]
            assert norm.sharding.is_fully_replicated
        state, metrics = compiled(state, batch)
        assert metrics.gradient_norm.sharding.is_fully_replicated
    # Nothing divides a vocabulary of 31 pieces: vectors are divided in its place.
    embedding = state.params["shared_embedding"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(V, CONFIG.d_model // share)}


@pytest.mark.parametrize(("kind", "count"), [("jit", 1), ("pmap", DEVICES), ("fsdp", DEVICES)])
def test_only_the_devices_of_the_training_translate(kind, count):
    assert Parallelism(kind).local_devices == jax.local_devices()[:count]


def test_jit_on_several_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match='layout is "jit", .* there are 2 processes: set it to "pmap" or "auto"'):
        Parallelism("jit")


def test_what_fsdp_divides_neither_way_stays_whole():
    kernel = Parallelism("fsdp").sharding("params/inner/kernel", (20, 12))
    assert kernel.is_fully_replicated
    assert not Parallelism("data=2,fsdp=4").sharding("params/inner/kernel", (20, 12)).is_fully_replicated


def test_a_state_is_the_same_wherever_it_is_made(state, made):
    for kind in KINDS:
        assert jax.tree.all(jax.tree.map(np.array_equal, made[kind].params, state.params)), kind


def test_a_mesh_drops_the_units_that_one_device_drops(state, batch):
    rng = jax.random.key(3)
    one, eight = (
        jax.device_get(
            parallelism.compile(functools.partial(gradients_of, dropout_rng=rng), donate_state=False)(
                parallelism.place(state.params), batch
            )[0]
        )
        for parallelism in (Parallelism("jit"), Parallelism("data=2,fsdp=4"))
    )
    np.testing.assert_allclose(eight.smoothed, one.smoothed, rtol=1e-6)


RATES = "dropout_rate", "attention_dropout_rate", "activation_dropout_rate"


@pytest.mark.parametrize(
    ("kind", "rng_impl", "rates"),
    [
        *(pytest.param(kind, "rbg", RATES, marks=pytest.mark.slow) for kind in ("data", "fsdp")),
        ("data=2,fsdp=4", "rbg", RATES),
        *(pytest.param("data=2,fsdp=4", "rbg", (rate,), marks=pytest.mark.slow) for rate in RATES),
        pytest.param("data=2,fsdp=4", "unsafe_rbg", RATES, marks=pytest.mark.slow),
    ],
)
def test_over_a_mesh_each_device_draws_rbgs_bits_for_its_own_rows_alone(kind, rng_impl, rates, state, batch):
    model = Transformer(dataclasses.replace(CONFIG, **{rate: 0.2 * (rate in rates) for rate in RATES}))
    eight = Parallelism(kind)
    source, target = (np.tile(tokens[:2], (DEVICES, 1)) for tokens in (batch.source.ids, batch.target.ids))

    def losses_of(params, tokens):
        rngs = {"dropout": jax.random.key(3, impl=rng_impl)}
        logits = model.apply({"params": params}, *tokens, deterministic=False, rngs=rngs)
        return jnp.sum(logits**2, axis=(1, 2))

    transformed = eight.transform(losses_of, donate_state=False)
    params, tokens = eight.place(state.params), eight.divide((source, target))
    # Every device has the same two rows, and drops other units of them than the other devices.
    losses = np.asarray(transformed(params, tokens)).reshape(DEVICES, 2)
    assert len(np.unique(losses[:, 0])) == len(np.unique(losses[:, 1])) == DEVICES
    # Activations have three dimensions, attention weights four; keys, which may be drawn too, have fewer.
    drawn = re.findall(r"rng_bit_generator.*tensor<(\d+x\d+x[\dx]+)xui32>", transformed.lower(params, tokens).as_text())
    rows, ranks = ({count(shape.split("x")) for shape in drawn} for count in (lambda sizes: sizes[0], len))
    assert rows == {"2"}
    assert ranks == {4 if rate == "attention_dropout_rate" else 3 for rate in rates}


@pytest.mark.parametrize(
    "written_by",
    [pytest.param(kind, marks=pytest.mark.slow) if kind in ("jit", "data", "fsdp") else kind for kind in KINDS],
)
def test_each_way_reads_the_checkpoints_of_every_other(written_by, tmp_path, made, after_step):
    def trees_of(parallelism, state):
        return parallelism.as_global({"params": state.params, "training": {"opt_state": state.opt_state}})

    writer = Parallelism(written_by)
    state = writer.place(after_step)
    with WorkDirectory(tmp_path).open_checkpoints() as checkpoints:
        checkpoints.save(1, trees_of(writer, state), {})
    expected = jax.device_get(trees_of(writer, state))
    for kind in KINDS:
        reader = Parallelism(kind)
        targets = trees_of(reader, made[kind])
        with WorkDirectory(tmp_path).open_checkpoints() as checkpoints:
            _, trees, _ = checkpoints.restore(targets)
        assert jax.tree.all(jax.tree.map(np.array_equal, trees, expected)), kind
        for leaf, target in zip(jax.tree.leaves(trees), jax.tree.leaves(targets), strict=True):
            assert leaf.sharding == target.sharding, kind
        whole = reader.as_whole(reader.as_local(trees)["params"])
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))


def test_a_mesh_that_does_not_fit_the_devices_is_an_error_that_names_both():
    with pytest.raises(ValueError, match="'data=3,fsdp=2', which needs 6 devices, but there are 8: choose"):
        Parallelism("data=3,fsdp=2")


@pytest.fixture(scope="module")
def step():
    """A step on eight devices, from a copy: a donated state takes with it the one that it was placed from."""
    eight = Parallelism("auto")
    compiled = eight.compile(step_of, donate_state=True)
    return lambda state, batch: compiled(eight.place(jax.tree.map(jnp.copy, state)), batch)


def test_a_state_comes_back_un_stacked_and_goes_in_again(step, state, batch):
    after = state
    for number in range(1, 4):
        after, metrics = step(after, batch)
        assert after.step == number
        assert metrics.sums.tokens.shape == metrics.gradient_norm.shape == ()
    types = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
    assert types[0] == types[1]
    for leaf in jax.tree.leaves(after.params):
        assert leaf.sharding.is_fully_replicated and leaf.sharding.device_set == set(jax.local_devices())


def test_pmapped_steps_are_the_same_to_the_bit_each_time(step, state, batch):
    first, again = (step(state, batch)[0].params for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))


def test_each_device_drops_units_of_its_own(step, state, batch):
    share = jax.tree.map(lambda leaf: leaf[:2], batch)
    _, metrics = step(state, jax.tree.map(lambda leaf: np.tile(leaf, (DEVICES, 1)), share))
    step_rng = jax.random.fold_in(state.rng, state.step)
    loss = jax.jit(functools.partial(batch_sums, objective=OBJECTIVE))
    losses = [
        float(loss(state.params, share, dropout_rng=jax.random.fold_in(step_rng, device)).smoothed)
        for device in range(DEVICES)
    ]
    assert len(set(losses)) == DEVICES
    np.testing.assert_allclose(metrics.sums.smoothed, sum(losses), rtol=1e-5)


def test_auto_is_pmap_on_several_devices_and_jit_on_one():
    several, single = Parallelism("auto"), Parallelism("auto", jax.local_devices()[:1])
    assert (several.kind, several.num_devices) == ("pmap", DEVICES)
    assert (single.kind, single.num_devices) == ("jit", 1)
    assert Parallelism("jit").num_devices == 1
    assert Parallelism("pmap", jax.local_devices()[2:6]).devices == jax.local_devices()[2:6]


def test_it_says_how_it_runs():
    assert str(Parallelism("auto")) == "pmap on 8 cpu devices"
    assert str(Parallelism("jit")) == "jit on 1 cpu device"
    assert str(Parallelism("data=2,fsdp=4")) == "jit over a mesh of 2 data x 4 fsdp on 8 cpu devices"
