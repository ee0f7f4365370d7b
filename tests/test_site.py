"""Builds the documentation site as `make docs` does, and follows its links."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("material", reason="MkDocs Material is not installed: `make docs` installs it")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: `make docs` installs it")

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'<a[^>]*? href="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site; building it may print nothing."""
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", f"--site-dir={folder}"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    assert not list(folder.rglob("*.py*"))  # the hooks are no page
    return folder


def pages_from(page):
    """The pages of the site that a page links to."""
    found = set()
    for link in LINK.findall(page.read_text("utf-8")):
        path, _ = urldefrag(link)
        if path and "://" not in path and not path.startswith("mailto:"):
            found.add((page.parent / unquote(path)).resolve())
    return found


def test_each_link_within_the_site_leads_to_a_page_and_each_anchor_is_there(site):
    anchors = {}
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        anchors[page.resolve()] = set(re.findall(r'\bid="([^"]+)"', text))
    checked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links begin at the root of a server
            continue
        for link in LINK.findall(page.read_text("utf-8")):
            path, anchor = urldefrag(link)
            if "://" in link or link.startswith(("mailto:", "javascript:", "data:")):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page.resolve()
            assert target.exists(), f"{page.name} links to {link}"
            if anchor and target in anchors and "colab" not in target.parts:
                assert unquote(anchor) in anchors[target], f"{page.name} links to {link}"
                checked += 1
    assert checked > 100


def test_from_the_first_page_two_clicks_lead_to_each_task_a_notebook_and_the_reference(site):
    one = pages_from(site / "index.html")
    two = set().union(one, *(pages_from(page) for page in one if page.suffix == ".html" and page.exists()))
    wanted = "training quality overview interop serving cloud tpu assemble learning api/model api/attention"
    names = [
        *(f"{name}.html" for name in wanted.split()),
        *(f"colab/{path.stem}.html" for path in (ROOT / "colab").glob("*.ipynb")),
    ]
    missing = [name for name in names if (site / name).resolve() not in two]
    assert not missing
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_the_site_loads_nothing_from_another_host(site):
    loads = re.compile(r'<(?:script|link|img|iframe)[^>]*? (?:src|href)="(https?://[^"]+)"')
    for page in site.rglob("*.html"):
        found = [address for address in loads.findall(page.read_text("utf-8")) if "colab-badge" not in address]
        assert not found, f"{page.name}: {found}"


def test_the_reference_shows_how_modules_are_called(site):
    for page, module in (("model", "Transformer"), ("attention", "MultiHeadAttention")):
        assert f"{module}.__call__" in (site / "api" / f"{page}.html").read_text("utf-8")
