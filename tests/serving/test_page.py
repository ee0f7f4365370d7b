"""Drives the page in Debian's Chromium, against a server whose small model has random weights.

Where a test needs an answer that a random model does not give, it puts its own in the server's place.
"""

import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

PAGE = resources.files("flax_transformer") / "serving" / "page.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SENTENCE = "the old dog runs fast"
EXPLAIN = re.compile("/explain$")


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
    assert not re.search(r"@import|url\(", PAGE.read_text("utf-8"))


def test_the_page_obeys_a_strict_policy(elements):
    """One style and one script, which the server knows by their hashes, and no text that becomes markup or code."""
    tags = [tag for tag, _ in elements]
    assert tags.count("style") == tags.count("script") == 1
    names = {name for _, attributes in elements for name in attributes}
    assert "style" not in names and not any(name.startswith("on") for name in names)
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(dangerous, PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives browsers, is not installed: `make peers` installs it"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium` installs it")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a window of some size and scheme; no test may log an error or ask another host."""
    contexts, faults, allowed = [], [], []

    def open_page(width=1200, height=900, scheme="light", fragment="", touch=False):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda said: faults.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("request", lambda asked: allowed.append(asked.url))
        page.goto(f"{address}/{fragment}")
        page.wait_for_selector("#source-language option", state="attached")
        return page

    open_page.faults = faults
    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
    assert all(url.startswith((address, "data:")) for url in allowed)


def type_text(page, text=SENTENCE):
    """Types a text and waits for its translation."""
    page.fill("#source", text)
    settle(page)


def settle(page):
    page.wait_for_selector("#desk:not(.waiting):not(:has(.stale)) .target .word")


def translation(page):
    return page.evaluate("[...document.querySelectorAll('.target')].map((one) => one.textContent).join('')")


def answer(sentences):
    """An answer of /explain: for each sentence its source, target, source pieces and target pieces with spans."""
    explained = []
    for source, target, source_pieces, target_pieces in sentences:
        best = {
            "text": target,
            "score": -0.5,
            "log_prob": -2.0,
            "tokens": [
                {"id": 7, "piece": piece, "start": start, "end": end, "probability": 0.5, "candidates": []}
                for piece, start, end in target_pieces
            ],
            "alignment": [
                [float(row == column) for column in range(len(source_pieces))] for row in range(len(target_pieces))
            ],
        }
        tokens = [{"text": piece, "start": start, "end": end} for piece, start, end in source_pieces]
        explained.append({"source": source, "source_tokens": tokens, "before": "", "after": "", "hypotheses": [best]})
    return {"sentences": explained}


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
    page.fill("#source", "the old")
    page.wait_for_timeout(600)
    type_text(page)
    assert asked == ["the old", SENTENCE]
    assert dropped == ["the old"]


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


def test_by_keyboard_to_another_word_and_back(open_page):
    page = open_page()
    type_text(page)
    before = translation(page)
    page.locator(".target .word").first.focus()
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    page.wait_for_selector("#choices:not([hidden])")
    assert page.locator("#choices li").count() == 5
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == second
    assert page.locator("#choices").is_hidden() and translation(page) == before


def test_choosing_another_word_translates_on_from_there(open_page):
    page, asked = open_page(), []
    type_text(page)
    before = translation(page)
    page.on("request", lambda request: asked.append(request.post_data) if EXPLAIN.search(request.url) else None)
    page.locator(".target .word").nth(1).click()
    other = page.locator("#choices li button:not([aria-current]):not([disabled])").first
    other.click()
    page.wait_for_selector("#undo:not([hidden])")
    settle(page)
    prefixes = [json.loads(body)["prefix"] for body in asked]
    first_ids = page.evaluate("state.current.data.hypotheses[0].tokens.map(({id}) => id)")
    assert first_ids[: len(prefixes[0])] == prefixes[0]
    page.click("#undo")
    assert translation(page) == before


def test_look_inside(open_page):
    page = open_page()
    type_text(page)
    page.click("#open-inside")
    assert page.locator("#panel .chips li").count() > 2
    for tab in ("cross", "encoder", "decoder"):
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#panel[aria-labelledby=tab-{tab}] .heads button")
        heads = page.locator(".heads button")
        assert heads.count() == 1 + page.evaluate("model().heads")
        heads.nth(1).click()
        assert heads.nth(1).get_attribute("aria-pressed") == "true"
        assert "Head 1" in page.get_attribute(".large", "aria-label")
        rows, columns = (page.locator(f".large {part} th").all_text_contents() for part in ("tbody", "thead"))
        assert len(rows) > 1
        if tab == "decoder":
            assert columns == ["<s>", *rows[:-1]]  # what comes before each piece
        assert "Attention is not an explanation" in page.text_content("#panel")
    page.keyboard.press("Tab")
    page.focus("#tab-decoder")
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel figure").count() == 3  # the masks
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel canvas").count() == 2  # the positions


def test_a_map_shows_the_weights_of_the_server(open_page):
    page = open_page()
    rows, columns = ["▁um", "</s>"], ["▁a", "▁cat", "</s>"]
    weights = [[[0.5, 0.25, 0.25], [0.1, 0.0, 0.9]], [[0.1, 0.75, 0.15], [0.3, 0.0, 0.7]]]
    page.route(
        re.compile("/attention$"),
        lambda route: route.fulfill(json={"rows": rows, "columns": columns, "heads": weights}),
    )
    type_text(page)
    page.click("#open-inside")
    page.click("#tab-cross")
    cells = page.locator(".large tbody td")
    page.wait_for_selector(".large tbody td")
    assert cells.all_text_contents() == ["30", "50", "20", "20", "", "80"]  # the mean of both heads, in percent
    page.locator(".heads button").nth(2).click()
    assert cells.all_text_contents() == ["10", "75", "15", "30", "", "70"]
    assert page.locator(".large thead th").all_text_contents() == columns


def test_the_guided_tour_has_five_steps(open_page):
    page = open_page(fragment="#" + "text=the%20old%20dog")
    settle(page)
    page.click("#start-tour")
    titles = []
    for step in range(1, 6):
        assert f"{step} of 5" in page.text_content("#tour")
        titles.append(page.text_content("#tour h2"))
        if step == 4:
            assert page.locator("#choices li").count() == 5
        if step < 5:
            page.click("#tour .main")
    assert len(set(titles)) == 5
    page.keyboard.press("Escape")
    assert page.locator("#tour").is_hidden()


@pytest.mark.parametrize(
    "width", [320, pytest.param(390, marks=pytest.mark.slow), pytest.param(768, marks=pytest.mark.slow)]
)
def test_no_width_makes_the_page_scroll_sideways(open_page, width):
    page = open_page(width=width, height=700, touch=True)
    source, target = "dog" * 60, f"um {'cachorro' * 20}"
    reply = answer([(source, target, [("▁" + source, 0, len(source))], [("▁um", 0, 2), (target[3:], 3, len(target))])])
    page.route(EXPLAIN, lambda route: route.fulfill(json=reply))
    type_text(page, source)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.unroute(EXPLAIN)
    type_text(page)
    page.click("#open-inside")
    for tab in ("pieces", "cross", "masks", "positions"):
        page.click(f"#tab-{tab}")
        page.wait_for_selector("#panel > *")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".target .word").last.click()
    box = page.locator("#choices").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.keyboard.press("Escape")
    page.click("#start-tour")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


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


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_axe_finds_no_serious_fault(open_page, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed: `make peers` installs it")
    script = next(Path(axe.__file__).parent.glob("axe*.js")).read_text("utf-8")
    page = open_page(scheme=scheme)
    page.evaluate(script)

    def check(state):
        found = page.evaluate("axe.run(document)")["violations"]
        found = [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found]
        assert found == [], state

    check("empty")
    type_text(page)
    page.click("#open-inside")
    page.click("#tab-cross")
    page.wait_for_selector("#panel .large")
    page.locator(".target .word").first.click()
    check("attention, pointing and choices")
    page.click("#tab-masks")
    page.click("#start-tour")
    check("masks and tour")
