import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = sorted(page.name for page in DOCS.glob("*.md") if PROGRAM.search(page.read_text()))


def test_the_pages_on_reuse_are_tested():
    assert {"assemble.md", "nnx.md", "optax_loop.md"} <= set(PAGES)


# The pages on assembling a model and on search run in `make test`.
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page in ("optax_loop.md", "nnx.md") else page for page in PAGES],
)
def test_the_programs_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    for program in PROGRAM.findall((DOCS / page).read_text()):
        assert "assert " in program  # otherwise its results would not be checked
        exec(compile(program, page, "exec"), names)


def test_the_six_lines_of_the_readme_give_logits():
    first = PROGRAM.findall((DOCS.parent / "README.md").read_text())[0]
    assert ".base(" in first and "37_000" in first and "# [2, 5, 37000]" in first
    names = {"__name__": "README.md"}
    exec(first.replace(".base(", ".tiny(").replace("37_000", "37"), names)
    assert names["logits"].shape == (2, 5, 37)


def test_a_model_of_other_layers_takes_less_than_forty_lines():
    classes = re.findall(r"^class .*?(?=^\S)", (DOCS / "assemble.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(classes) == 3
    assert all(len(text.splitlines()) < 40 for text in classes)


def test_the_address_of_the_repository_is_the_same_everywhere():
    """`make address` replaces it in these files."""
    files = [DOCS.parent / name for name in ("README.md", "pyproject.toml", "mkdocs.yml")]
    files += sorted((DOCS.parent / "colab").glob("*.ipynb"))
    found = {file.name: set(re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", file.read_text())) for file in files}
    assert all(found.values()) and len(set().union(*found.values())) == 1, found
