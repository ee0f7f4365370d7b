"""Provides work directories with small random models, and fixtures that run commands on them."""

import dataclasses
import io
import shutil
import sys

import pytest

from flax_transformer.__main__ import main
from flax_transformer.decoding.translator import Translator
from flax_transformer.trained_model import TrainedModel
from flax_transformer.workdir import WorkDirectory
from tests.small_models import random_params, say, small_config, word_vocabularies


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A work directory with the checkpoints 1, the best by BLEU, 2 and 3, as text."""
    vocabularies = word_vocabularies()
    config = small_config(vocabularies.source.size, max_length=40)
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
    return [say(number, length) for number, length in enumerate([3, 7, 1, 0, 5, 2, 4])]


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
