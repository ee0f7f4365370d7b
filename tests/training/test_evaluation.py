import dataclasses
import functools

import jax
import numpy as np
import pytest
import sacrebleu

from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.pipeline import PackedCorpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import DataConfig, EvaluationConfig, VocabularyConfig
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens
from flax_transformer.trained_model import TrainedModel
from flax_transformer.training.evaluation import Evaluation, Scores, score_translations, show_samples, show_test
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import Objective, eval_step
from tests.languages import CONFIG, language_pair
from tests.small_models import random_params

REFERENCES = ["The cat sat on the mat.", "A dog ran over the green hill today.", "Three birds sang a short song."]


def test_references_get_the_maximum_scores():
    scores = score_translations(REFERENCES, REFERENCES, 0.25)
    assert (scores.bleu, scores.chrf, scores.exact_match) == pytest.approx((100, 100, 100))
    assert (scores.loss, scores.sentences) == (0.25, 3)


def test_exact_match_requires_equal_texts():
    others = [REFERENCES[0].lower(), REFERENCES[1], REFERENCES[2] + "!"]
    assert score_translations(others, REFERENCES, 0.0).exact_match == pytest.approx(100 / 3)


def test_spaces_that_no_vocabulary_keeps_do_not_hinder_an_exact_match():
    spaced = [REFERENCES[0].replace(" ", "  "), f" {REFERENCES[1]} ", REFERENCES[2]]
    assert score_translations(REFERENCES, spaced, 0.0).exact_match == 100


def test_bleu_is_sacrebleu_s_and_says_how_it_was_computed():
    others = ["the cat sat on the mat.", "A dog ran over a hill.", "Three birds sang a song."]
    scores = score_translations(others, REFERENCES, 0.0)
    assert scores.bleu == sacrebleu.corpus_bleu(others, [REFERENCES]).score
    assert scores.chrf == sacrebleu.corpus_chrf(others, [REFERENCES]).score
    assert 0 < scores.bleu < 100 and "case:mixed" in scores.signature and sacrebleu.__version__ in scores.signature


def test_a_missing_translation_is_an_error():
    with pytest.raises(ValueError):
        score_translations(REFERENCES[:2], REFERENCES, 0.0)


TEXT = ParallelText(
    ["a", "b c", "d a b", "c", "b b", "d", "a c d", "b a b"],
    ["u", "d t", "q u d", "t t t t t", "d d", "q", "u t q", "d u d"],  # one target is too long for a row
    [1] * 8,
)
DATA = DataConfig(rows=2, source_slots=8, target_slots=8)
SETTINGS = EvaluationConfig(beam_size=1)


@pytest.fixture(scope="module")
def vocabularies():
    return VocabularyPair.train(
        TEXT.source, TEXT.target, VocabularyConfig(size=24, byte_fallback=False, model_type="char")
    )


