"""Provides translators with small random models.

Their translations mean nothing, but they depend on every token of the source, so that any mix-up changes them.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel
from flax_transformer.workdir import WorkDirectory

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()


@pytest.fixture(scope="session")
def make_model():
    """Makes a config of V tokens with other settings, and random parameters."""

    def make(size, seed=0, **changes):
        config = TransformerConfig(
            source_vocab_size=size,
            target_vocab_size=size,
            **{
                "d_model": 16,
                "num_heads": 2,
                "d_ff": 24,
                "num_encoder_layers": 1,
                "num_decoder_layers": 1,
                "tie_embeddings": "none",  # otherwise the model would repeat its last token
                **changes,
            },
        )
        tokens, rng = jnp.ones((1, 2), jnp.int32), np.random.default_rng(seed)
        init = partial(Transformer(config).init, deterministic=True)
        shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens)

        def fill(path, leaf):
            # Matrices large enough that the model is sure of itself, and that its outputs differ by their sources.
            constants = {"scale": np.ones, "bias": np.zeros}
            return jnp.asarray(constants.get(path[-1].key, partial(rng.normal, 0.0, 0.7))(leaf.shape), "float32")

        return config, jax.tree_util.tree_map_with_path(fill, shapes["params"])

    return make


@pytest.fixture(scope="session")
def say():
    """Makes a sentence of some words; each number makes a different one."""
    return lambda number, length: " ".join(np.random.default_rng(number).choice(WORDS, length))


@pytest.fixture(scope="session")
def sentences(say):
    """Twelve, of 1 to 14 words."""
    return [say(number, length) for number, length in enumerate([3, 9, 1, 14, 2, 5, 4, 11, 6, 3, 3, 8])]


@pytest.fixture(scope="session")
def vocabularies(say):
    lines = [say(100 + number, 6) for number in range(40)]
    return VocabularyPair.train(lines, lines, VocabularyConfig(size=110, byte_fallback=False))


@pytest.fixture(scope="session")
def make_translator(make_model, vocabularies):
    """Makes a translator on one device; arguments as in `make_model`, and `batch_tokens` and `devices`."""

    def make(seed=3, *, batch_tokens=4096, devices=None, **changes):
        config, params = make_model(vocabularies.source.size, seed, **changes)
        devices = jax.local_devices()[:1] if devices is None else devices
        model = TrainedModel(config, params, vocabularies)
        return Translator(model, batch_tokens=batch_tokens, devices=devices)

    return make


@pytest.fixture(scope="session")
def translator(make_translator):
    return make_translator()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, make_model, vocabularies):
    """Two checkpoints: step 1 has the better BLEU, step 2 the better loss, and BLEU is what training chose by."""
    workdir = WorkDirectory(tmp_path_factory.mktemp("work") / "run")
    config, _ = make_model(vocabularies.source.size)
    workdir.write_config({"model": dataclasses.asdict(config), "training": {"evaluation": {"best_metric": "bleu"}}})
    workdir.write_vocabularies(vocabularies)
    with workdir.open_checkpoints() as checkpoints:
        for step, metrics in ((1, {"bleu": 9.0, "loss": 3.0}), (2, {"bleu": 8.0, "loss": 2.0})):
            _, params = make_model(vocabularies.source.size, 2 + step)
            checkpoints.save(step, {"params": params}, {})
            checkpoints.record_scores(step, metrics)
    return workdir
