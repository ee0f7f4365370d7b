import pytest
import regex

from flax_transformer.text.documents import divide
from tests.text.hostile import plain_text
from tests.text.page_files import PAGES

PLAIN = [page for page in PAGES if not page.is_markup]
TEXTS = [plain_text, *[lambda seed, page=page: page.text[seed % len(page.text) :] for page in PLAIN]]


def check(text):
    document = divide(text)
    assert document.join(document.sentences) == text
    assert len(document.kept) == len(document.sentences) + 1
    for sentence in document.sentences:
        assert regex.search(r"\p{L}", sentence) and sentence == sentence.strip() and len(sentence.splitlines()) == 1
    # What is kept comes back whatever the translations are.
    marks = document.join(["\x01"] * len(document.sentences))
    assert [part.strip(" ") for part in marks.split("\x01")] == [part.strip(" ") for part in document.kept]


@pytest.mark.parametrize("seed", range(20))
def test_hostile_texts_come_back(seed, unchecked):
    for number in range(25):
        check(plain_text(1000 * seed + number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_five_thousand_more(seed, unchecked):
    for number in range(50):
        check(plain_text(1000 * seed + number))


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.name)
def test_the_sentences_of_a_page(page):
    document = divide(page.text)
    assert document.sentences == page.sentences
    check(page.text)
    shown = document.join(["\x01"] * len(document.sentences))
    assert all(kept in shown for kept in page.kept)


def test_white_space_lists_and_what_is_no_language_stay_where_they_were():
    text = "\n - One dog. \t Two cats!\r\n\r\n 3) 42\n😀 https://a.org/b me@a.org\n  Go to www.a.org now 👍\n"
    document = divide(text)
    assert document.sentences == ("One dog.", "Two cats!", "Go to www.a.org now")
    joined = document.join(["A", "B", "C"])
    assert joined == "\n - A \t B\r\n\r\n 3) 42\n😀 https://a.org/b me@a.org\n  C 👍\n"


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "😀", "42", "3.5 + 7 = 10.5", "https://a.org/b", "a@b.org", "…", "- ", "①"]
)
def test_what_has_no_words_has_no_sentence(text):
    assert divide(text).sentences == () and divide(text).join([]) == text


def test_sentences_without_space_between_get_one_where_the_translation_needs_it():
    document = divide("你好。再见。\n好。")
    assert document.join(["Hello.", "Bye.", "Good."]) == "Hello. Bye.\nGood."
    assert document.join(["你好。", "再会。", "好。"]) == "你好。再会。\n好。"


def test_the_number_of_translations_must_fit():
    with pytest.raises(ValueError, match="there are 1 translations of 2 sentences: give one for each"):
        divide("One. Two.").join(["Eins."])