@pytest.fixture(scope="module")
def config(vocabularies):
    size = vocabularies.source.size
    return TransformerConfig(
        source_vocab_size=size, target_vocab_size=size, d_model=8, num_heads=2, d_ff=12, num_encoder_layers=1,
        num_decoder_layers=1, max_length=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(config):
    tokens = np.ones((1, 2), "int32")
    init = functools.partial(Transformer(config).init, deterministic=True)
    return jax.jit(init)(jax.random.key(0), tokens, tokens)["params"]


@pytest.fixture(scope="module")
def eval_on_one(config):
    return Parallelism("jit").compile(
        functools.partial(eval_step, objective=Objective(model=Transformer(config))), donate_state=False
    )


@pytest.fixture(scope="module")
def expected_loss(vocabularies, config, params, eval_on_one):
    """The mean cross-entropy of the sentence pairs that fit, each in a batch of its own."""
    cross_entropy, tokens = 0.0, 0.0
    for pair in zip(TEXT.source, TEXT.target, strict=True):
        source, target = (vocabularies.source.encode([text])[0] for text in pair)
        if max(len(source), len(target)) <= config.max_length:
            sides = []
            for ids in (source, target):
                row = np.zeros((2, 8), "int32")  # and an empty one
                row[0, : len(ids)] = ids
                sides.append(Tokens.from_ids(row, config.pad_id))
            sums = eval_on_one(params, Batch(*sides))
            cross_entropy, tokens = cross_entropy + float(sums.cross_entropy), tokens + float(sums.tokens)
    return cross_entropy / tokens


def packed(vocabularies, config, **options):
    return PackedCorpus.from_text(TEXT, vocabularies, DATA, max_length=config.max_length, **options)


def test_the_loss_covers_all_tokens_and_translations_equal_the_translator_s(
    vocabularies, config, params, eval_on_one, expected_loss
):
    corpus = packed(vocabularies, config)
    assert corpus.too_long.tolist() == [3] and corpus.num_rows % DATA.rows
    scores, translations = Evaluation(TEXT, corpus, vocabularies, config, SETTINGS, eval_on_one).score(params)
    assert scores.loss == pytest.approx(expected_loss, rel=1e-5)
    translator = Translator(TrainedModel(config, params, vocabularies))
    assert translations == translator.translate(TEXT.source, BeamSearch(beam_size=1))
    assert scores.sentences == 8  # pairs that are too long for the loss are translated anyway


def test_a_source_that_is_longer_than_the_learned_positions_is_translated_in_parts(vocabularies, config):
    config = dataclasses.replace(config, positions="learned")
    model, tokens = Transformer(config), np.ones((1, 2), "int32")
    params = jax.jit(functools.partial(model.init, deterministic=True))(jax.random.key(0), tokens, tokens)["params"]
    text = ParallelText([*TEXT.source, "a b c d a b c d"], [*TEXT.target, "u"], [1] * 9)
    corpus = PackedCorpus.from_text(text, vocabularies, DATA, max_length=config.max_length)
    assert corpus.source.lengths.max() > config.max_length
    evaluate = jax.jit(functools.partial(eval_step, objective=Objective(model=model)))
    scores, translations = Evaluation(text, corpus, vocabularies, config, SETTINGS, evaluate).score(params)
    assert scores.sentences == len(translations) == 9 and np.isfinite(scores.loss)


def test_evaluate_sentences_limits_the_translations_also_under_pmap(vocabularies, config, params, expected_loss):
    eight = Parallelism("pmap")
    evaluate = eight.compile(
        functools.partial(eval_step, objective=Objective(model=Transformer(config))), donate_state=False
    )
    corpus = packed(vocabularies, config, multiple=eight.num_devices)
    evaluation = Evaluation(TEXT, corpus, vocabularies, config, SETTINGS, evaluate, sentences=5)
    scores, translations = evaluation.score(eight.place(params))
    assert scores.sentences == len(translations) == 5
    assert scores.loss == pytest.approx(expected_loss, rel=1e-5)


def test_each_target_is_translated_into_the_language_that_it_names(vocabularies, config):
    pair = language_pair(vocabularies.source).speaking("kan_Knda", "")
    sizes = {"source_vocab_size": pair.source.size, "target_vocab_size": pair.target.size}
    config = dataclasses.replace(config, tie_embeddings="none", **sizes, **CONFIG)
    params = random_params(config, 3)
    targets = [f"{('eng_Latn', 'fra_Latn')[number % 2]} {text}" for number, text in enumerate(TEXT.target)]
    text = ParallelText([*TEXT.source, ""], [*targets, ""], [1] * 9)  # a blank target names none
    corpus = PackedCorpus.from_text(text, pair, DATA, max_length=config.max_length)
    assert corpus.blank == (8,)
    evaluate = jax.jit(functools.partial(eval_step, objective=Objective(model=Transformer(config))))
    evaluation = Evaluation(text, corpus, pair, config, SETTINGS, evaluate)
    assert list(evaluation.references) == [*TEXT.target, ""]
    _, translations = evaluation.score(params)
    translator = Translator(TrainedModel(config, params, pair))
    english, french = (
        translator.speaking(target_language=code).translate(TEXT.source, evaluation.search)
        for code in ("eng_Latn", "fra_Latn")
    )
    assert english != french
    assert translations == [*((english, french)[number % 2][number] for number in range(8)), ""]


def test_only_the_given_devices_translate(vocabularies, config, params, eval_on_one, monkeypatch):
    given = []

    def translator(model, *, devices):
        given.append(devices)
        return Translator(model, devices=devices)

    monkeypatch.setattr("flax_transformer.training.evaluation.Translator", translator)
    one = jax.local_devices()[:1]
    Evaluation(TEXT, packed(vocabularies, config), vocabularies, config, SETTINGS, eval_on_one, devices=one).score(
        params
    )
    assert given == [one]


def test_references_stay_as_they_were_written(vocabularies):
    target = language_pair(vocabularies.source).target
    written = ["eng_Latn  a\u200bb\tc ", "a\u00a0☃", "", " "]
    languages, texts = target.split_languages(written)
    assert texts == ["a\u200bb\tc ", "a\u00a0☃", "", " "]
    assert languages == ["eng_Latn ", "", "", ""]
    assert target.fill_languages(languages, texts) == ["eng_Latn ", "", "eng_Latn ", "eng_Latn "]
    assert target.speaking("kan_Knda").fill_languages(languages, texts) == languages  # which have that one
    assert vocabularies.target.split_languages(written) == ([""] * 4, written)


SCORES = Scores(loss=1.23456, bleu=31.44, chrf=55.06, exact_match=97.2, sentences=500, signature="case:mixed")
NAMES = ("source", "reference", "translation")


@pytest.mark.parametrize("count", [0, 2, 5])
def test_as_many_samples_as_requested_are_shown_below_each_other(count, capsys):
    show_samples(["a", "b", "c"], ["A", "B", "C"], ["x", "y", "z"], count)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    triples = zip("abc", "ABC", "xyz", strict=True)
    expected = [[name, text] for triple in triples for name, text in zip(NAMES, triple, strict=True)]
    assert lines == expected[: 3 * count]


@pytest.mark.parametrize(
    ("metric", "last"),
    [
        ("exact_match", "exact match: 97.2 % of 500 held-out phrases, trained in 83 s"),
        ("bleu", "BLEU: 31.4 on 500 sentences, trained in 83 s"),
        ("loss", "loss: 1.235 on 500 sentences, trained in 83 s"),
    ],
)
def test_the_last_line_shows_the_score_that_chose_the_checkpoint(metric, last, capsys):
    show_test("checkpoint 70", SCORES, search=BeamSearch(beam_size=1), metric=metric, seconds=83.2)
    *others, closing = capsys.readouterr().out.splitlines()
    assert closing == last
    assert "checkpoint 70, greedy search" in "\n".join(others) and "case:mixed" in "\n".join(others)
