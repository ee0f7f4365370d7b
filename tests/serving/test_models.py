"""The models of a server, and those that are told the target language by a token before each sentence."""

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.serving.models import Served
from tests.small_models import say, small_model

GREEDY = BeamSearch(beam_size=1, extra_length=4)


def test_the_token_of_the_language_stands_before_each_sentence_that_names_none():
    lines = [say(number, 4) for number in range(40)]
    config = VocabularyConfig(size=60, byte_fallback=False, user_symbols=(">>kan<<", ">>tel<<"))
    translator = Translator(small_model(VocabularyPair.train(lines, lines, config), 3, max_length=12))
    served = Served("en", "kn", translator, GREEDY, ">>kan<<")
    draft = served.draft(["the cat", ">>tel<< the cat"], GREEDY)
    kannada, telugu = translator.vocabularies.source.encode([">>kan<< the cat", ">>tel<< the cat"])
    assert draft.sources == [kannada, telugu] != [telugu, telugu]
    long = served.draft(["the cat sat " * 8], GREEDY)
    assert len(long.sources) > 1 and all(source[0] == kannada[0] for source in long.sources)
