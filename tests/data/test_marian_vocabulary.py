"""Tests the vocabularies of OPUS-MT models: ids come from the list, language tokens, spelling, files."""

import pickle

import pytest

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig

SENTENCES = ["the cat runs fast", "a dog", "the dog is slow and the cat is fast"]


@pytest.fixture(scope="module")
def trained():
    return Vocabulary.train(SENTENCES, VocabularyConfig(size=40, byte_fallback=False))


def pieces_of(vocabulary):
    return vocabulary.pieces(range(vocabulary.size))


def test_ids_come_from_the_list_and_not_from_sentencepiece(trained, tmp_path):
    """Ids in the order of a Marian list, with the end of sentence first and padding last."""
    rest = [piece for piece in pieces_of(trained) if piece not in ("<pad>", "<s>", "</s>", "<unk>")]
    order = ["</s>", "<unk>", *reversed(rest), "<pad>"]
    ids = {piece: number for number, piece in enumerate(order)}
    vocabulary = MarianVocabulary(trained.to_bytes(), ids)
    assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (
        len(ids) - 1,
        len(ids) - 1,
        0,
        1,
    )
    rows = vocabulary.encode([*SENTENCES, "the ☃"])
    assert [vocabulary.pieces(row) for row in rows[:-1]] == [trained.pieces(row) for row in trained.encode(SENTENCES)]
    assert 1 in rows[-1] and vocabulary.decode(rows[:-1]) == SENTENCES
    assert vocabulary.decode([[*row, vocabulary.pad_id, 5] for row in rows[:-1]]) == SENTENCES
    assert pickle.loads(pickle.dumps(vocabulary)).to_bytes() == vocabulary.to_bytes()
    pair = VocabularyPair(vocabulary, MarianVocabulary(trained.to_bytes(), {**ids, "cat!": len(ids)}))
    pair.save(tmp_path / "pair")
    loaded = VocabularyPair.load(tmp_path / "pair")
    assert loaded.fingerprint() == pair.fingerprint() and loaded.target.size == pair.target.size
    assert VocabularyPair.is_in(tmp_path / "pair") and not VocabularyPair.is_in(tmp_path)


def test_a_language_token_is_one_token_and_an_unknown_one_an_error(trained):
    pieces = [*pieces_of(trained), ">>fra<<", ">>kan<<"]
    vocabulary = MarianVocabulary(trained.to_bytes(), {piece: number for number, piece in enumerate(pieces)})
    assert vocabulary.languages == (">>fra<<", ">>kan<<")
    (plain, french) = vocabulary.encode(["the cat", ">>fra<< the cat"])
    assert french == [len(pieces) - 2, *plain]
    assert vocabulary.split_language(">>fra<< the cat") == (">>fra<<", " the cat")
    with pytest.raises(ValueError, match=r'>>deu<< \(">>deu<< the cat"\): begin with one of >>fra<<, >>kan<<'):
        vocabulary.split_language(">>deu<< the cat")
    # In a target, or with a model without such tokens, this is ordinary text.
    assert len(vocabulary.encode([">>deu<< the cat"])[0]) > len(french)
    without = MarianVocabulary(trained.to_bytes(), {piece: number for number, piece in enumerate(pieces[:-2])})
    assert without.split_language(">>deu<< the cat") == ("", ">>deu<< the cat")


def test_a_piece_that_only_the_source_has_is_spelled_with_its_space(trained):
    ids = {piece: number for number, piece in enumerate([*pieces_of(trained), "▁elephant"])}
    vocabulary = MarianVocabulary(trained.to_bytes(), ids)
    (row,) = vocabulary.encode(["the cat"])
    assert vocabulary.decode([[*row[:-1], ids["▁elephant"], row[0]]]) == ["the cat elephant the"]


@pytest.mark.parametrize("ids", [{"<pad>": 0, "</s>": 1, "<unk>": 1}, {"<pad>": 0, "</s>": 2, "<unk>": 3}])
def test_a_list_that_skips_or_repeats_an_id_is_refused(trained, ids):
    with pytest.raises(ValueError, match="give each an id, and no id twice"):
        MarianVocabulary(trained.to_bytes(), ids)


def test_a_marian_vocabulary_has_the_pieces_and_ids_of_its_original(trained):
    made = MarianVocabulary.of(trained)
    assert pieces_of(made) == pieces_of(trained) and made.encode(SENTENCES) == trained.encode(SENTENCES)
    reordered = MarianVocabulary(trained.to_bytes(), {piece: n for n, piece in enumerate(reversed(pieces_of(trained)))})
    assert MarianVocabulary.of(reordered).to_bytes() == reordered.to_bytes()


def test_a_vocabulary_says_which_id_a_decoder_starts_from(trained):
    assert trained.start_id == trained.bos_id and trained.languages == ()
    assert MarianVocabulary.of(trained).start_id is None


@pytest.mark.parametrize("kinds", ["marian, marian", "marian, trained"])
def test_equal_lists_are_stored_once_and_others_separately(trained, kinds, tmp_path):
    marian = MarianVocabulary.of(trained)
    more = MarianVocabulary(trained.to_bytes(), {piece: n for n, piece in enumerate([*pieces_of(trained), ">>kan<<"])})
    equal = VocabularyPair(marian, marian if kinds == "marian, marian" else trained)
    assert equal.files().keys() == {"source.spm", "target.spm", "vocab.json"}
    assert VocabularyPair(more, equal.target).files().keys() == {*equal.files(), "target_vocab.json"}
    for pair in (equal, VocabularyPair(more, equal.target)):  # the second removes files of the first
        pair.save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pair.files())
        loaded = VocabularyPair.load(tmp_path)
        assert [pieces_of(loaded.source), pieces_of(loaded.target)] == [pieces_of(pair.source), pieces_of(pair.target)]
    VocabularyPair(trained, trained).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["joint.model"]
