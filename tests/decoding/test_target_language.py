"""Models that a token before the source, such as ">>kan<<", tells which language to write."""

import pickle

import pytest

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.documents import translate_documents
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from tests.small_models import say, small_model

GREEDY = BeamSearch(beam_size=1, max_length=6)


@pytest.fixture(scope="module", params=["trained here", "of Marian"])
def translator(request):
    lines = [say(number, 4) for number in range(40)]
    config = VocabularyConfig(size=60, byte_fallback=False, user_symbols=(">>kan<<", ">>tel<<"))
    pair = VocabularyPair.train(lines, lines, config)
    if request.param == "of Marian":
        vocabulary = MarianVocabulary.of(pair.source)
        pair = VocabularyPair(vocabulary, vocabulary)
    return Translator(small_model(pair, 3, max_length=12, tie_embeddings="none"))


def test_the_token_of_the_target_language_stands_before_each_sentence_that_names_none(translator):
    kannada = translator.speaking("en", "kn")
    draft = kannada.draft(["the cat", ">>tel<< the cat", ""], GREEDY)
    expected = translator.vocabularies.source.encode([">>kan<< the cat", ">>tel<< the cat"])
    assert draft.sources == expected and expected[0] != expected[1]
    assert kannada.vocabularies.source.encode(["the cat", ">>tel<< the cat"]) == expected
    with pytest.warns(UserWarning, match="in 4 parts"):
        long = kannada.draft(["the cat sat " * 8], GREEDY)
    token = translator.vocabularies.source.all_pieces().index(">>kan<<")
    assert len(long.sources) == 4 and all(source.count(token) == 1 for source in long.sources)
    assert not translator.vocabularies.source.language  # `speaking` has not changed it


def test_each_sentence_of_a_document_is_written_in_the_target_language(translator):
    kannada = translator.speaking(target_language=">>kan<<")
    said = translator.translate([">>kan<< The cat sat.", ">>kan<< A dog runs."], GREEDY)
    other = translator.translate([">>tel<< The cat sat.", ">>tel<< A dog runs."], GREEDY)
    assert said != other
    options = {"replace_unknown": False}
    assert translate_documents(kannada, ["The cat sat. A dog runs."], GREEDY, **options) == [" ".join(said)]
    (page,) = translate_documents(kannada, ["<p>The cat sat.</p><p>A dog runs.</p>"], GREEDY, markup=True, **options)
    assert page == f"<p>{said[0]}</p><p>{said[1]}</p>"


def test_a_score_is_that_of_the_target_language(translator):
    pair = translator.speaking(target_language="kan").score(["the cat", ">>tel<< the cat"], ["a dog", "a dog"])
    named = translator.score([">>kan<< the cat", ">>tel<< the cat"], ["a dog", "a dog"])
    assert [each.log_prob for each in pair] == pytest.approx([each.log_prob for each in named], abs=1e-5)
    assert abs(pair[0].log_prob - pair[1].log_prob) > 1e-3


def test_the_vocabulary_keeps_its_target_language_when_it_is_pickled(translator):
    source = translator.vocabularies.translating("", "tel").source
    again = pickle.loads(pickle.dumps(source))
    assert again.language == ">>tel<<" and again.encode(["the cat"]) == source.encode(["the cat"])


def test_a_language_without_a_token_is_an_error(translator):
    with pytest.raises(ValueError, match="no token names the language 'de': write one of >>kan<<, >>tel<<"):
        translator.speaking(target_language="de")
    with pytest.raises(ValueError, match="begin each sentence with one of >>kan<<"):
        translator.vocabularies.speaking("", "kan")  # of training, which takes the tokens from its text
