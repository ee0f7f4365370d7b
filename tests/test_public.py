"""The table of public names in CONTRIBUTING.md is complete: what documents and configs import is in it, and exists."""

import importlib
import json
import re
from pathlib import Path

import pytest

import flax_transformer

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `(flax_transformer[\w.]*)` \| (.+) \|$", re.MULTILINE)
IMPORT = re.compile(r"^ *from (flax_transformer[\w.]*) import (\(.*?\)|.+?)$", re.MULTILINE | re.DOTALL)


def table():
    rows = dict(ROW.findall((ROOT / "CONTRIBUTING.md").read_text()))
    public = {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows.items()}
    public["flax_transformer"] = set(flax_transformer.__all__)
    return public


def documents():
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]
    yield from ((file.name, file.read_text()) for file in files)
    for file in (ROOT / "colab").glob("*.ipynb"):
        cells = json.loads(file.read_text())["cells"]
        yield file.name, "\n".join("".join(cell["source"]) for cell in cells)


def test_every_public_name_exists():
    pytest.importorskip("matplotlib")
    for module, names in table().items():
        assert names
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_documents_import_only_public_names():
    public, found = table(), 0
    for document, text in documents():
        for module, names in IMPORT.findall(text):
            for name in re.findall(r"\w+", names):
                found += 1
                assert name in public.get(module, ()), f"{document} imports {name} from {module}, which is not public"
    assert found > 50
