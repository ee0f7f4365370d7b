"""All characters of a corpus get pieces, even those that SentencePiece treats specially."""

import unicodedata
import warnings

import pytest

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.experiment import VocabularyConfig

KINDS = ["bpe", "unigram", "char"]
ADJECTIVES, NOUNS = "quick brown lazy jumping vexed zesty".split(), "fox dog waltz nymph sphinx jackdaw".split()
PLAIN = [f"the {adjective} {noun} and {other}" for adjective in ADJECTIVES for noun in NOUNS for other in ADJECTIVES]


def train(text, model_type, **changes):
    # Little more than the characters, because the unigram model finds no more pieces in so little text.
    size = len(set(unicodedata.normalize("NFC", "".join(text)))) + 9
    return Vocabulary.train(
        text, VocabularyConfig(**{"size": size, "model_type": model_type, "byte_fallback": False} | changes)
    )


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("text", ["<<s>>", "the ▅ fox", "▅", "<s>▅</s> <unk>"])
def test_special_names_and_the_reserved_character_are_ordinary_text(text, model_type):
    vocabulary = train([text] * 4 + PLAIN, model_type)
    assert vocabulary.decode(vocabulary.encode([text])) == [text]


@pytest.mark.parametrize("model_type", KINDS)
def test_sentences_with_a_reserved_character_are_trained_on(model_type):
    # SentencePiece would drop these sentences, and with them every letter that occurs nowhere else.
    vocabulary = train(["the ▅ ಕನ್ನಡ"] + PLAIN, model_type)
    assert vocabulary.decode(vocabulary.encode(["ಕನ್ನಡ ▅"])) == ["ಕನ್ನಡ ▅"]


@pytest.mark.parametrize("text", ["\ue000 and ▅", "▅ \ue000\ue001"])
def test_private_use_characters_are_not_confused_with_the_reserved_one(text):
    vocabulary = train([text] * 4 + PLAIN, "bpe")
    assert vocabulary.decode(vocabulary.encode([text])) == [text]


def test_all_characters_have_a_piece_even_if_training_uses_a_sample():
    text = [f"{PLAIN[number % 6]} {chr(0x4E00 + number)}" for number in range(60)]
    vocabulary = train(text, "bpe", size=110, max_sentences=40)
    assert not any(map(vocabulary.unknown_characters, text))


@pytest.mark.parametrize(
    ("character", "name"), [("\0", r"U\+0000"), ("▁", r"U\+2581 LOWER ONE EIGHTH BLOCK")], ids=["NUL", "space mark"]
)
def test_characters_that_cannot_have_a_piece_are_counted_and_named(character, name):
    with pytest.warns(UserWarning, match=rf"1 of the characters.*\({name}\).*in 4 of 220 sentences"):
        vocabulary = train([f"the{character}fox"] * 4 + PLAIN, "bpe")
    assert vocabulary.unk_id not in vocabulary.encode([f"the{character}fox"])[0]


def test_rare_characters_that_the_coverage_leaves_out_are_counted_and_named():
    with pytest.warns(UserWarning, match=r"U\+00DF LATIN SMALL LETTER SHARP S.*in 1 of 217 .*character_coverage"):
        train([*PLAIN, "ß"], "bpe", character_coverage=0.9995)


def test_without_lost_characters_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train([*PLAIN, "tab\tline\nend\ufeff no-break\xa0space \ud800"], "bpe")


@pytest.mark.parametrize("model_type", KINDS)
def test_composed_and_decomposed_training_text_give_the_same_vocabulary(model_type):
    text = ["ಕೊಂಡು ಹೋಯಿತು été"] * 3 + PLAIN
    composed, decomposed = ([unicodedata.normalize(form, line) for line in text] for form in ("NFC", "NFD"))
    assert train(composed, model_type).to_bytes() == train(decomposed, model_type).to_bytes()


def test_line_ends_and_tabs_of_training_text_get_no_piece():
    vocabulary = train(["the\nquick\tfox\r\nran\u2028on"] * 9 + PLAIN, "char")
    written = "".join(vocabulary.pieces(range(vocabulary.size)))
    assert not set("\n\t\r\u2028") & set(written)
    assert vocabulary.encode(["the\nquick\tfox"]) == vocabulary.encode(["the quick fox"])
