"""Tests the translator with a small model of random parameters.

Its translations mean nothing, but they depend on every token of the source, so that any mix-up changes them.
"""

import dataclasses
import io
import math
import warnings

import jax
import numpy as np
import pytest

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.slots import advance
from flax_transformer.decoding.translator import Translation, Translator
from flax_transformer.decoding.unreadable import UnreadableWarning
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.trained_model import TrainedModel

GREEDY = BeamSearch(beam_size=1, extra_length=4)
BEAM = BeamSearch(beam_size=3, num_return=3, extra_length=4)
SAMPLING = Sampling(num_return=2, extra_length=4)
SHORT = ["the cat", "a dog sat", "red mouse", "up", "slow cat"]


@pytest.fixture(scope="module")
def first_run(translator, sentences):
    """The sentences' translations, and how many programs they took."""
    before = advance._cache_size()
    return translator.translate(sentences, GREEDY), advance._cache_size() - before


@pytest.fixture(scope="module")
def translations(first_run):
    return first_run[0]


@pytest.fixture(scope="module")
def short_sighted(make_translator):
    """Knows sentences of at most eight tokens."""
    return make_translator(max_length=8)


def test_every_line_gets_exactly_its_own_translation(sentences, translations):
    assert len(translations) == len(sentences)
    assert len(set(translations)) == len(set(sentences))
    assert all(translation and "\n" not in translation for translation in translations)


def test_sentences_that_overflow_float16_are_counted_in_a_warning(make_translator):
    translator = make_translator(dtype="float16")
    (cat,) = {*translator.vocabularies.source.encode(["cat"])[0]} - {translator.config.eos_id}
    embedding = translator.engine.ensemble.models[0].params["source_embedding"]
    embedding["embedding"] = embedding["embedding"].at[cat].set(1e5)  # infinite in float16
    with pytest.warns(
        UserWarning, match=r"^translations of 2 of 5 sentences end early, .* model.dtype, which is float16, to float32"
    ):
        found = translator.translate(SHORT, GREEDY)
    assert [not text for text in found] == ["cat" in sentence for sentence in SHORT]


def test_a_text_of_many_lengths_needs_one_or_two_programs(translator, sentences, first_run):
    lengths = {len(ids) for ids in translator.vocabularies.source.encode(sentences)}
    assert len(lengths) > 5 and first_run[1] <= 2


def test_translations_come_in_the_order_of_their_sentences(translator, sentences, translations):
    order = np.random.default_rng(0).permutation(len(sentences))
    shuffled = translator.translate([sentences[number] for number in order], GREEDY)
    assert shuffled == [translations[number] for number in order]


def test_empty_and_blank_lines_stay_empty_among_the_others(translator, sentences, translations):
    blank = ["", " ", "\t", "\u3000 ", "\n", "\x85"]
    lines = [line for sentence in sentences for line in (*blank, sentence)]
    expected = [line for translation in translations for line in (*[""] * len(blank), translation)]
    assert translator.translate(lines, GREEDY) == expected
    for settings in (GREEDY, BEAM, SAMPLING):
        assert translator.hypotheses(["", " "], settings) == [[Translation()]] * 2
    assert translator.translate([]) == [] and translator.score([], []) == [] and translator.align([], []) == []


@pytest.mark.parametrize("penalty", ["paper", "length"])
def test_an_empty_translation_can_be_scored_and_aligned(translator, penalty):
    (scored,) = translator.score([""], [Translation()], GREEDY.replace(length_penalty=penalty))
    assert (scored.ids, scored.log_prob, scored.score) == ((), 0.0, 0.0)
    assert translator.align([""], [Translation()])[0].weights.shape == (0, 1)


def test_any_content_of_a_line_gets_a_translation_and_does_not_affect_others(translator):
    odd = [
        "\x00",
        "\x1b[31m cat",
        "a\nb\rc",
        "\u200b",
        "\ufeff",
        "😀 👩‍👩‍👧 cat",
        "ಕನ್ನಡ",
        "\ud800 cat",
        "▁",
        "x" * 60,
        "\U0010ffff",
    ]
    with pytest.warns(UnreadableWarning):
        found = translator.translate([line for other in odd for line in (other, "the cat")], GREEDY)
    assert found[1::2] == translator.translate(["the cat"], GREEDY) * len(odd)
    assert all(isinstance(translation, str) for translation in found[::2])


