"""Drives the page's views of the model in Chromium: likely words, heads, masks and the tour, at each width."""

import json
import re
from pathlib import Path

import pytest

from tests.serving.page.conftest import EXPLAIN, answer, settle, translation, type_text


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
    own = page.evaluate("state.current.data.hypotheses[0].tokens.map(({id}) => id)")
    other = page.locator("#choices li button:not([aria-current]):not([disabled])").first
    other.click()
    page.wait_for_selector("#undo:not([hidden])")
    settle(page)
    prefixes = [json.loads(body)["prefix"] for body in asked]
    first_ids = page.evaluate("state.current.data.hypotheses[0].tokens.map(({id}) => id)")
    place = len(prefixes[0]) - 1  # of the word that was chosen
    assert place >= 1 and prefixes[0][:-1] == own[:place] and prefixes[0][-1] != own[place]
    assert first_ids[: place + 1] == prefixes[0] and translation(page) != before
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
