import random
import time

import pytest

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.text.splitting import join_parts, split_sentence


def words(text):
    """A length by hand: one token a word, and the end of sentence."""
    return len(text.split()) + 1


def characters(text):
    return len(text.replace(" ", "")) + 1


def text_of(seed, count):
    """Words of one to nine letters; marks now and then."""
    rng = random.Random(seed)
    marks = ["", "", "", "", "", ",", ";", " –", ".", "?", '."', "!)"]
    return " ".join("".join(rng.choices("abcdeK", k=rng.randint(1, 9))) + rng.choice(marks) for _ in range(count))


def han_of(seed, count):
    rng = random.Random(seed)
    return "".join(chr(0x4E00 + rng.randrange(200)) + rng.choice(["", "", "", "", "，", "。"]) for _ in range(count))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def length(request):
    texts = [text_of(seed, 20) for seed in range(100)] + [han_of(seed, 20) for seed in range(100)]
    vocabulary = Vocabulary.train(texts, VocabularyConfig(size=400, model_type=request.param, byte_fallback=False))
    return lambda text: len(vocabulary.encode([text])[0])


@pytest.mark.parametrize("limit", [7, 23, 256])
@pytest.mark.parametrize("text", [text_of(1, 300), han_of(1, 300), "a" * 300, ". " * 300, "?" * 300, "\x00\x1c" * 300])
def test_every_part_fits_and_no_character_is_lost(text, limit, length):
    parts = split_sentence(text, length, limit)
    assert max(map(length, parts)) <= limit
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part and part == part.strip() for part in parts) or parts == [""]


@pytest.mark.parametrize("text", [text_of(2, 300), han_of(2, 300)])
def test_joining_the_parts_restores_the_text(text, length):
    parts = split_sentence(text, length, 40)
    assert len(parts) > 5 and join_parts(parts) == text


def test_a_text_that_fits_is_one_part():
    assert split_sentence("one. two. three.", words, 4) == ["one. two. three."]
    assert split_sentence("  ", words, 4) == split_sentence("", words, 4) == [""]


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("A b. C d. E f. G h.", 6, ["A b.", "C d.", "E f.", "G h."]),  # a model knows single sentences
        ("a b. c d. e f. g h.", 6, ["a b. c d.", "e f. g h."]),  # otherwise as long as possible: 4 words and the end
        ("a b. c d. e f. g h.", 5, ["a b. c d.", "e f. g h."]),
        ("a b. c d. e f. g h.", 4, ["a b.", "c d.", "e f.", "g h."]),
        ("a, b c. d e f.", 5, ["a, b c.", "d e f."]),  # the end of a sentence before a fuller part
        ("a b. c, d e, f g. h.", 4, ["a b.", "c, d e,", "f g. h."]),  # a clause's rest with the next sentence
        ("a b c d e. f, g.", 4, ["a b c", "d e.", "f, g."]),  # white space, where a sentence has no clauses
        ("a b c, d e f g h. i.", 5, ["a b c,", "d e f g", "h. i."]),
    ],
)
def test_texts_are_cut_at_the_best_places_first(text, limit, parts):
    assert split_sentence(text, words, limit) == parts


def test_a_part_is_as_long_as_possible(length):
    """No part could take the first word of the next one where there are only words to cut at."""
    text = " ".join(f"{number}{'xyz' * (number % 5)}" for number in range(500))
    parts = split_sentence(text, length, 60)
    for part, following in zip(parts, parts[1:], strict=False):
        assert length(f"{part} {following.split()[0]}") > 60


