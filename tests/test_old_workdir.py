"""A work directory that version 0.1.0 made translates as it did there, and its training goes on as it would have."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import Experiment
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.workdir import WorkDirectory

# Made by revision f9b1765 on an AMD EPYC with jax 0.10.2: the quick start's config, made small, 1,500 steps on pairs of
# ten words in two scripts, with accents and a zero-width non-joiner. `expected.json` has what that revision made of it:
# translations of 30 sentences with their scores, and the losses of ten more steps.
ARCHIVE = Path(__file__).with_name("workdir_of_0.1.0.tar.xz")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(unpacked):
    return json.loads((unpacked / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("search", [pytest.param("greedy", marks=pytest.mark.slow), "beam"])
def test_it_translates_as_before(unpacked, expected, search):
    settings = {"greedy": BeamSearch(beam_size=1), "beam": BeamSearch(beam_size=4, num_return=2)}[search]
    found = Translator.from_workdir(unpacked / "run").hypotheses(expected["sources"], settings)
    for hypotheses, wanted in zip(found, expected["translations"][search], strict=True):
        assert [each.text for each in hypotheses] == [text for text, _ in wanted]
        # Another processor rounds otherwise.
        assert [each.score for each in hypotheses] == pytest.approx([score for _, score in wanted], abs=1e-3)


@pytest.mark.slow
def test_its_training_goes_on_as_it_would_have(unpacked, expected, tmp_path, monkeypatch):
    folder = shutil.copytree(unpacked, tmp_path / "copy")
    monkeypatch.chdir(folder)  # its config names the text by relative paths
    workdir = WorkDirectory("run")
    config = workdir.read_config()
    config["training"] |= {"steps": 1510, "log_every": 1, "parallelism": "jit"}
    train_and_evaluate(Experiment.from_mapping(config), "run")
    losses = [line["loss"] for line in workdir.read_metrics() if line["kind"] == "train" and line["step"] > 1500]
    assert losses == pytest.approx(expected["losses"], rel=1e-3)
    assert workdir.read_metrics()[-1]["kind"] == "valid"
