import re
import time
import tracemalloc

import lxml.html
import numpy as np
import pytest

from flax_transformer.text.alignment import TextAlignment
from flax_transformer.text.markup import divide_markup
from flax_transformer.text.markup_tokens import read_tokens
from tests.text.hostile import broken_markup, nested_markup
from tests.text.page_files import PAGES

MARKUP = [page for page in PAGES if page.is_markup]


def untranslated(document):
    return document.join(document.sentences, [None] * len(document.sentences))


def reversed_words(document):
    """Other words in another order, so that all markup inside of sentences has to move."""
    translations = [" ".join(word + "ö" for word in reversed(sentence.split())) for sentence in document.sentences]
    alignments = []
    for sentence, translation in zip(document.sentences, translations, strict=True):
        straight = TextAlignment.by_position(sentence, translation)
        alignments.append(TextAlignment(straight.source_spans, straight.target_spans, straight.weights[::-1]))
    return document.join(translations, alignments)


def tags(text):
    """The multiset of tags, with their attributes, and of what is no text."""
    return sorted(token.raw for token in read_tokens(text) if token.kind != "text")


def check(text):
    document = divide_markup(text)
    once = untranslated(document)
    assert tags(once) == tags(text)
    moved = reversed_words(document)
    assert tags(moved) == tags(text)
    # Whoever reads the output reads the same elements again, so nothing is open or crosses something else.
    assert "".join(token.raw for token in read_tokens(moved)) == moved
    for sentence in document.sentences:
        assert sentence == sentence.strip() and len(sentence.splitlines()) == 1
    return document, once, moved


@pytest.mark.parametrize("page", MARKUP, ids=lambda page: page.name)
def test_a_page(page):
    document, once, moved = check(page.text)
    assert document.sentences == page.sentences
    assert all(kept in once and kept in moved for kept in page.kept)
    same = [" ".join(lxml.html.fromstring(f"<div>{text}</div>").text_content().split()) for text in (once, page.text)]
    assert same[0] == same[1]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_well_formed_markup_comes_back_byte_for_byte(seed, unchecked):
    for number in range(10):
        text = nested_markup(100 * seed + number)
        document, once, moved = check(text)
        assert once == text
        # Nesting is kept: each element has the parent that it had.
        assert parents(moved) == parents(text)


def parents(text):
    opened, found = [""], []
    for token in read_tokens(text):
        if token.kind == "end":
            opened.pop()
        elif token.kind != "text":
            found.append((opened[-1], token.raw))
            if token.kind == "start":
                opened.append(token.raw)
    return sorted(found)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