@pytest.mark.parametrize(
    "text",
    [
        'He said "Go on." |(Or did he?) |"Yes!" |Then… |So.',
        "It is 3.14, e.g. at 5:30 in U.S.A. Why?! he asked. |End.",
        "»Ja.« |„Nein.“ |Gut.",
        "नमस्ते। |आप कैसे हैं॥|ठीक हूँ।",
        "ನಮಸ್ಕಾರ। |ಹೇಗಿದ್ದೀರಿ? |ಚೆನ್ನಾಗಿದ್ದೇನೆ.",
        "你好。|「再见！」|他走了？！|是。",
        "こんにちは｡|さようなら。",
        "مرحبا؟ |لا، نعم۔ |شكرا.",
        "Բարև։ |Ինչպե՞ս ես։ |Լավ։",
        "សួស្តី។|បាទ៕",
        "ሰላም። |እሺ፧ |አዎ።",
        "မင်္ဂလာပါ။ |ဟုတ်။",
    ],
)
def test_sentences_end_at_the_marks_of_each_script(text):
    """A bar marks where a text that is a little too long should be cut."""
    whole = text.replace("|", "")
    assert split_sentence(whole, characters, characters(whole) - 1) == [part.strip() for part in text.split("|")]


def test_lower_case_after_a_mark_continues_the_sentence_unless_all_is_lower_case():
    assert split_sentence("A b. C e.g. d e", words, 5) == ["A b.", "C e.g. d e"]
    assert split_sentence("a b, c. d, e f", words, 5) == ["a b, c.", "d, e f"]


def test_clauses_are_preferred_to_white_space():
    for text in ("a b, c d e", "a b; c d e", "a b: c d e", "a b – c d e", "a b— c d e", "a b، c d e", "a b؛ c d e"):
        parts = split_sentence(text, words, 5)
        assert parts[1:] == ["c d e"]
    assert split_sentence("你好，再见吧", characters, 5) == ["你好，", "再见吧"]
    assert split_sentence("1,000 a-b 2:30 c", words, 4) == ["1,000 a-b 2:30", "c"]


def test_a_letter_stays_with_its_marks():
    parts = split_sentence("ನಮಸ್ಕಾರ", lambda text: len(text) + 1, 4)
    assert parts == ["ನಮ", "ಸ್", "ಕಾರ"]


def test_a_letter_with_more_marks_than_fit_is_cut_too():
    assert "".join(split_sentence("a" + "\u0301" * 50, lambda text: len(text) + 1, 8)) == "a" + "\u0301" * 50


def test_a_limit_below_one_character_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'y' alone has 3 tokens, the limit is 2: raise it"):
        split_sentence("yes", lambda text: 2 * len(text) + 1, 2)


@pytest.mark.parametrize(
    "text",
    [text_of(3, 10_000), "word " * 10_000, "a" * 50_000, "a," * 25_000, "a. " * 20_000, "字" * 20_000, "字。" * 20_000],
    ids=lambda text: text[:8],
)
def test_splitting_a_long_text_costs_only_a_few_encodings(text):
    measured = []

    def length(part):
        measured.append(len(part))
        return len(part) // 3 + 1

    parts = split_sentence(text, length, 256)
    assert sum(measured) <= 30 * len(text)
    assert len(measured) <= 30 * len(parts)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["One.", "Two."], "One. Two."),
        (["你好。", "再见。"], "你好。再见。"),
        (["これは", "ペンです｡", "「はい」"], "これはペンです｡「はい」"),
        (["你好。", "Hello."], "你好。 Hello."),
        (["안녕.", "네."], "안녕. 네."),
        (["ನಮಸ್ಕಾರ.", "", "ಸರಿ."], "ನಮಸ್ಕಾರ. ಸರಿ."),
        ([], ""),
    ],
)
def test_translations_are_joined_with_or_without_spaces_by_script(parts, text):
    assert join_parts(parts) == text


@pytest.mark.parametrize("piece", [",", "-", ":", ",x", "–."])
def test_the_time_grows_with_the_length_only(piece):
    start = time.process_time()
    assert "".join(split_sentence(piece * 20_000, characters, 500)).replace(" ", "") == piece * 20_000
    assert time.process_time() - start < 5  # a quadratic pattern takes minutes
