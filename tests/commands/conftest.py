"""Provides work directories with small random models, and fixtures that run commands on them.

Their translations mean nothing, but they depend on every token of the source, so that any mix-up changes them.
"""

import dataclasses
import io
import shutil
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.__main__ import main
from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel
from flax_transformer.workdir import WorkDirectory

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()


def sentence(number, length):
    return " ".join(np.random.default_rng(number).choice(WORDS, length))


def random_params(config, seed):
    """Matrices large enough that the model is confident, and that its outputs differ between sources."""
    tokens, rng = jnp.ones((1, 2), jnp.int32), np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(Transformer(config).init, deterministic=True), jax.random.key(0), tokens, tokens)

    def fill(path, leaf):
        constants = {"scale": np.ones, "bias": np.zeros}
        return jnp.asarray(constants.get(path[-1].key, partial(rng.normal, 0.0, 0.7))(leaf.shape), "float32")

    return jax.tree_util.tree_map_with_path(fill, shapes["params"])


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A work directory with the checkpoints 1, the best by BLEU, 2 and 3, as text."""
    lines = [sentence(100 + number, 6) for number in range(40)]
    vocabularies = VocabularyPair.train(lines, lines, VocabularyConfig(size=110, byte_fallback=False))
    size = vocabularies.source.size
    config = TransformerConfig(
        source_vocab_size=size,
        target_vocab_size=size,
        d_model=16,
        num_heads=2,
        d_ff=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        max_length=40,
        tie_embeddings="none",  # otherwise the model would repeat its last token
    )
    workdir = WorkDirectory(tmp_path_factory.mktemp("work") / "run")
    workdir.write_config({"model": dataclasses.asdict(config), "training": {"evaluation": {"best_metric": "bleu"}}})
    workdir.write_vocabularies(vocabularies)
    with workdir.open_checkpoints(best_metric="bleu") as checkpoints:
        # Seeds whose models translate each sentence of `source` differently.
        for step, seed, bleu in ((1, 54, 9.0), (2, 6, 8.0), (3, 31, 7.0)):
            checkpoints.save(step, {"params": random_params(config, seed)}, {})
            checkpoints.record_scores(step, {"bleu": bleu})
    return str(workdir.path)


@pytest.fixture(scope="session")
def translator(workdir):
    return Translator.from_workdir(workdir)


@pytest.fixture
def broken(workdir, tmp_path):
    """A copy of the work directory, to be damaged."""
    return shutil.copytree(workdir, tmp_path / "broken")


@pytest.fixture
def source(tmp_path):
    """A file of seven sentences, an empty line among them."""
    path = tmp_path / "source.txt"
    path.write_text("".join(f"{line}\n" for line in lines_of_source()), encoding="utf-8")
    return path


def lines_of_source():
    return [sentence(number, length) for number, length in enumerate([3, 7, 1, 0, 5, 2, 4])]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line and returns its standard output; standard input is `given`."""

    def run(*arguments, given=""):
        data = given if isinstance(given, bytes) else given.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fail(run, capsys):
    """Runs a command line that must fail, and returns its standard error: one line, without a traceback."""

    def fail(*arguments, given=""):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments, given=given)
        # Python writes the text that `sys.exit` is given to standard error, and exits with status 1.
        code = stopped.value.code
        written = capsys.readouterr()
        assert code, "exit status 0"
        message = code if isinstance(code, str) else written.err.removesuffix("\n")
        assert "\n" not in message and "Traceback" not in message
        assert message.startswith("flax-transformer")
        return message

    return fail


@pytest.fixture
def unloaded(monkeypatch):
    """Makes the test fail if a model is loaded, because mistakes must be found before that."""

    def load(*arguments, **options):
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr(TrainedModel, "load", load)
