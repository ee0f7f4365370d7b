"""The experiments of docs/learning.md: variants are what they are called, and all that was measured can be drawn."""

import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from experiments import recurrence, trainings, word_order
from experiments.command import FIGURES, kept
from flax_transformer.config import TransformerConfig
from flax_transformer.model import Transformer

ROOT = Path(__file__).parents[1]
SHARED = {"__init__", "__main__", "command", "train_one", "trainings"}
NAMES = sorted({path.stem for path in (ROOT / "experiments").glob("*.py")} - SHARED)
PAGE = (ROOT / "docs" / "learning.md").read_text("utf-8")
CONFIG = TransformerConfig(
    source_vocab_size=13,
    target_vocab_size=13,
    d_model=8,
    num_heads=2,
    d_ff=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
SOURCE, TARGET = jnp.array([[5, 6, 7, 8, 9]]), jnp.array([[3, 4, 10, 11, 12, 5, 6]])


@pytest.fixture(scope="module")
def params():
    return Transformer(CONFIG).init(jax.random.key(0), SOURCE, TARGET, deterministic=True)["params"]


def logits(params, source=SOURCE, target=TARGET):
    return Transformer(CONFIG).apply({"params": params}, source, target, deterministic=True)


def encoded(params, source=SOURCE):
    return Transformer(CONFIG).apply({"params": params}, source, deterministic=True, method="encode")


def test_only_the_cheating_decoder_sees_what_follows(params):
    changed = TARGET.at[0, 5].set(9)
    assert jnp.array_equal(logits(params)[:, :5], logits(params, target=changed)[:, :5])
    with trainings.CHEATING.in_place():
        assert not jnp.allclose(logits(params)[:, :5], logits(params, target=changed)[:, :5])


def test_only_the_causal_encoder_sees_nothing_that_follows(params):
    changed = SOURCE.at[0, 4].set(3)
    assert not jnp.allclose(encoded(params)[:, :4], encoded(params, changed)[:, :4])
    with trainings.CAUSAL_ENCODER.in_place():
        assert jnp.array_equal(encoded(params)[:, :4], encoded(params, changed)[:, :4])


def test_only_without_positions_it_does_not_matter_where_a_word_stands(params):
    order = jnp.array([3, 0, 4, 2, 1])
    assert not jnp.allclose(encoded(params)[:, order], encoded(params, SOURCE[:, order]), atol=1e-3)
    with trainings.NO_POSITIONS.in_place():
        np.testing.assert_allclose(encoded(params)[:, order], encoded(params, SOURCE[:, order]), atol=1e-5)


def test_unscaled_attention_is_scaled_attention_with_larger_queries(params):
    larger = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 2.0 if "query" in jax.tree_util.keystr(path) else leaf, params
    )  # the head size is 4
    with trainings.UNSCALED.in_place():
        found = logits(params)
    np.testing.assert_allclose(found, logits(larger), atol=1e-5)


def test_without_a_feed_forward_network_there_are_no_parameters_of_one(params):
    with trainings.NO_FEED_FORWARD.in_place():
        bare = Transformer(CONFIG).init(jax.random.key(0), SOURCE, TARGET, deterministic=True)["params"]
    assert params["encoder"]["layers_0"].keys() - bare["encoder"]["layers_0"].keys() == {"feed_forward"}


def test_every_variant_is_an_experiment_of_its_own():
    variants = trainings.VARIANTS.values()
    described = {
        json.dumps(variant.experiment(0).to_mapping(), sort_keys=True) + str(variant.replaced) for variant in variants
    }
    assert len(described) == len(variants)
    assert trainings.BASE.experiment(2).training.seed == 2


@pytest.mark.slow
def test_a_recurrent_network_as_large_learns_to_copy_a_little():
    model = recurrence.Recurrent(vocabulary=9, width=16)
    batch = recurrence.copying(jax.random.key(0), 8, 5, 2)
    assert set(np.unique(batch[0]).tolist()) <= {0, *range(2, 29)} and bool((batch[0] == 2).sum() == 8)
    batch = tuple(ids % 9 for ids in batch)
    fit = recurrence.Fit(model, 40, 0, batch, 1e-2)
    losses = [float(fit.step(*batch)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    transformer, recurrent = recurrence.transformer(1500), recurrence.recurrent_as_large(1500)
    assert abs(recurrence.size(recurrent) / recurrence.size(transformer) - 1) < 0.03


def test_a_translation_that_grows_is_drawn_token_by_token(tmp_path):
    shown = {"source": ["46", "ವರ್ಷಗಳ"], "target": ["years", "46"], "weights": [[0.1, 0.9], [0.8, 0.2]]}
    shown["phrase"] = next(iter(word_order.SHOWN))
    word_order.animate(shown, tmp_path / "grows.gif")
    from PIL import Image

    assert Image.open(tmp_path / "grows.gif").n_frames == 2
    assert word_order.crossing_share(np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]])) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_what_an_experiment_measured_can_be_drawn_and_is_on_the_page(name, monkeypatch, tmp_path):
    monkeypatch.setattr(word_order, "FIGURES", tmp_path)
    experiment = importlib.import_module(f"experiments.{name}")
    for figure in experiment.draw(kept(name)):
        assert (FIGURES / f"{figure}.svg").exists() and f"figures/{figure}.svg" in PAGE
    assert f"python -m experiments.{name}`" in PAGE


def test_the_page_shows_no_figure_that_is_not_there():
    shown = re.findall(r"\(figures/([\w.]+)\)", PAGE)
    assert len(shown) > 12 and all((FIGURES / name).exists() for name in shown)
