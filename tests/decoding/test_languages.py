"""Translates with small random models that know languages by code."""

import numpy as np
import pytest

from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.translator import Translator
from flax_transformer.serving.exploring import _draft
from flax_transformer.serving.models import Served
from flax_transformer.trained_model import TrainedModel
from tests.languages import CONFIG, language_pair

BEAM = BeamSearch(beam_size=3, num_return=2, extra_length=4)
GREEDY = BeamSearch(beam_size=1, extra_length=4)
PAIR = {"source_language": "kan_Knda", "target_language": "eng_Latn"}


@pytest.fixture(scope="module")
def model(make_model, vocabularies):
    pair = language_pair(vocabularies.source)
    return TrainedModel(*make_model(pair.source.size, 3, max_length=12, **CONFIG), pair)


@pytest.fixture(scope="module")
def translator(model):
    return Translator(model, **PAIR)


def ids_of(found):
    return [[each.ids for each in hypotheses] for hypotheses in found]


@pytest.mark.parametrize("search", [BEAM, GREEDY, Sampling(num_return=2, extra_length=4)])
def test_a_translation_begins_with_its_language_which_is_certain_and_no_text(translator, sentences, search):
    source, target = translator.vocabularies.source, translator.vocabularies.target
    whole = [sentence for sentence in sentences if len(source.encode([sentence])[0]) <= translator.config.max_length]
    assert len(whole) > 3
    for (best, *_), sentence in zip(translator.hypotheses(whole, search), whole, strict=True):
        assert best.tokens[0] == "eng_Latn" and best.token_log_probs[0] == 0.0
        assert best.text == target.decode([best.ids[1:]])[0]
        (scored, other) = translator.score([sentence] * 2, [best, best.text], search)
        np.testing.assert_allclose(scored.token_log_probs, best.token_log_probs, atol=1e-4)
        assert abs(scored.score - best.score) < 1e-4
        assert other.tokens[0] == "eng_Latn" and other.token_log_probs[0] == 0.0


def test_the_language_of_both_sides_changes_the_translation(model, translator, sentences):
    whole = ids_of(translator.hypotheses(sentences, BEAM))
    assert ids_of(translator.speaking("fra_Latn").hypotheses(sentences, BEAM)) != whole
    other = ids_of(
        Translator(model, source_language="kan_Knda", target_language="fra_Latn").hypotheses(sentences, BEAM)
    )
    assert [[row[1:] for row in rows] for rows in other] != [[row[1:] for row in rows] for rows in whole]
    assert ids_of(translator.speaking(target_language="fra_Latn").hypotheses(sentences, BEAM)) == other
    assert translator.vocabularies.target.language == "eng_Latn"  # `speaking` has not changed it


def test_a_prefix_of_ids_follows_the_language(translator):
    language = translator.vocabularies.target.encode([""])[0][0]
    for prefix in ([], [7], [language, 7]):
        draft = _draft(Served("kn", "en", translator, GREEDY), ["a cat"], 1, GREEDY, 0, prefix)
        assert draft.prefixes == [[language, 7] if prefix else [language]] and draft.given == [1]


def test_a_line_and_its_prefix_may_name_their_own_languages(model, translator, sentences):
    lines = [*sentences[:5], ""]
    plain = ids_of(translator.hypotheses(lines, BEAM))
    without = Translator(model)
    marked = [f"kan_Knda {line}" if line else "" for line in lines]
    assert ids_of(without.hypotheses(marked, BEAM, prefixes=["eng_Latn"] * len(lines))) == plain
    (begun,) = translator.hypotheses(["a dog"], BEAM, prefixes=["fra_Latn the  cat"])
    assert begun[0].text.startswith("the  cat") and begun[0].tokens[0] == "fra_Latn"
    assert begun[0].token_log_probs[0] == 0.0 > begun[0].token_log_probs[1]
    for wrong, options in ((["a dog"], {"prefixes": ["eng_Latn"]}), (["kan_Knda a dog"], {})):
        with pytest.raises(ValueError, match="the model needs the language of"):
            without.translate(wrong, **options)


def test_each_part_of_a_long_sentence_has_both_languages(translator):
    parts = ["the cat runs fast.", "The dog runs slow."]
    with pytest.warns(UserWarning, match="in 2 parts"):
        ((whole,),) = translator.hypotheses([f"fra_Latn {' '.join(parts)}"], GREEDY)
    apart = [found[0] for found in translator.speaking("fra_Latn").hypotheses(parts, GREEDY)]
    assert list(whole.ids) == [token for each in apart for token in each.ids]
    assert whole.tokens.count("eng_Latn") == 2 and whole.log_prob == pytest.approx(sum(each.log_prob for each in apart))


def test_streaming_gives_the_same_text(translator, sentences):
    assert "".join(translator.stream(sentences[0], GREEDY)) == translator.translate([sentences[0]], GREEDY)[0]


def test_models_of_an_ensemble_speak_the_same_languages(model, sentences):
    alone, both = (Translator(models, **PAIR).hypotheses(sentences[:3], BEAM) for models in (model, [model, model]))
    assert ids_of(alone) == ids_of(both)


def test_a_model_without_languages_cannot_be_asked_for_one(make_model, vocabularies):
    model = TrainedModel(*make_model(vocabularies.source.size), vocabularies)
    with pytest.raises(ValueError, match="does not know languages by code"):
        Translator(model, target_language="eng_Latn")