def test_any_markup_gives_well_formed_markup_with_the_same_tags(seed, unchecked):
    for number in range(25):
        check_any(broken_markup(1000 * seed + number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_five_thousand_more(seed, unchecked):
    for number in range(50):
        check_any(broken_markup(1000 * seed + number))


def check_any(text):
    document = divide_markup(text)
    tokens = read_tokens(text)
    depth = 0
    for token in tokens:
        depth += {"start": 1, "end": -1}.get(token.kind, 0)
        assert depth >= 0
    assert depth == 0
    assert untranslated(document) == "".join(token.raw for token in tokens)
    moved = reversed_words(document)
    wanted = sorted(token.raw for token in tokens if token.kind in ("start", "end"))
    assert all(moved.count(raw) >= wanted.count(raw) for raw in set(wanted))
    # In what was written, every tag is closed in its turn, apart from what is no element.
    assert balanced(moved, tokens)


def balanced(moved, tokens):
    """Whether the tags of `tokens` stand in `moved` so that each end tag closes the last element that is open."""
    names = {token.raw: (token.kind, token.name) for token in tokens if token.kind != "text" and token.raw}
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
    opened = []
    for match in pattern.finditer(moved):
        kind, name = names[match[0]]
        if kind == "start":
            opened.append(name)
        elif kind == "end" and (not opened or opened.pop() != name):
            return False
    return not opened


def translated(text, *translations, alignments=None):
    document = divide_markup(text)
    return document.join(translations, alignments or [None] * len(translations))


def aligned(source, target, *links):
    """An alignment of words by hand: pairs of a word of the translation and its word in the source."""
    spans = [[match.span() for match in re.finditer(r"\w+", text)] for text in (source, target)]
    words = [re.findall(r"\w+", text) for text in (source, target)]
    weights = np.zeros((len(spans[1]), len(spans[0])))
    for ours, theirs in links:
        weights[words[1].index(ours), words[0].index(theirs)] = 1
    return TextAlignment(tuple(spans[0]), tuple(spans[1]), weights)


def test_tags_go_where_the_alignment_says():
    text = "The <b>red</b> <a href='x'>car</a> drives."
    links = [("Der", "The"), ("Wagen", "car"), ("rote", "red"), ("fährt", "drives")]
    target = "Der Wagen, der rote, fährt."
    found = translated(text, target, alignments=[aligned("The red car drives.", target, *links)])
    assert found == "Der <a href='x'>Wagen</a>, der <b>rote</b>, fährt."


def test_dividing_many_nested_marks_takes_time_in_proportion():
    started = time.process_time()
    document = divide_markup("<sup>" * 12_000 + "</sup>1" * 12_000)
    assert document.sentences == () and time.process_time() - started < 10


def test_nested_tags_stay_nested_and_take_their_words_along():
    text = "I see <a>the <i>old</i> bridge</a> there."
    links = [("vejo", "see"), ("a", "the"), ("ponte", "bridge"), ("antiga", "old"), ("ali", "there")]
    target = "Ali vejo a ponte antiga ali."
    found = translated(text, target, alignments=[aligned("I see the old bridge there.", target, *links)])
    assert found == "Ali vejo <a>a ponte <i>antiga</i></a> ali."


def test_words_that_must_stay_replace_their_translation_only():
    text = "I like <b translate='no'>Blue Horse</b> shoes."
    links = [("Ich", "I"), ("mag", "like"), ("Schuhe", "shoes"), ("Pferd", "Horse"), ("blaues", "Blue")]
    target = "Ich mag blaues Pferd Schuhe."
    found = translated(text, target, alignments=[aligned("I like Blue Horse shoes.", target, *links)])
    assert found == "Ich mag <b translate='no'>Blue Horse</b> Schuhe."
    # A model that leaves them out loses nothing else.
    target = "Ich mag Schuhe."
    found = translated(text, target, alignments=[aligned("I like Blue Horse shoes.", target, *links[:3])])
    assert found == "Ich mag <b translate='no'>Blue Horse</b> Schuhe."


def test_an_element_across_sentences_stays_one_run():
    assert translated("<b>One dog. Two</b> cats.", "Ein Hund.", "Zwei Katzen.") == "<b>Ein Hund. Zwei</b> Katzen."
    assert translated("Run <i>now. Go</i>", "Lauf jetzt.", "Geh") == "Lauf <i>jetzt. Geh</i>"


def test_a_translation_is_escaped():
    found = translated("<p>x and <b>y</b></p>", "<script> & yes")
    assert re.sub("</?b>", "", found) == "<p>&lt;script&gt; &amp; yes</p>"
    assert translated("<p>x</p>", "</p><img onerror=a>\xa0") == "<p>&lt;/p&gt;&lt;img onerror=a&gt;&#160;</p>"


def test_every_tag_is_written_where_a_translation_has_too_few_words():
    found = translated("<b>One</b> <i>two</i> <u>three</u> <img src='a'/> four", "Vier")
    assert sorted(re.findall(r"<[^>]+>", found)) == sorted(
        ["<b>", "</b>", "<i>", "</i>", "<u>", "</u>", "<img src='a'/>"]
    )
    assert re.sub(r"<[^>]+>", "", found).split() == ["Vier"]
    assert tags(translated("a <b>x</b> <!-- c --> b", "")) == ["<!-- c -->", "</b>", "<b>"]


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE a [<!ENTITY x 'yyyyyyyyyy'><!ENTITY z '&x;&x;&x;&x;'>]><a>&z;</a>",
        "<!DOCTYPE a SYSTEM 'file:///etc/passwd' [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x; hello</a>",
        "<!DOCTYPE resources [\n<!ENTITY app 'MyApp'>\n]>\n<resources><string>Hello &app;</string></resources>",
    ],
)
def test_entities_that_a_document_type_defines_are_refused_and_never_expanded(text):
    with pytest.raises(ValueError, match="declarations in square brackets .* remove them"):
        divide_markup(text)


def test_a_page_without_a_document_type_gets_none():
    page = "<html><body>Hi there<br></body></html>"
    assert "DOCTYPE" not in untranslated(divide_markup(page)) and "Hi there" in untranslated(divide_markup(page))


def test_a_very_long_sentence_without_an_alignment_takes_little_memory():
    words = " ".join(f"w{number}" for number in range(20_000))
    tracemalloc.start()
    found = translated(f"<p>{words} <b>end</b></p>", f"{words} end")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6 and re.sub("<[^>]+>", "", found) == f"{words} end"
    assert re.search(r"<b>[^<]*end</b></p>$", found)


DEEP = ["<b>" * 1500 + "x", "<b>x " * 100, "<i>" * 2500 + "x" + "</i>" * 2500, "x" + "</b>" * 3000]


@pytest.mark.parametrize("text", DEEP)
def test_deep_markup_keeps_its_text(text, unchecked):
    document = divide_markup(text)
    assert " ".join(document.sentences).split() == re.sub("<[^>]*>", "", text).split()
    assert tags(reversed_words(document)) == tags(text)


def test_html_that_is_too_deep_for_its_reader_is_refused():
    with pytest.raises(ValueError, match="nested more than 2,000 deep"):
        divide_markup("<b>" * 3000 + "x")


def test_the_numbers_of_translations_and_alignments_must_fit():
    with pytest.raises(ValueError, match="there are 2 translations of 1 sentences"):
        translated("<p>One</p>", "Eins", "Zwei")


def test_without_lxml_the_extra_is_named(monkeypatch):
    import sys

    from flax_transformer.text import markup_tokens

    markup_tokens._etree.cache_clear()
    monkeypatch.setitem(sys.modules, "lxml", None)
    with pytest.raises(ValueError, match=r"pip install 'flax_transformer\[markup\]'"):
        divide_markup("<p>soup<br>")
    assert divide_markup("<p>well-formed</p>").sentences == ("well-formed",)
    markup_tokens._etree.cache_clear()