def check_numbers(translation, settings):
    """The log-probabilities of tokens sum to that of the output, and tokens and text agree."""
    assert len(translation.token_log_probs) == len(translation.ids) == len(translation.tokens)
    assert translation.tokens[-1] == "</s>" and translation.tokens.count("</s>") == 1
    assert translation.log_prob == pytest.approx(sum(translation.token_log_probs), abs=1e-4)
    assert translation.score == pytest.approx(translation.log_prob / settings.penalty(len(translation.ids)), abs=1e-4)


@pytest.mark.parametrize("several", [False, True], ids=["one model", "ensemble"])
@pytest.mark.parametrize("settings", [GREEDY, BEAM, SAMPLING], ids=["greedy", "beam", "sampling"])
def test_scoring_a_translation_gives_the_numbers_it_came_with(translator, make_translator, settings, several):
    if several:
        translator = Translator([model_of(translator), model_of(make_translator(4, d_model=8))])
        settings = settings.replace(alpha=1.0, length_penalty="length")
    found = translator.hypotheses(SHORT, settings)
    pairs = [(source, each) for source, hypotheses in zip(SHORT, found, strict=True) for each in hypotheses]
    assert len(pairs) == len(SHORT) * settings.num_return
    lengths = translator.vocabularies.source.encode(SHORT)
    # Ends that the limit forced have their own log-probability, like any other.
    assert any(len(each.ids) == len(ids) + 4 for ids, (each, *_) in zip(lengths, found, strict=True))
    for (_, each), scored in zip(pairs, translator.score(*zip(*pairs, strict=True), settings), strict=True):
        check_numbers(each, settings)
        assert scored.text == each.text and scored.ids == each.ids and scored.tokens == each.tokens
        np.testing.assert_allclose(scored.token_log_probs, each.token_log_probs, atol=1e-4)
        assert scored.score == pytest.approx(each.score, abs=1e-4)
    for hypotheses in found:
        if isinstance(settings, BeamSearch):
            scores = [each.score for each in hypotheses]
            assert scores == sorted(scores, reverse=True) and len({each.ids for each in hypotheses}) == len(scores)
    assert translator.translate(SHORT, settings) == [hypotheses[0].text for hypotheses in found]


def test_a_text_is_scored_with_the_tokens_of_the_vocabulary(translator):
    (scored,) = translator.score(["the cat"], ["a dog"])
    assert list(scored.ids) == translator.vocabularies.target.encode(["a dog"])[0] and scored.text == "a dog"
    # How probable it is depends on the source.
    assert translator.score(["red mouse"], ["a dog"])[0].log_prob != pytest.approx(scored.log_prob, abs=1e-2)


def test_an_ensemble_of_twice_the_same_model_translates_like_the_model(translator):
    twice = Translator([model_of(translator)] * 2)
    assert twice.translate(SHORT, GREEDY) == translator.translate(SHORT, GREEDY)
    assert twice.config == translator.config


def test_an_ensemble_without_models_or_with_different_vocabularies_is_an_error(translator, make_model, say):
    with pytest.raises(ValueError, match="at least one model"):
        Translator([])
    lines = [say(200 + number, 6) for number in range(40)]
    others = VocabularyPair.train(lines, lines, VocabularyConfig(size=105, byte_fallback=False))
    other = TrainedModel(*make_model(others.source.size), others)
    with pytest.raises(ValueError, match="model 2 has a different vocabulary"):
        Translator([model_of(translator), other])
    ends_otherwise = dataclasses.replace(translator.config, eos_id=3)
    with pytest.raises(ValueError, match=r"model 2 has pad_id, start_id and eos_id \(0, 1, 3\), model 1 has \(0, 1, 2"):
        Translator([model_of(translator), TrainedModel(ends_otherwise, translator.params, translator.vocabularies)])
    with pytest.raises(ValueError, match="105 source and 105 target pieces, but the model has 110 and 110"):
        TrainedModel(translator.config, translator.params, others)


def model_of(translator):
    return TrainedModel(translator.config, translator.params, translator.vocabularies)


def test_samples_depend_on_the_seed_and_not_on_other_sentences_or_batches(make_translator, translator, short_sighted):
    found = translator.hypotheses(SHORT, SAMPLING, seed=1)
    assert found == translator.hypotheses(SHORT, SAMPLING, seed=1) != translator.hypotheses(SHORT, SAMPLING, seed=2)
    assert all(first.ids != second.ids for first, second in found[:3])
    assert translator.translate(["the cat"] * 5, SAMPLING) != translator.translate(["the cat"], SAMPLING) * 5
    ids = [[each.ids for each in hypotheses] for hypotheses in found]
    # Empty sentences, and sentences of many parts, do not shift the keys of others; batches have other sizes.
    small = make_translator(batch_tokens=16)
    mixed = small.hypotheses(["", *SHORT[1:3], "a black cat runs on", "up"], SAMPLING, seed=1)
    assert [[each.ids for each in hypotheses] for hypotheses in mixed[1:3]] == ids[1:3]
    with pytest.warns(UserWarning, match="is longer than"):
        mixed = short_sighted.hypotheses([" ".join(SHORT), *SHORT[1:]], SAMPLING, seed=1)
    assert [[each.ids for each in hypotheses] for hypotheses in mixed[1:]] == ids[1:]


