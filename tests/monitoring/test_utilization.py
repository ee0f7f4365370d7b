import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.experiment import DataConfig, Experiment
from flax_transformer.model import Transformer
from flax_transformer.monitoring.utilization import CHIPS, Work, model_flops, peak_flops
from flax_transformer.tokens import Tokens
from flax_transformer.training.step import Objective, batch_sums


def device(kind):
    return mock.Mock(spec=jax.devices()[0], device_kind=kind)


@pytest.mark.parametrize(
    ("layers", "autoregression"),
    [
        pytest.param((1, 2), "self_attention", marks=pytest.mark.slow),
        pytest.param((2, 1), "self_attention", marks=pytest.mark.slow),
        ((1, 2), "ssru"),
    ],
)
def test_model_flops_equal_the_operations_that_xla_counts(layers, autoregression):
    # Wide and with few words, so that matrix products are nearly all there is.
    config = TransformerConfig(
        source_vocab_size=97,
        target_vocab_size=97,
        d_model=256,
        num_heads=2,
        d_ff=1280,
        num_encoder_layers=layers[0],
        num_decoder_layers=layers[1],
        decoder_autoregression=autoregression,
        dropout_rate=0.0,
    )
    source, target = jnp.ones((3, 40), jnp.int32), jnp.ones((3, 56), jnp.int32)
    batch = Batch(Tokens(source, source, source), Tokens(target, target, target))
    model = Transformer(config)
    params = model.init(jax.random.key(0), source, target, deterministic=True)["params"]
    sums = functools.partial(batch_sums, objective=Objective(model=model, label_smoothing=0.1))
    compiled = jax.jit(jax.grad(lambda params: sums(params, batch).smoothed)).lower(params).compile()
    assert model_flops(config, 3, 40, 56) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.06)


def test_the_peak_of_a_device_is_its_share_of_the_chip_or_unknown():
    v5e, half = (device(kind) for kind in ("TPU v5 lite", "TPU7x"))
    assert peak_flops(v5e, "bfloat16") == 197e12 and peak_flops(half, "bfloat16") == CHIPS["TPU7x"].flops / 2
    assert peak_flops(v5e, "float32") is None and peak_flops(jax.devices()[0], "bfloat16") is None


def test_a_chip_without_bfloat16_has_no_peak_for_bfloat16():
    t4 = device("Tesla T4")
    assert peak_flops(t4, "bfloat16") is None and peak_flops(t4, "float16") == 65e12


def test_the_work_of_a_step_includes_all_devices():
    model = TransformerConfig.tiny(source_vocab_size=50, target_vocab_size=50, dtype="bfloat16")
    experiment = Experiment(model=model, data=DataConfig(rows=6, source_slots=8, target_slots=12))
    work = Work.of(experiment, 8, [device("TPU v4")] * 4)
    assert work.target_slots == 96 and work.flops == model_flops(model, 8, 8, 12) and work.peak_flops == 4 * 275e12
