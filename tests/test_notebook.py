"""Runs the notebooks of colab/ from beginning to end; `pytest -m notebook` runs these tests alone."""

import ast
import json
import re
from datetime import date, timedelta
from pathlib import Path

import pytest
from babel.lists import format_list

from flax_transformer.data import locale_phrases
from flax_transformer.workdir import WorkDirectory
from tests.xla_flags import QUICK_COMPILING

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.notebook
COLAB = Path(__file__).parents[1] / "colab"
# The same experiment, on so little data and so few steps that it learns next to nothing, but does all there is to do.
STEPS = 8
CHANGES = {
    "data.train": "locale_phrases:kn:en:train?pairs=2000&parts=2",
    "data.valid": "locale_phrases:kn:en:valid?pairs=2&parts=2",
    "data.test": "locale_phrases:kn:en:test?pairs=8&parts=2",
    "data.rows": 4,
    "vocabulary.size": 500,
    "model.d_model": 32,
    "model.d_ff": 64,
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
}


def read(name):
    return nbformat.read(COLAB / name, as_version=4)


def code(notebook):
    """The code cells' source by cell id, lines for IPython and the shell replaced by `pass`."""

    def python(line):
        return line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip()[:1] in ("%", "!") else line

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {cell.id: "\n".join(map(python, cell.source.splitlines())) for cell in cells}


@pytest.mark.parametrize("path", sorted(COLAB.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_committed_notebook_is_valid_has_no_outputs_and_defines_no_model(path):
    notebook = read(path.name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count"), f"cell {cell.id}: clear its output"
    for name, source in code(notebook).items():
        classes = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
        assert not classes, f"cell {name} defines {classes}: let the library define them"
        assert "linen" not in source, f"cell {name} builds layers: let the library build them"


def execute(name, **environment):
    """Runs a notebook on one CPU device, and gives each code cell's outputs by cell id."""
    notebook = read(name)
    with pytest.MonkeyPatch.context() as changed:
        for variable, value in {"XLA_FLAGS": QUICK_COMPILING, **environment}.items():
            changed.setenv(variable, value)
        client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(COLAB)}})
        client.execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text(cell_outputs):
    return "".join(output.text for output in cell_outputs if output.output_type == "stream" and output.name == "stdout")


def assert_each_plot_is_drawn(outputs):
    for name, cell_outputs in outputs.items():
        if name.startswith("plot-"):
            assert any("image/png" in output.get("data", {}) for output in cell_outputs), name


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Where chapter 3 trains the model that chapter 4 opens."""
    return tmp_path_factory.mktemp("notebook") / "run"


@pytest.fixture(scope="module")
def training(workdir):
    """Chapter 3, trained to its last step."""
    outputs = execute(
        "3_training.ipynb",
        QUICKSTART_STEPS=str(STEPS),
        QUICKSTART_CHANGES=json.dumps(CHANGES),
        QUICKSTART_WORKDIR=str(workdir),
    )
    steps = {line["kind"]: line["step"] for line in WorkDirectory(workdir).read_metrics()}
    assert steps["train"] == steps["valid"] == STEPS and "test" in steps
    return outputs


def test_chapter_1_looks_words_up_the_more_sharply_the_larger_the_scores_are():
    outputs = execute("1_attention.ipynb")
    assert_each_plot_is_drawn(outputs)
    weights = [float(re.search(r"km ([0-9.]+)", line)[1]) for line in text(outputs["look-up"]).splitlines()]
    assert weights == sorted(weights) and weights[0] < 0.5 < weights[-1]


def test_chapter_2_only_a_mask_before_the_softmax_hides_the_future():
    outputs = execute("2_masks_and_positions.ipynb")
    assert_each_plot_is_drawn(outputs)
    before, after = text(outputs["lesson-plot"]).splitlines()
    assert before.count("1.00") == 3
    assert after.count("1.00") == 1  # the last word, after which there is nothing to hide
    lines = text(outputs["leak-numbers"]).splitlines()
    before, after = (line.split("gathers ")[1].split(", after the change ") for line in lines)
    assert before[0] == before[1]
    assert after[0] != after[1]
    assert float(text(outputs["plot-rotation"]).rpartition(" ")[2]) < 1e-4


def test_chapter_3_trains_and_translates_held_out_phrases_and_one_of_one_s_own(training):
    assert_each_plot_is_drawn(training)
    for name in ("source", "reference", "translation"):
        assert sum(line.split()[:1] == [name] for line in text(training["translate"]).splitlines()) == 8
    assert text(training["own-phrase"]).endswith("\n")


@pytest.mark.usefixtures("training")
def test_chapter_4_opens_the_model_of_chapter_3(workdir):
    outputs = execute("4_inside.ipynb", QUICKSTART_WORKDIR=str(workdir))
    assert_each_plot_is_drawn(outputs)
    lines = text(outputs["next-words"]).splitlines()
    assert lines
    for line in lines:
        probabilities = [float(number) for number in re.findall(r" (0\.\d\d|1\.00)", line)]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) < 1.03


def test_the_glosses_of_the_quick_start_are_what_the_locale_data_says():
    (cell,) = (cell for cell in read("3_training.ipynb").cells if cell.id == "glosses")
    rows = [line.strip("| ").split(" | ") for line in cell.source.splitlines() if line.startswith("| ")][1:]
    kannada, english = (locale_phrases._locale(name) for name in ("kn", "en"))
    kinds = {kind.label: kind for kind in (*locale_phrases.NAMES, *locale_phrases.VALUES)}
    written = [
        ("relative time", ("year", timedelta(days=-46 * 365))),
        ("relative time", ("hour", timedelta(hours=5))),
        ("long date", date(2005, 5, 11)),
        ("quantity", ("duration-day", 3)),
    ]
    pairs = {tuple(kinds[kind].write(locale, thing) for locale in (kannada, english)) for kind, thing in written}
    for names in (("language", "en", "to", "standard"), ("place", "IN", "FR", "or")):
        kind, *codes, style = names
        parts = [[kinds[kind].write(locale, code) for code in codes] for locale in (kannada, english)]
        joined = [
            format_list(part, style, locale=locale) for part, locale in zip(parts, (kannada, english), strict=True)
        ]
        pairs.add(tuple(joined))
    for shown, _, meaning in rows:
        (target,) = (target for source, target in pairs if source == shown)
        assert target in meaning
