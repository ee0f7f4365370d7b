"""Continues to train a small model that knows languages by code."""

import dataclasses

import jax
import numpy as np
import pytest

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.interop.nllb import from_nllb, to_nllb
from flax_transformer.monitoring.report import Report
from flax_transformer.new_languages import start_new_languages
from flax_transformer.trained_model import TrainedModel, param_shapes
from flax_transformer.training.loop import train_and_evaluate
from tests.languages import CONFIG, language_pair
from tests.training.conftest import STEPS, lines_of, losses_of, with_training, without_held_out

NEW = {"data.source_language": "tcy_Knda", "data.target_language": "eng_Latn", "data.new_language_like": "kan_Knda"}


@pytest.fixture(scope="module")
def start(experiment, tmp_path_factory):
    """A converted model of random parameters, in a work directory."""
    path = tmp_path_factory.mktemp("start")
    with open(experiment.data.train.removeprefix("files:").split(",")[0]) as file:
        lines = file.read().splitlines()
    pair = language_pair(VocabularyPair.train(lines, lines, VocabularyConfig(size=50, byte_fallback=False)).source)
    sizes = {"source_vocab_size": pair.source.size, "target_vocab_size": pair.target.size}
    config = dataclasses.replace(experiment.model, dropout_rate=0.0, **sizes, **CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype("float32"), param_shapes(config))
    to_nllb(TrainedModel(config, params, pair), path / "downloaded")
    from_nllb(path / "downloaded", path / "work")
    return path / "work"


@pytest.fixture(scope="module")
def finetuning(experiment, start):
    """The experiment that starts from it, from a language that it does not know; its dropout is its own."""
    model = dataclasses.replace(TrainedModel.load(start).config, dropout_rate=0.2)
    experiment = dataclasses.replace(without_held_out(experiment), model=model).changed(NEW)
    return with_training(
        experiment,
        start_from=str(start),
        **{"schedule.name": "constant", "schedule.learning_rate": 1e-2, "schedule.warmup_steps": 1},
    )


def latest(path):
    return TrainedModel.load(path, step="latest")


@pytest.mark.parametrize("layout", ["jit", *(pytest.param(each, marks=pytest.mark.slow) for each in ("pmap", "fsdp"))])
def test_a_new_language_begins_with_the_embedding_of_a_known_one(finetuning, start, tmp_path, layout):
    still = with_training(finetuning, steps=1, **{"schedule.learning_rate": 0.0, "parallelism.layout": layout})
    train_and_evaluate(still, tmp_path)
    before, after = TrainedModel.load(start), latest(tmp_path)
    source = after.vocabularies.source
    ids = {piece: number for number, piece in enumerate(source.pieces(range(source.size)))}
    old, new = (np.asarray(model.params["shared_embedding"]["embedding"]) for model in (before, after))
    np.testing.assert_array_equal(new[ids["tcy_Knda"]], old[ids["kan_Knda"]])
    same = np.arange(source.size) != ids["tcy_Knda"]
    np.testing.assert_array_equal(new[same], old[same])
    assert (source.language, after.vocabularies.target.language) == ("tcy_Knda", "eng_Latn")


def test_the_mean_of_all_languages_can_begin_a_new_one_in_matrices_that_grow(start):
    model = TrainedModel.load(start)
    pair = VocabularyPair(model.vocabularies.source, model.vocabularies.target)
    for code in ("aaa_Latn", "bbb_Latn", "ccc_Latn"):  # two rows are not in use
        pair = pair.speaking(code, "", add=True)
    size, known = model.config.source_vocab_size, sorted(model.vocabularies.source.language_ids)
    embedding = np.asarray(model.params["shared_embedding"]["embedding"])
    params = {
        "shared_embedding": {"embedding": embedding},
        "output_kernel": embedding.T,
        "output_bias": embedding[:, 0],
    }
    grown = start_new_languages(dataclasses.replace(model, params=params), pair, "mean")
    assert pair.source.size == size + 1
    mean = embedding[known].mean(axis=0)
    np.testing.assert_allclose(grown["shared_embedding"]["embedding"][-3:], [mean] * 3, rtol=1e-6)
    np.testing.assert_array_equal(grown["output_kernel"].T, grown["shared_embedding"]["embedding"])
    np.testing.assert_array_equal(grown["output_bias"], grown["output_kernel"][0])
    np.testing.assert_array_equal(grown["output_kernel"][:, : size - 2], embedding.T[:, : size - 2])
    with pytest.raises(ValueError, match="knows no language deu_Latn"):
        start_new_languages(model, pair, "deu_Latn")


