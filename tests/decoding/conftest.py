"""Provides translators with small random models, as tests/small_models.py makes them."""

import dataclasses

import jax
import pytest

from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.translator import Translator
from flax_transformer.workdir import WorkDirectory
from tests import small_models
from tests.decoding.engines import V
from tests.small_models import random_params, small_config, small_model, word_vocabularies


@pytest.fixture(scope="session")
def make_model():
    """Makes a config of V tokens with other settings, and random parameters."""

    def make(size, seed=0, **changes):
        config = small_config(size, **changes)
        return config, random_params(config, seed)

    return make


@pytest.fixture(scope="session")
def make_engine(make_model):
    """Makes an engine of one model, or of several where seeds are given."""

    def make(*seeds, batch_tokens=64, devices=1, **changes):
        configs, models = zip(*(make_model(V, seed, **changes) for seed in seeds or (290,)), strict=True)
        ensemble = Ensemble.on_devices(configs, models, jax.local_devices()[:devices])
        return Engine(ensemble, batch_tokens=batch_tokens)

    return make


@pytest.fixture(scope="session")
def say():
    """Makes a sentence of some words; each number makes a different one."""
    return small_models.say


@pytest.fixture(scope="session")
def sentences(say):
    """Twelve, of 1 to 14 words."""
    return [say(number, length) for number, length in enumerate([3, 9, 1, 14, 2, 5, 4, 11, 6, 3, 3, 8])]


@pytest.fixture(scope="session")
def vocabularies():
    return word_vocabularies()


@pytest.fixture(scope="session")
def make_translator(vocabularies):
    """Makes a translator on one device; arguments as in `small_model`, and `batch_tokens` and `devices`."""

    def make(seed=3, *, batch_tokens=4096, devices=None, **changes):
        devices = jax.local_devices()[:1] if devices is None else devices
        model = small_model(vocabularies, seed, **changes)
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
