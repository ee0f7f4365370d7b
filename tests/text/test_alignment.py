import numpy as np
import pytest

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.text.alignment import TextAlignment, spans, units
from flax_transformer.text.unknown import words_to_copy


def read(pieces, text):
    return [text[start:stop] for start, stop in spans(pieces, text)]


@pytest.mark.parametrize(
    ("pieces", "text", "parts"),
    [
        (["▁He", "llo", "!", "</s>"], "Hello!", ["He", "llo", "!", ""]),
        (["▁a", "▁b", "</s>"], " a\u200b \u00a0 b\n", ["a", "b", ""]),  # white space of any kind
        (["▁Fi", "ancé"], "Fiance\u0301", ["Fi", "ance\u0301"]),  # accents apart
        (["▁", "<unk>", "▁x"], "☃ x", ["", "☃", "x"]),
        (["<unk>", "▁", "<unk>", "</s>"], "☃ ♛♛", ["☃", "", "♛♛", ""]),
        (["▁a", "▁", "<unk>", "b", "</s>"], "a Ħb", ["a", "", "Ħ", "b", ""]),
        (["kan_Knda", "▁ನ", "ಮಸ್ಕಾರ", "</s>"], "ನಮಸ್ಕಾರ", ["", "ನ", "ಮಸ್ಕಾರ", ""]),  # a language's token is not text
        (["eng_Latn", "▁The", "▁dog", "▁and", "▁the", "</s>"], "The dog and the", ["", "The", "dog", "and", "the", ""]),
        (["▁The", "▁the", "</s>", "__en__"], "The the", ["The", "the", "", ""]),
        ([">>fra<<", "▁", "<unk>", "▁the"], "☃☃ the", ["", "", "☃☃", "the"]),
        ([">>fra<<", "▁the"], ">>fra<< the", [">>fra<<", "the"]),
        (["▁a", ".", "</s>", "▁b", ".", "</s>"], "a. b.", ["a", ".", "", "b", ".", ""]),  # a sentence in two parts
        (["</s>"], "", [""]),
    ],
)
def test_each_piece_has_its_characters(pieces, text, parts):
    assert read(pieces, text) == parts


@pytest.fixture(scope="module")
def vocabulary():
    lines = ["the old bridge was built in 1892", "ನಮಸ್ಕಾರ ಹೇಗಿದ್ದೀರಿ", "Straße café naïve", "你好 世界"] * 3
    return Vocabulary.train(lines, VocabularyConfig(size=90, byte_fallback=False))


@pytest.mark.parametrize(
    "text",
    [
        "the old bridge",
        "  the   bridge\t1892 ",
        "cafe\u0301 na\u00efve Straße",
        "ನಮಸ್ಕಾರ\u200b ಹೇಗಿದ್ದೀರಿ",
        "☃ the ♛ old",
        "xyz",
        "你好世界",
        "old\u00adbridge",
    ],
)
def test_the_pieces_of_a_vocabulary_cover_the_text(vocabulary, text):
    (ids,) = vocabulary.encode([text])
    found = spans(vocabulary.pieces(ids), text)
    assert len(found) == len(ids) and all(0 <= start <= stop <= len(text) for start, stop in found)
    assert [start for start, _ in found] == sorted(start for start, _ in found)
    covered = {place for start, stop in found for place in range(start, stop)}
    assert all(place in covered for place, character in enumerate(text) if character not in " \t\u200b\u00ad")


def test_units_are_words_signs_and_characters_of_scripts_without_spaces():
    text = "Don't e-mail 你好, a_b ನಮಸ್ಕಾರ!"
    assert [text[start:stop] for start, stop in units(text)] == [
        "Don't",
        "e-mail",
        "你",
        "好",
        ",",
        "a_b",
        "ನಮಸ್ಕಾರ",
        "!",
    ]


def test_equal_texts_are_aligned_word_by_word_and_others_by_position():
    np.testing.assert_allclose(TextAlignment.by_position("a b c", "a b c").weights, np.eye(3), atol=1e-12)
    halves = TextAlignment.by_position("a b", "x y z w").weights
    np.testing.assert_allclose(halves, [[1, 0], [1, 0], [0, 1], [0, 1]], atol=1e-12)
    assert TextAlignment.by_position("", "x").weights.shape == (1, 0)


def copy(source, pieces, unknown, weights):
    return words_to_copy(source, pieces, spans(pieces, source), np.array(unknown), np.array(weights, float))


def test_unknown_characters_are_copied_from_where_the_model_looked():
    source, pieces = "a ☃ b ♛♛", ["▁a", "▁", "<unk>", "▁b", "▁", "<unk>", "</s>"]
    unknown = [piece == "<unk>" for piece in pieces]
    assert copy(source, pieces, unknown, [[0, 0, 0.1, 0.6, 0, 0.3, 0]]) == ["♛♛"]  # "b" is known
    assert copy(source, pieces, unknown, [[0, 0, 0.3, 0.3, 0, 0.1, 0.3]]) == ["☃"]
    # A piece that was copied is probably not meant again.
    assert copy(source, pieces, unknown, [[0, 0, 0.5, 0, 0, 0.4, 0], [0, 0, 0.5, 0, 0, 0.4, 0]]) == ["☃", "♛♛"]


def test_the_whole_word_is_copied_if_the_source_has_no_unknown_piece():
    pieces = ["▁in", "▁Bel", "gr", "ade", ".", "</s>"]
    weights = [[0.1, 0.1, 0.6, 0.1, 0.0, 0.1], [0, 0, 0, 0, 0.2, 0.8]]
    assert copy("in Belgrade.", pieces, [False] * 6, weights[:1]) == ["Belgrade."]
    assert copy("", ["</s>"], [False], [[1.0]]) == [""]
    japanese = ["▁東京", "は", "日本の", "首都", "です", "。", "</s>"]  # which has no spaces between words
    assert copy("東京は日本の首都です。", japanese, [False] * 7, [[0, 0, 0, 1, 0, 0, 0]]) == ["首都"]
    mixed = ["▁私は", "i", "Phone", "を買った", "。", "</s>"]
    assert copy("私はiPhoneを買った。", mixed, [False] * 6, [[0, 0, 1, 0, 0, 0]]) == ["iPhone"]
