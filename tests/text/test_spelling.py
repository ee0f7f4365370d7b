"""Text that looks the same is spelled the same, in the characters that a vocabulary knows."""

import time
import unicodedata

import pytest

from flax_transformer.text.alignment import spans
from flax_transformer.text.spelling import (
    Spelling,
    comparable,
    composed,
    in_one_cell,
    in_one_line,
    is_blank,
    training_text,
)

LATIN = set("abcdefghijklmnopqrstuvwxyz é")
ZWNJ, ZWJ = "\u200c", "\u200d"


def spelling(known):
    known = set(known)
    return Spelling(lambda character: character in known | {" "}, known)


@pytest.mark.parametrize(
    "space",
    ["\t", "\n", "\r", "\x0b", "\x0c", "\x1e", "\x85", "\xa0", "\u1680", "\u2003", "\u2009", "\u2028", "\u202f"],
)
def test_white_space_without_a_piece_becomes_a_space(space):
    assert spelling(LATIN).spell(f"a{space}b") == "a b"
    assert spelling(LATIN).spell(f"{space}ab{space}") == "ab"


@pytest.mark.parametrize("space", ["\xa0", "\u202f", "\u3000"])
def test_white_space_with_a_piece_stays_inside_a_sentence(space):
    assert spelling(LATIN | {space}).spell(f"a{space}b{space}\n") == f"a{space}b"


@pytest.mark.parametrize(
    "invisible", ["\ufeff", "\u200b", "\u2060", "\xad", "\u200e", "\u2066", "\ufe0f", "\u034f", "\0", "\x1b", "\x7f"]
)
def test_an_invisible_character_without_a_piece_is_removed(invisible):
    assert spelling(LATIN).spell(f"{invisible}a{invisible}b{invisible}") == "ab"
    assert spelling(LATIN | {invisible}).spell(f"a{invisible}b") == f"a{invisible}b"


@pytest.mark.parametrize("joiner", [ZWJ, ZWNJ])
def test_joiners_with_a_piece_are_kept(joiner):
    word = f"ಕ್{joiner}ಷ"
    assert spelling(word).spell(word) == word
    assert spelling(word.replace(joiner, "")).spell(word) == word.replace(joiner, "")


# Precomposed letters, Kannada vowel signs of two and three parts, a Devanagari letter that composing takes apart,
# Hangul, two marks in either order, singletons.
WORDS = ["été", "ಕೊಂಡು", "ಹೋಯಿತು", "क़लम", "각하", "ế", "q\u0323\u0307", "Å Ω", "ﭏ"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_canonically_equivalent_texts_get_the_same_spelling_with_any_vocabulary(word, form):
    known = unicodedata.normalize(form, word)
    reader = spelling(known)
    spelled = {reader.spell(unicodedata.normalize(other, word)) for other in ("NFC", "NFD")} | {reader.spell(word)}
    assert len(spelled) == 1
    assert set(spelled.pop()) <= set(known) | {" "}
    assert not any(reader.unknown(unicodedata.normalize(other, word)) for other in ("NFC", "NFD"))


def test_a_vocabulary_of_uncomposed_text_can_still_read_it():
    # U+0958 and the ohm sign are not NFC; the vocabulary knows them as they are.
    assert spelling({"\u0958", "\u2126"}).spell("\u0958\u2126") == "\u0958\u2126"
    assert spelling({"\u0958", "\u2126"}).spell("\u0915\u093c\u03a9") == "\u0958\u2126"


@pytest.mark.parametrize("sign", ["\u212a", "\u212b", "\u2126", "\u037e", "\u1fef"])
def test_a_sign_in_the_vocabulary_does_not_replace_the_letter_that_it_equals(sign):
    letter = unicodedata.normalize("NFC", sign)
    for pieces in ([letter, sign], [letter, sign, f"{letter}a", f"b{letter}"]):
        reader = Spelling(set("".join(pieces)).__contains__, pieces)
        assert reader.spell(f"a{letter}b{sign}") == f"a{letter}b{letter}"
    # If it is the usual one, it stays.
    assert Spelling({letter, sign, "a"}.__contains__, [letter, sign, f"{sign}a"]).spell(letter) == sign


def test_a_letter_with_two_marks_is_decomposed_only_as_far_as_needed():
    assert spelling({"ê", "\u0301"}).spell("ế") == "ê\u0301"


def test_known_characters_are_not_changed():
    text = "ordinary text with é  and two  spaces"
    assert spelling(LATIN).spell(text) == text


def test_unknown_characters_are_listed_in_order_without_white_space():
    assert spelling(LATIN).unknown("日本 is 本\t\ufeff") == "日本本"
    assert spelling({"e", "\u0301"}).unknown("é") == ""


@pytest.mark.parametrize("text", ["", " ", "\t\r\n", "\u3000", "\u200b", "\ufeff", "\xad \u2060", ZWNJ, "\0", "\u2800"])
def test_text_without_visible_characters_is_blank(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", " .", "\u0301", "▁", "\ufffd", "\u0600", f"{ZWJ}ಕ"])
def test_text_with_visible_characters_is_not_blank(text):
    assert not is_blank(text)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_text_is_put_in_one_line(end):
    for one_line in (in_one_line, in_one_cell, comparable, training_text):
        assert one_line(f"a{end}b") == "a b"
    assert in_one_line("a\tb") == "a\tb" and in_one_cell("a\tb") == "a b"


def test_vocabularies_are_trained_on_composed_text_that_keeps_joiners_and_wide_spaces():
    assert training_text(f"\ufeffe\u0301\t{ZWNJ}\xa0\ud800") == f"é {ZWNJ}\xa0?"


def test_very_many_marks_on_one_character_are_cut_since_ordering_them_takes_quadratic_time():
    few = "q" + "\u0316\u0301" * 15
    assert composed(few) == unicodedata.normalize("NFC", few)
    marks = "\u0301" * 200_000 + "\u0316" * 200_000
    started = time.process_time()
    assert composed(f"q{marks}") == "q" + "\u0301" * 30
    assert spans(["q"], f"q{marks}") == [(0, 1 + len(marks))]
    assert time.process_time() - started < 10
