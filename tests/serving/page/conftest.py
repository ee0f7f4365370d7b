"""Opens the page in Debian's Chromium, against a server whose small model has random weights."""

import contextlib
import dataclasses
import re
import shutil

import pytest

from flax_transformer.serving.limits import Limits
from flax_transformer.serving.models import Models
from flax_transformer.serving.service import Service
from tests.serving.conftest import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SENTENCE = "the old dog runs fast"
EXPLAIN = re.compile("/explain$")


@pytest.fixture(scope="session")
def model_of_page(served):
    """A model whose translations have some words."""
    return dataclasses.replace(served, search=served.search.replace(min_length=4))


@pytest.fixture(scope="session")
def address(model_of_page):
    """The address of a server with the page that comes with the library."""
    with serving(Service(Models([model_of_page]), Limits(), inside=16), page=None) as server:
        yield server.address


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
    contexts, faults, asked, allowed = [], [], [], {"data:"}

    def open_page(width=1200, height=900, scheme="light", fragment="", touch=False, at=address):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda said: faults.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        allowed.add(at)
        page.goto(f"{at}/{fragment}")
        page.wait_for_selector("#source-language option", state="attached")
        return page

    open_page.faults = faults
    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
    assert all(url.startswith(tuple(allowed)) for url in asked)


@pytest.fixture
def serve_page(model_of_page):
    """Starts a server with the page, and returns its address; arguments are further models, keys and limits."""
    with contextlib.ExitStack() as running:

        def make(*more, keys=None, **limits):
            service = Service(Models([model_of_page, *more]), Limits(**limits), keys=keys, inside=16)
            return running.enter_context(serving(service, page=None)).address

        yield make


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
