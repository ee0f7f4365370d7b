"""The output of a command has one line per sentence, and marks sentences that the model could hardly read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flax_transformer.decoding.translator import Translation, Translator

ROOT = Path(__file__).parents[2]
CAPTURED = {"capture_output": True, "encoding": "utf-8"}
ENDS = ["\n", "\r", "\r\n", "\u2028", "\x0b", "\x85"]


@pytest.fixture
def writes_line_ends(monkeypatch):
    """A model that learned to write line ends and tabs."""

    def hypotheses(self, sentences, search, **options):
        return [[Translation(text=f"a{end}b\tc{end}")] for end, _ in zip(ENDS, sentences, strict=False)]

    monkeypatch.setattr(Translator, "hypotheses", hypotheses)


@pytest.mark.parametrize("form", ["text", "tsv"])
def test_a_translation_is_one_line_whatever_it_contains(run, workdir, writes_line_ends, form):
    said = run("translate", "--workdir", workdir, f"--format={form}", given="the cat\n" * len(ENDS))
    lines = said.removesuffix("\n").split("\n")
    assert len(lines) == len(said.splitlines()) == len(ENDS)
    if form == "text":
        assert lines == ["a b\tc "] * len(ENDS)
    else:
        assert [line.split("\t")[3:] for line in lines] == [["a b c "]] * len(ENDS)


def test_jsonl_keeps_line_ends(run, workdir, writes_line_ends):
    said = run("translate", "--workdir", workdir, "--format=jsonl", given="the cat\n" * len(ENDS))
    texts = [json.loads(line)["hypotheses"][0]["text"] for line in said.removesuffix("\n").split("\n")]
    assert texts == [f"a{end}b\tc{end}" for end in ENDS]


def test_written_translations_of_an_evaluation_are_one_line_each(run, workdir, writes_line_ends, tmp_path):
    for name in ("source", "reference"):
        (tmp_path / name).write_text("the cat\n" * len(ENDS), encoding="utf-8")
    files = (f"--source={tmp_path / 'source'}", f"--reference={tmp_path / 'reference'}")
    run("evaluate", "--workdir", workdir, *files, f"--translations={tmp_path / 'out'}")
    assert (tmp_path / "out").read_text(encoding="utf-8").splitlines() == ["a b\tc "] * len(ENDS)


def test_unreadable_sentences_are_marked_in_jsonl_and_counted_in_one_warning_for_the_file(workdir, tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("the cat\n日本語\nthe old ☃\n日本\nup\n", encoding="utf-8")
    options = ["--workdir", workdir, "--format=jsonl", "--buffer_lines=2", "--input", source]
    # In its own process, because the shape checks of tests add stack frames between a warning and its line.
    said = subprocess.run([sys.executable, "-m", "flax_transformer", "translate", *options], cwd=ROOT, **CAPTURED)
    marks = [
        (line.get("unknown_characters"), line.get("unknown_share"))
        for line in map(json.loads, said.stdout.removesuffix("\n").split("\n"))
    ]
    assert marks == [(None, None), ("日本語", 1.0), ("☃", pytest.approx(1 / 7, abs=1e-6)), ("日本", 1.0), (None, None)]
    (warning,) = said.stderr.splitlines()
    assert "2 of 5 sentences" in warning and "日本語" in warning