def test_translations_begin_with_their_prefixes(translator):
    prefixes = ["", "the dog", "", "white mouse runs", ""]
    found, free = translator.hypotheses(SHORT, BEAM, prefixes=prefixes), translator.hypotheses(SHORT, BEAM)
    for hypotheses, prefix, others in zip(found, prefixes, free, strict=True):
        begun = tuple(translator.vocabularies.target.encode([prefix])[0][:-1])
        assert all(each.ids[: len(begun)] == begun and each.text.startswith(prefix) for each in hypotheses)
        if not prefix:
            assert [each.ids for each in hypotheses] == [each.ids for each in others]


def test_banned_pieces_do_not_occur(translator):
    usual = translator.hypotheses(SHORT, GREEDY)
    banned = {usual[0][0].ids[0], usual[1][0].ids[1]} - {2}
    for (each,) in translator.hypotheses(SHORT, GREEDY.replace(banned=tuple(banned))):
        assert not banned & set(each.ids)


def test_a_sentence_that_is_too_long_is_split_with_a_warning_and_others_are_not(short_sighted):
    encode = short_sighted.vocabularies.source.encode
    parts = ["the cat sat.", "a dog runs.", "is it red?"]
    assert all(len(ids) <= 8 for ids in encode(parts)) and len(encode([" ".join(parts[:2])])[0]) > 8
    with pytest.warns(
        UserWarning, match=r'^a sentence of \d+ tokens \("the cat sat\. a dog .*…"\) is longer than'
    ) as told:
        found = short_sighted.translate(["up", " ".join(parts), "red"], GREEDY)
    assert len(told) == 1 and "model.max_length = 8: it is translated in 3 parts" in str(told[0].message)
    up, *own, red = short_sighted.translate(["up", *parts, "red"], GREEDY)
    assert found == [up, " ".join(own), red]


def test_a_sentence_of_the_maximum_length_is_not_split(short_sighted):
    encode = short_sighted.vocabularies.source.encode
    exact = next(" ".join(["up"] * count) for count in range(9) if len(encode([" ".join(["up"] * count)])[0]) == 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short_sighted.translate([exact], GREEDY)
    with pytest.warns(UserWarning, match="a sentence of 9 tokens .* in 2 parts"):
        short_sighted.translate([f"{exact} up"], GREEDY)


def test_a_line_of_ten_thousand_words_gets_a_translation(make_translator, say):
    line, translator = say(7, 10_000), make_translator(max_length=128)
    with pytest.warns(UserWarning, match="is longer than model.max_length = 128: it is translated in"):
        found, other = translator.translate([line, "the cat"], GREEDY.replace(max_length=3))
    assert len(found.split()) >= 50 and other == translator.translate(["the cat"], GREEDY.replace(max_length=3))[0]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING.replace(num_return=1)], ids=["greedy", "sampling"])
def test_the_pieces_of_a_stream_join_to_the_translation(short_sighted, settings):
    for sentence in ("the cat", "", " "):
        pieces = list(short_sighted.stream(sentence, settings, seed=3))
        assert "".join(pieces) == short_sighted.translate([sentence], settings, seed=3)[0]
    assert len(list(short_sighted.stream("the cat", settings))) > 1
    long = "the cat sat. a dog runs. is it red?"
    with pytest.warns(UserWarning, match="in 3 parts"):
        assert "".join(short_sighted.stream(long, settings)) == short_sighted.translate([long], settings)[0]


def test_streaming_with_a_beam_is_an_error_with_a_remedy(translator):
    for settings in (BeamSearch(), SAMPLING):
        with pytest.raises(ValueError, match="one hypothesis, not .: search with a beam of 1"):
            translator.stream("the cat", settings)


def test_a_pair_that_is_longer_than_the_learned_positions_is_an_error_with_its_number(make_translator):
    learned = make_translator(positions="learned", max_length=9)
    with pytest.raises(ValueError, match="pair 1: a side has 13 tokens, and the model has learned 9 positions"):
        learned.score(["the cat", "the cat " * 6], ["a dog", "a dog"])