class Stopped(Exception):
    pass


def finetune_in_two_parts(finetuning, path, monkeypatch, stop):
    done = iter(range(stop))

    def step_done(report):
        if next(done, None) is None:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Report, "step_done", step_done)
        train_and_evaluate(finetuning, path)
    train_and_evaluate(finetuning, path)


def check_finetuning(finetuning, tmp_path, monkeypatch, steps, share):
    """Trained in one go and in two, the loss falls to a share; then exported, and translated with by transformers."""
    experiment = with_training(finetuning, steps=steps)
    train_and_evaluate(experiment, tmp_path / "whole")
    losses = [loss for _, loss in losses_of(tmp_path / "whole")]
    assert np.mean(losses[-3:]) < share * np.mean(losses[:3])
    finetune_in_two_parts(experiment, tmp_path / "parts", monkeypatch, stop=steps // 2 + 1)
    assert len(lines_of(tmp_path / "parts", "start")) == 2
    model = latest(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, latest(tmp_path / "parts").params, model.params)
    to_nllb(model, tmp_path / "exported")
    again = from_nllb(tmp_path / "exported", tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.vocabularies.fingerprint() == model.vocabularies.fingerprint()
    transformers = pytest.importorskip("transformers", reason="`make peers` installs it")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    lines = ["one two", "seven", "nine three"]
    batch = tokenizer(lines, return_tensors="pt", padding=True)
    (ids,) = model.vocabularies.source.encode(lines[:1])
    assert batch["input_ids"][0].tolist() == [*ids, *[model.config.pad_id] * (batch["input_ids"].shape[1] - len(ids))]
    search = BeamSearch(beam_size=1, max_length=11)
    ours = [found[0].text for found in Translator(model).hypotheses(lines, search)]
    made = theirs.generate(**batch, num_beams=1, max_length=12)  # the start token counts there
    assert tokenizer.batch_decode(made, skip_special_tokens=True) == ours
    return ours


@pytest.mark.slow
@pytest.mark.peers
def test_finetuning_goes_on_bit_for_bit_and_transformers_translates_with_the_result(finetuning, tmp_path, monkeypatch):
    check_finetuning(finetuning, tmp_path, monkeypatch, STEPS, 0.97)


@pytest.mark.peers
@pytest.mark.slow
def test_the_same_of_200_steps_which_learn_the_task(finetuning, tmp_path, monkeypatch):
    assert check_finetuning(finetuning, tmp_path, monkeypatch, 200, 0.5)[1] == "seven"


def test_an_unknown_language_is_an_error_before_anything_is_written(finetuning, tmp_path):
    unknown = finetuning.changed({"data.new_language_like": ""})
    with pytest.raises(ValueError, match="knows no language tcy_Knda: did you mean kan_Knda"):
        train_and_evaluate(unknown, tmp_path)
    with pytest.raises(ValueError, match="knows no language kan: did you mean kan_Knda"):
        train_and_evaluate(finetuning.changed({"data.new_language_like": "kan"}), tmp_path)
    # After the correction the same command works, and the languages cannot be changed later.
    train_and_evaluate(with_training(finetuning, steps=1), tmp_path)
    with pytest.raises(ValueError, match="was begun with data.source_language = 'tcy_Knda'"):
        train_and_evaluate(with_training(finetuning, steps=1).changed({"data.source_language": "kan_Knda"}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["embeddings", pytest.param("encoder", marks=pytest.mark.slow)])
def test_frozen_parts_stay_with_a_new_language_too(finetuning, start, tmp_path, freeze):
    train_and_evaluate(with_training(finetuning, freeze=freeze, steps=2), tmp_path)
    before = start_new_languages(TrainedModel.load(start), latest(tmp_path).vocabularies, "kan_Knda")
    name = "shared_embedding" if freeze == "embeddings" else freeze
    after = latest(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    assert not np.array_equal(after["decoder"]["norm"]["scale"], before["decoder"]["norm"]["scale"])


def test_a_language_to_begin_like_needs_a_model_to_start_from(experiment, tmp_path):
    with pytest.raises(ValueError, match="new_language_like is kan_Knda, but there is no model that knows languages"):
        train_and_evaluate(experiment.changed({"data.new_language_like": "kan_Knda"}), tmp_path)


def test_languages_without_a_model_that_knows_them_are_an_error(experiment, tmp_path):
    with pytest.raises(ValueError, match="this model does not know languages by code: leave it out"):
        train_and_evaluate(experiment.changed({"data.source_language": "kan_Knda"}), tmp_path)
