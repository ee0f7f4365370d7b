"""Takes a vocabulary as OPUS-MT models have it and leaves a verdict: ids from its list, languages, spelling."""

import pickle

import pytest

from flax_transformer.data.vocabulary import MarianVocabulary, VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from tests.interop.conftest import change, fails


def pieces_of(vocabulary):
    return vocabulary.pieces(range(vocabulary.size))


def test_ids_come_from_the_list_and_not_from_sentencepiece(make_model, vocabularies, folder, tmp_path, sentences):
    """Ids in the order of a list of Marian's, its end of sentence first and its padding last."""
    source = vocabularies.source
    rest = [piece for piece in pieces_of(source) if piece not in ("<pad>", "<s>", "</s>", "<unk>")]
    order = ["</s>", "<unk>", *reversed(rest), "<pad>"]
    ids = {piece: number for number, piece in enumerate(order)}
    vocabulary = MarianVocabulary(source.to_bytes(), ids)
    assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (
        len(ids) - 1,
        len(ids) - 1,
        0,
        1,
    )
    rows = vocabulary.encode([*sentences, "the ☃"])
    assert [vocabulary.pieces(row) for row in rows[:-1]] == [source.pieces(row) for row in source.encode(sentences)]
    assert 1 in rows[-1] and vocabulary.decode(rows[:-1]) == sentences
    assert vocabulary.decode([[*row, vocabulary.pad_id, 5] for row in rows[:-1]]) == sentences
    assert pickle.loads(pickle.dumps(vocabulary)).to_bytes() == vocabulary.to_bytes()
    pair = VocabularyPair(vocabulary, MarianVocabulary(source.to_bytes(), {**ids, "cat!": len(ids)}))
    pair.save(tmp_path / "pair")
    loaded = VocabularyPair.load(tmp_path / "pair")
    assert loaded.fingerprint() == pair.fingerprint() and loaded.target.size == pair.target.size
    assert VocabularyPair.is_in(tmp_path / "pair") and not VocabularyPair.is_in(tmp_path)


def test_a_language_token_is_one_token_and_an_unknown_one_an_error(vocabularies):
    source = vocabularies.source
    pieces = [*pieces_of(source), ">>fra<<", ">>kan<<"]
    vocabulary = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces)})
    assert vocabulary.languages == (">>fra<<", ">>kan<<")
    (plain, french) = vocabulary.encode(["the cat", ">>fra<< the cat"])
    assert french == [len(pieces) - 2, *plain]
    assert vocabulary.split_language(">>fra<< the cat") == (">>fra<<", " the cat")
    with pytest.raises(ValueError, match=r'>>deu<< \(">>deu<< the cat"\): begin with one of >>fra<<, >>kan<<'):
        vocabulary.split_language(">>deu<< the cat")
    # A target, or a sentence of a model without such tokens, is text like any other.
    assert len(vocabulary.encode([">>deu<< the cat"])[0]) > len(french)
    without = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces[:-2])})
    assert without.split_language(">>deu<< the cat") == ("", ">>deu<< the cat")


def test_each_part_of_a_long_sentence_keeps_its_language(make_model, vocabularies):
    source = vocabularies.source
    pieces = [*pieces_of(source), ">>fra<<"]
    vocabulary = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces)})
    model = make_model(pair=VocabularyPair(vocabulary, vocabulary), max_length=12)
    translator = Translator(model)
    search = BeamSearch(beam_size=1, max_length=6)
    with pytest.warns(UserWarning, match="in 2 parts"):
        whole, *parts = translator.translate(
            [
                ">>fra<< the cat runs fast. The dog runs slow.",
                ">>fra<< the cat runs fast.",
                ">>fra<<The dog runs slow.",
            ],
            search,
        )
    assert whole.split() == " ".join(parts).split()
    with pytest.raises(ValueError, match="knows no language >>deu<<"):
        translator.translate(["the cat", ">>deu<< the cat"], search)


def test_a_piece_that_only_the_source_has_is_spelled_with_its_space(vocabularies):
    source = vocabularies.source
    ids = {piece: number for number, piece in enumerate([*pieces_of(source), "▁elephant"])}
    vocabulary = MarianVocabulary(source.to_bytes(), ids)
    (row,) = vocabulary.encode(["the cat"])
    assert vocabulary.decode([[*row[:-1], ids["▁elephant"], row[0]]]) == ["the cat elephant the"]


def test_ids_that_are_those_of_another_vocabulary_are_told(folder, tmp_path):
    for file in ("config.json", "generation_config.json"):
        change(folder, file, pad_token_id=4)
    fails(folder, tmp_path, "pad_token_id is 4, the source vocabulary has 0")


@pytest.mark.parametrize("ids", [{"<pad>": 0, "</s>": 1, "<unk>": 1}, {"<pad>": 0, "</s>": 2, "<unk>": 3}])
def test_a_list_that_skips_or_doubles_an_id_is_refused(vocabularies, ids):
    with pytest.raises(ValueError, match="give each an id, and no id twice"):
        MarianVocabulary(vocabularies.source.to_bytes(), ids)