def test_an_alignment_names_the_tokens_of_both_sides(translator):
    sources = ["the black cat", "up"]
    targets = ["a dog", translator.hypotheses(["up"], GREEDY)[0][0]]
    for source, target, aligned in zip(sources, targets, translator.align(sources, targets), strict=True):
        source_ids = translator.vocabularies.source.encode([source])[0]
        assert list(aligned.source_tokens) == translator.vocabularies.source.pieces(source_ids)
        if isinstance(target, Translation):
            assert aligned.target_tokens == target.tokens
        else:
            assert "".join(aligned.target_tokens) == "▁a▁dog</s>"
        assert aligned.weights.shape == (len(aligned.target_tokens), len(aligned.source_tokens))
        np.testing.assert_allclose(aligned.weights.sum(-1), 1, atol=1e-5)


def test_eight_devices_translate_like_one(make_translator, translator, sentences, translations):
    eight = make_translator(devices=jax.local_devices())
    assert len(jax.local_devices()) == 8
    assert eight.translate(sentences, GREEDY) == translations
    assert eight.translate(SHORT, SAMPLING) == translator.translate(SHORT, SAMPLING)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(BeamSearch(beam_size=2, extra_length=4), marks=pytest.mark.slow), Sampling(mbr=3, extra_length=4)],
)
def test_programs_compiled_in_advance_are_used(translator, settings):
    translator.compile(settings, longest=8, sentences=len(SHORT))
    compiled = advance._cache_size()
    translator.translate(SHORT, settings)
    assert advance._cache_size() == compiled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda each: each.translate("the cat"), "sentences is one string: give a list"),
        (lambda each: each.translate(["the cat"], prefixes="a"), "prefixes is one string: give a list"),
        (lambda each: each.translate(["a"], SAMPLING, seed=-1), "seed is -1: it must be at least 0"),
        (lambda each: each.translate(["a"], SAMPLING, seed=2**32), f"seed is {2**32}: it must be"),
        (lambda each: each.translate(["a", "b"], prefixes=["a"]), "there are 1 prefixes for 2 sentences: give one for"),
        (lambda each: each.score(["a", "b"], ["a"]), "there are 1 targets for 2 sources: give one for each"),
        (lambda each: each.score("a", ["a"]), "sources is one string: give a list"),
        (lambda each: each.align(["a"], "a"), "targets is one string: give a list"),
        (lambda each: each.translate(["a", None]), r"sentences\[1\] is None, of type NoneType"),
        (lambda each: each.translate([b"x"]), r"sentences\[0\] is b'x', of type bytes"),
        (lambda each: each.translate([math.nan]), r"sentences\[0\] is nan, of type float"),
        (lambda each: each.translate(["a"], prefixes=[None]), r"prefixes\[0\] is None"),
        (lambda each: each.translate({"a", "b"}), "sentences is a set, "),
        (lambda each: each.translate({"a": "b"}), "sentences is a dict, which is not an ordered sequence"),
        (lambda each: each.translate(io.StringIO("a\n")), "sentences is an open file: give its lines without"),
        (lambda each: each.score(["a"], [7]), r"targets\[0\] is 7, of type int"),
        (lambda each: each.align([["a"]], ["a"]), r"sources\[0\] is \['a'\], of type list"),
        (lambda each: each.align(["a"], ["a"], layer=1), "layer is 1, the decoder has 1: choose one from -1 to 0"),
        (
            lambda each: each.translate(["up"], GREEDY, prefixes=["up " * 9]),
            "a prefix has 9 tokens, but its output",
        ),
    ],
)
def test_a_wrong_argument_is_an_error_with_a_remedy(translator, call, message):
    with pytest.raises(ValueError, match=message):
        call(translator)


@pytest.mark.parametrize("kind", [tuple, iter, np.array, lambda texts: (text for text in texts)])
def test_texts_may_come_in_any_ordered_iterable(translator, sentences, translations, kind):
    assert translator.translate(kind(sentences), GREEDY) == translations
    assert translator.score(kind(sentences), kind(translations)) == translator.score(sentences, translations)


def test_the_best_checkpoint_is_the_best_by_the_metric_that_training_chose_by(workdir, sentences, translations):
    def translate(step):
        return Translator.from_workdir(workdir.path, step=step).translate(sentences, GREEDY)

    assert translate("best") == translate(1) == translations
    assert translate("latest") == translate(2) != translations


def test_loading_does_not_change_the_folder_of_a_running_training(workdir):
    under_way = workdir.path / "checkpoints" / "3.orbax-checkpoint-tmp"
    under_way.mkdir()
    Translator.from_workdir(workdir.path)
    assert under_way.exists()
    under_way.rmdir()
