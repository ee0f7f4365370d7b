"""Runs commands on a work directory whose model knows languages by code."""

import argparse
import dataclasses
import json
import re

import numpy as np
import pytest
import sacrebleu

from flax_transformer.commands.convert import _describe
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.interop.nllb import to_nllb
from flax_transformer.trained_model import TrainedModel
from tests.commands.conftest import lines_of_source
from tests.languages import CONFIG, language_pair
from tests.small_models import random_params, say, small_model

PAIR = ("--source_language=kan_Knda", "--target_language=eng_Latn")


@pytest.fixture(scope="module")
def model(workdir):
    model = TrainedModel.load(workdir)
    pair = language_pair(model.vocabularies.source)
    sizes = {"source_vocab_size": pair.source.size, "target_vocab_size": pair.target.size}
    config = dataclasses.replace(model.config, **sizes, **CONFIG)
    return TrainedModel(config, random_params(config, 5), pair)


@pytest.fixture(scope="module")
def many(model, tmp_path_factory):
    """Its work directory."""
    path = tmp_path_factory.mktemp("languages") / "work"
    model.save(path)
    return str(path)


@pytest.fixture
def target(tmp_path, source):
    path = tmp_path / "target.txt"
    path.write_text(source.read_text().replace("\n\n", "\na cat\n"))
    return path


def test_options_name_the_languages_of_a_translation(run, many, model, source):
    ours = Translator(model, source_language="kan_Knda", target_language="eng_Latn")
    made = run("translate", "--workdir", many, *PAIR, "--input", source).splitlines()
    assert made == ours.translate(lines_of_source())
    options = ("--workdir", many, PAIR[1], "--format=jsonl", "--alignment")
    line, blank = run("translate", *options, given="kan_Knda a cat\n\n").splitlines()
    assert json.loads(blank)["hypotheses"][0]["alignment"]["weights"] == []
    found = json.loads(line)["hypotheses"][0]
    assert found["tokens"][0] == "eng_Latn" and found["token_log_probs"][0] == 0
    assert found["text"] == ours.translate(["a cat"])[0]


def test_scores_and_evaluations_are_of_the_same_languages(run, many, model, source, target, tmp_path):
    ours = Translator(model, source_language="kan_Knda", target_language="eng_Latn")
    scored = ours.score(lines_of_source(), target.read_text().splitlines())
    rows = run("score", "--workdir", many, *PAIR, "--source", source, "--target", target).splitlines()
    np.testing.assert_allclose(
        [float(row.split("\t")[1]) for row in rows], [each.log_prob for each in scored], atol=1e-4
    )
    inputs = ("--source", source, "--reference", target, "--translations", tmp_path / "translations")
    run("evaluate", "--workdir", many, *PAIR, *inputs)
    assert (tmp_path / "translations").read_text().splitlines() == ours.translate(lines_of_source())


def test_each_reference_may_name_the_language_into_which_its_source_is_translated(run, many, model, source, tmp_path):
    lines = lines_of_source()
    codes = [("eng_Latn", "fra_Latn")[number % 2] for number in range(len(lines))]
    (tmp_path / "named").write_text("".join(f"{code} a cat\n" for code in codes))
    inputs = ("--source", source, "--reference", tmp_path / "named", "--translations", tmp_path / "translations")
    report = json.loads(run("evaluate", "--workdir", many, PAIR[0], *inputs, "--output=json"))
    both = {
        code: Translator(model, source_language="kan_Knda", target_language=code).translate(lines)
        for code in ("eng_Latn", "fra_Latn")
    }
    expected = [both[code][number] for number, code in enumerate(codes)]
    assert (tmp_path / "translations").read_text().splitlines() == expected
    assert expected not in both.values()
    chrf = sacrebleu.corpus_chrf(expected, [["a cat"] * len(lines)]).score
    assert report["chrf"] == pytest.approx(chrf, abs=0.01)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ((PAIR[0],), r"the model needs the language of .*: give source_language and target_language"),
        ((PAIR[1],), r"the model needs the language of .*: give source_language and target_language"),
        (("--target_language=eng_Cyrl", PAIR[0]), "knows no language eng_Cyrl: did you mean eng_Latn"),
    ],
)
def test_a_language_that_lacks_or_is_unknown_is_an_error_before_the_output_is_touched(
    fail, many, source, tmp_path, options, match
):
    (tmp_path / "old").write_text("kept")
    for verb, inputs in (
        ("translate", ("--input", source, "--output", tmp_path / "old")),
        ("evaluate", ("--source", source, "--reference", source, "--translations", tmp_path / "old")),
        ("score", ("--source", source, "--target", source, "--output", tmp_path / "old")),
    ):
        assert re.search(match, fail(verb, "--workdir", many, *options, *inputs))
        assert (tmp_path / "old").read_text() == "kept"


