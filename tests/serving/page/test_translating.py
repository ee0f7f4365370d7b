"""Drives the page in Debian's Chromium: a text is typed, and its translation comes, is pointed at, copied and linked.

The small model of the server has random weights. Where a test needs an answer that such a model does not give, it puts
its own in the server's place.
"""

import dataclasses
import json
import re
import unicodedata
from html.parser import HTMLParser
from importlib import resources

import pytest

from flax_transformer.serving.limits import Keys
from tests.serving.page.conftest import EXPLAIN, SENTENCE, answer, settle, translation, type_text

PAGE = resources.files("flax_transformer") / "serving" / "page.html"


class Elements(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def elements():
    parser = Elements()
    parser.feed(PAGE.read_text("utf-8"))
    return parser.found


def test_the_page_needs_nothing_but_itself(elements):
    addresses = [value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
    outside = set(re.findall(r"https?://[^'\"\s)]+", PAGE.read_text("utf-8")))
    assert outside <= {"http://www.w3.org/2000/svg"}  # the name of a format, which nobody fetches
    loaded = re.findall(r"@import.*|url\(.*?\)", PAGE.read_text("utf-8"))
    assert loaded == ["url(font.ttf)"]  # of this server; only a machine without letters of India asks for it


def test_the_page_obeys_a_strict_policy(elements):
    """One style and one script, which the server knows by their hashes, and no text that becomes markup or code."""
    tags = [tag for tag, _ in elements]
    assert tags.count("style") == tags.count("script") == 1
    names = {name for _, attributes in elements for name in attributes}
    assert "style" not in names and not any(name.startswith("on") for name in names)
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(dangerous, PAGE.read_text("utf-8"))


def test_the_font_of_the_server_has_kannada_and_loads_where_it_is_needed(open_page):
    page = open_page()
    loaded = "async (text) => (await document.fonts.load('16px Packaged', text)).map((face) => face.status)"
    assert page.evaluate(loaded, "ಕನ್ನಡ") == ["loaded"]
    assert page.evaluate(loaded, "Deutsch") == []  # no other text asks for it


def test_a_text_is_translated_while_one_types(open_page):
    page = open_page()
    page.type("#source", SENTENCE, delay=5)
    settle(page)
    assert translation(page).strip()
    assert page.text_content("#spoken") == translation(page).strip()  # what a screen reader says
    assert page.locator(".word.lit").count() == 0


def test_what_is_no_sentence_stays(open_page):
    page, text = open_page(), "😀 12\n\n- 3"
    page.fill("#source", text)
    page.wait_for_selector("#desk:not(.waiting) .target:not(.stale)")
    assert translation(page) == text and page.is_enabled("#copy")


def test_the_request_before_is_dropped(open_page):
    page, asked, dropped = open_page(), [], []
    page.on("requestfailed", lambda request: dropped.append(json.loads(request.post_data)["q"]))

    def answer_late(route):
        asked.append(route.request.post_data_json["q"])
        if len(asked) > 1:
            route.continue_()  # the first one never gets an answer

    page.route(EXPLAIN, answer_late)
    with page.expect_request(EXPLAIN):
        page.fill("#source", "the old")
    type_text(page)
    assert asked == ["the old", SENTENCE]
    assert dropped == ["the old"]


def test_nothing_is_sent_between_two_letters(open_page):
    page, asked = open_page(), []

    def answer_late(route):
        asked.append(route.request.post_data_json["q"])
        if len(asked) > 1:
            route.continue_()

    page.route(EXPLAIN, answer_late)
    with page.expect_request(EXPLAIN):
        page.fill("#source", "the")
    page.type("#source", " old dog", delay=30)
    settle(page)
    assert asked == ["the", "the old dog"]


def test_the_caret_points_too(open_page):
    page = open_page()
    type_text(page)
    page.focus("#source")
    page.keyboard.press("Home")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#mirror .word.pointed:text-is('old')")


def test_pointing_at_a_word_lights_its_counterparts_by_the_alignment(open_page):
    page = open_page()
    reply = answer([("a cat", "um gato", [("▁a", 0, 1), ("▁cat", 2, 5)], [("▁um", 0, 2), ("▁ga", 3, 5), ("to", 5, 7)])])
    reply["sentences"][0]["hypotheses"][0]["alignment"] = [[0.9, 0.1], [0.0, 1.0], [0.2, 0.8]]
    page.route(EXPLAIN, lambda route: route.fulfill(json=reply))
    type_text(page, "a cat")
    page.locator(".target .word", has_text="gato").hover()
    page.wait_for_selector("#mirror .word.lit")
    # The weights of a word are the mean of those of its pieces, so 0.9 for "cat"; 0.1 for "a" is too little to light.
    assert page.text_content("#readout") == "gato, 25 % sure; looked at cat 90 % · a 10 %"
    assert page.locator("#mirror .word.lit").all_text_contents() == ["cat"]
    box = page.locator("#mirror .word").first.bounding_box()  # it lies below the textarea
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#mirror .word.pointed:text-is('a')")
    assert page.locator(".target .word.lit").all_text_contents() == ["um"]


def test_the_copy_of_the_source_lies_exactly_below_it(open_page):
    """Otherwise the wrong words would be lit: the textarea shows all of its text, and no more room than that."""
    page = open_page(width=390)
    type_text(page, "the dog runs\n\n  the old   cat sat on it " * 12 + "\n")
    heights = page.evaluate("[source.scrollHeight, source.clientHeight, mirror.scrollHeight, mirror.clientHeight]")
    assert heights[0] == heights[1] and heights[2] == heights[3]


def test_no_letter_is_torn_apart(open_page):
    """Each word holds whole letters with their marks, though the pieces divide a syllable, a flag and a word."""
    page = open_page()
    target = "ನಮಸ್ಕಾರ 🇮🇳 café"
    accented = unicodedata.normalize("NFD", "café")
    target = target.replace("café", accented)
    cuts = [0, 3, 4, 7, 8, 9, 10, 14, len(target)]
    pieces = [(target[a:b], a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    reply = answer([("a", target, [("▁a", 0, 1)], pieces)])
    page.route(EXPLAIN, lambda route: route.fulfill(json=reply))
    type_text(page, "a")
    assert page.locator(".target .word").all_text_contents() == target.split()
    assert translation(page) == target


def test_errors_are_shown_as_text_and_can_be_tried_again(open_page):
    page = open_page()
    said = "<img src=x onerror=alert(1)> too many requests"
    page.route(EXPLAIN, lambda route: route.fulfill(status=429, json={"error": said}), times=1)
    page.fill("#source", SENTENCE)
    page.wait_for_selector("#fault button")
    assert page.text_content("#fault span") == said
    assert page.locator("#fault img").count() == 0
    page.click("#fault button")
    settle(page)
    assert page.text_content("#fault") == ""
    assert len(open_page.faults) == 1 and "429" in open_page.faults.pop()  # the browser's own line


def test_a_server_that_is_gone_is_an_error_of_one_sentence(open_page):
    page = open_page()
    page.route(EXPLAIN, lambda route: route.abort())
    page.fill("#source", SENTENCE)
    page.wait_for_selector("#fault button")
    assert page.text_content("#fault span") == "The server does not answer. Is it still running?"
    assert len(open_page.faults) == 1 and "ERR_FAILED" in open_page.faults.pop()


def test_where_the_server_wants_a_key_the_page_asks_for_it(open_page, serve_page):
    page = open_page(at=serve_page(keys=Keys(["the-right-key"])))
    assert page.locator("#key-form").is_visible()
    page.fill("#source", SENTENCE)
    page.wait_for_selector("#fault span:has-text('needs an API key')")
    page.fill("#key", "another-key")
    page.click("#key-form button")
    page.wait_for_selector("#fault span:has-text('the API key is not known')")
    page.fill("#key", "the-right-key")
    page.keyboard.press("Enter")
    settle(page)
    assert translation(page).strip() and page.text_content("#fault") == ""
    assert "right" not in page.url and page.evaluate("localStorage.length + sessionStorage.length") == 0
    assert all("403" in fault for fault in open_page.faults) and len(open_page.faults) == 2  # the browser's own lines
    open_page.faults.clear()


def test_too_many_requests_are_told_and_the_translation_before_stays(open_page, serve_page):
    page = open_page(at=serve_page(requests_a_minute=1))
    type_text(page)
    before = translation(page)
    page.fill("#source", f"{SENTENCE} again")
    page.wait_for_selector("#fault span:has-text('too many requests: 1 a minute')")
    assert translation(page) == before and page.locator(".target.stale").count() == 1
    assert page.locator("#fault button").is_enabled() and not page.locator("#desk.waiting").count()
    assert len(open_page.faults) == 1 and "429" in open_page.faults.pop()


def test_the_language_is_detected_where_several_are_served(open_page, serve_page, model_of_page):
    pairs = (("fr", "de"), ("de", "en"))
    others = [dataclasses.replace(model_of_page, source=source, target=target) for source, target in pairs]
    page, asked = open_page(at=serve_page(*others)), []
    page.on("request", lambda request: asked.append(request.post_data_json) if EXPLAIN.search(request.url) else None)
    page.select_option("#source-language", "auto")
    assert page.text_content("#source-language option:checked") == "Detect language"
    for text, origin, goal in (
        ("nous allons à la mer", "fr", "de"),
        ("we are going to the sea", "en", "de"),
        ("wir fahren ans Meer", "de", "en"),  # German is the target no more
    ):
        type_text(page, text)
        assert [asked[-1][name] for name in ("q", "source", "target")] == [text, origin, goal]
        assert page.input_value("#target-language") == goal and page.get_attribute("#source", "lang") == origin
        detected = page.text_content("#source-language option:checked")
        assert detected == {"fr": "French", "en": "English", "de": "German"}[origin] + " (detected)"
    assert "from=auto" in page.url
    page.click("#swap")
    assert (page.input_value("#source-language"), page.input_value("#target-language")) == ("en", "de")


def test_a_text_s_markup_stays_text(open_page):
    page = open_page()
    target = "<b>um</b> & <script>alert(1)</script>"
    reply = answer([("a", target, [("▁a", 0, 1)], [("▁" + target, 0, len(target))])])
    page.route(EXPLAIN, lambda route: route.fulfill(json=reply))
    type_text(page, "a")
    assert translation(page) == target and page.locator("#translation b, #translation script").count() == 0


def test_a_link_opens_the_same_text(open_page):
    page = open_page()
    type_text(page, "the cat & the dog = #1\nis old")
    other = open_page(fragment=page.evaluate("location.hash"))
    settle(other)
    assert other.input_value("#source") == page.input_value("#source")
    assert translation(other) == translation(page)


def test_languages_are_swapped_with_their_texts(open_page):
    page = open_page()
    (model,) = page.evaluate("state.models")
    back = {**model, "source": model["target"], "target": model["source"]}
    reply = answer([("a", "um", [("▁a", 0, 1)], [("▁um", 0, 2)])])
    assert page.is_disabled("#swap")  # one direction is served
    page.route(re.compile("/models$"), lambda route: route.fulfill(json=[model, back]))
    page.route(EXPLAIN, lambda route: route.fulfill(json=reply))
    page.reload()
    page.wait_for_selector("#source-language option >> nth=1", state="attached")
    type_text(page, "a")
    page.click("#swap")
    languages = page.input_value("#source-language"), page.input_value("#target-language")
    assert languages == (back["source"], back["target"]) and page.input_value("#source") == "um"


def test_the_translation_can_be_copied(open_page):
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    type_text(page)
    page.click("#copy")
    page.wait_for_selector("#done:text-is('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == translation(page)


@pytest.mark.parametrize(
    ("sentences", "shown"), [(["Hello.", "I came."], "Hello. I came."), (["你好。", "我来了。"], "你好。我来了。")]
)
def test_sentences_that_had_no_space_between_them_get_one_where_the_target_needs_it(open_page, sentences, shown):
    page = open_page()
    parts = [("你好。", sentences[0]), ("我来了。", sentences[1])]
    explained = [(source, target, [("▁", 0, len(source))], [("▁", 0, len(target))]) for source, target in parts]
    page.route(EXPLAIN, lambda route: route.fulfill(json=answer(explained)))
    type_text(page, "你好。我来了。")
    assert translation(page) == shown


def test_only_the_blocks_that_changed_are_sent_again(open_page):
    page, asked = open_page(), []

    def fulfill(route):
        text = route.request.post_data_json["q"]
        asked.append(text)
        route.fulfill(json=answer([(text, text, [("▁", 0, len(text))], [("▁", 0, len(text))])]))

    page.route(EXPLAIN, fulfill)
    paragraphs = [f"{number} the dog runs " * 40 + "\n\n" for number in range(8)]
    type_text(page, "".join(paragraphs))
    assert asked == paragraphs
    page.evaluate("source.setSelectionRange(source.value.length, source.value.length)")
    page.type("#source", "end")
    page.wait_for_timeout(400)
    settle(page)
    assert asked[len(paragraphs) :] == ["end"]
    assert translation(page) == "".join(paragraphs) + "end"


@pytest.mark.slow
def test_a_very_long_text_keeps_the_page_responsive(open_page):
    """Typing into 60,000 characters takes less than the time in which a person notices a delay."""
    page = open_page()

    def fulfill(route):
        text = route.request.post_data_json["q"]
        words = [("▁" + word.group(), *word.span()) for word in re.finditer(r"\S+", text)]
        route.fulfill(json=answer([(text, text, words, words)]))

    page.route(EXPLAIN, fulfill)
    page.route(re.compile("/translate$"), lambda route: route.fulfill(json={"translatedText": "longer\n\n"}))
    type_text(page, ("the old dog runs fast. " * 25 + "\n\n") * 104)
    assert page.locator("#long").is_visible()
    took = page.evaluate(
        "(() => { const start = performance.now(); source.value += 'x'; edited();"
        " document.body.getBoundingClientRect(); return performance.now() - start; })()"
    )
    assert took < 200