def test_a_model_that_knows_its_languages_and_one_that_is_told_them_are_an_ensemble(run, many, model, source, tmp_path):
    dataclasses.replace(model, vocabularies=model.vocabularies.speaking("kan_Knda", "eng_Latn")).save(tmp_path / "own")
    both = run("translate", "--workdir", many, tmp_path / "own", *PAIR, "--input", source)
    assert both == run("translate", "--workdir", many, *PAIR, "--input", source)


def test_languages_are_an_error_where_no_model_knows_any(fail, run, workdir, translator, many, source, tmp_path):
    assert "does not know languages by code: leave it out" in fail(
        "translate", "--workdir", workdir, *PAIR, given="a\n"
    )
    # A comparison with a model that knows none is possible.
    translations = translator.translate(lines_of_source())
    (tmp_path / "theirs").write_text("".join(f"{text}\n" for text in translations))
    inputs = ("--source", source, "--reference", tmp_path / "theirs", "--output=json")
    report = json.loads(run("evaluate", "--workdir", many, *PAIR, "--compare", workdir, *inputs))
    assert report["bleu"] < report["compare"]["bleu"] == pytest.approx(100)


def test_a_model_is_converted_by_the_command(run, fail, model, many, tmp_path):
    to_nllb(model, tmp_path / "downloaded")
    said = run("convert", "from-nllb", tmp_path / "downloaded", tmp_path / "work")
    assert "--source_language=CODE --target_language=CODE" in said and "it knows 4 languages: eng_Latn" in said
    run("convert", "to-nllb", tmp_path / "work", tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("downloaded", "again")]
    assert weights[0] == weights[1]
    mistakes = [
        (("from-nllb", tmp_path / "downloaded", tmp_path / "new", "--revision=main"), "--revision applies to models"),
        (("from-nllb", "nowhere", tmp_path / "new"), "nowhere is not a folder"),
        (("from-nllb", many, tmp_path / "new"), "is a work directory already"),
        (("from-nllb", "a", "b", "--checkpoint=best"), "--checkpoint applies to work directories, not to from-nllb"),
    ]
    for arguments, match in mistakes:
        assert match in fail("convert", *arguments)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def told(tmp_path):
    """The work directory of a model that a token before the source tells what to write."""
    lines = [say(number, 4) for number in range(40)]
    config = VocabularyConfig(size=60, byte_fallback=False, user_symbols=(">>kan<<", ">>tel<<"))
    small_model(VocabularyPair.train(lines, lines, config), 3).save(tmp_path / "told")
    return str(tmp_path / "told")


def test_an_option_names_what_a_token_before_the_source_tells(run, told, many, tmp_path):
    source = tmp_path / "source"
    source.write_text("the cat\n>>tel<< the cat\n")
    own = run("translate", "--workdir", told, given=">>kan<< the cat\n>>tel<< the cat\n")
    assert run("translate", "--workdir", told, "--target_language=kn", "--input", source) == own
    first, second = own.splitlines()
    assert first != second
    # Beside a model that names both languages, each takes what it needs.
    (tmp_path / "plain").write_text("the cat\n")
    pair = ("--source_language=eng_Latn", "--target_language=kan_Knda", "--output=json")
    inputs = ("--source", tmp_path / "plain", "--reference", tmp_path / "plain")
    report = json.loads(run("evaluate", "--workdir", many, "--compare", told, *pair, *inputs))
    chrf = sacrebleu.corpus_chrf([first], [["the cat"]]).score
    assert report["compare"]["chrf"] == pytest.approx(chrf, abs=0.01)


def test_the_report_of_a_conversion_says_how_to_name_the_language(told):
    said = _describe(TrainedModel.load(told), argparse.Namespace(way="from-marian", target="runs/told"))
    assert "--target_language=CODE --input=FILE" in said and "it writes 2 languages: give --target_language" in said
