"""A picture of the attention is written, and of one translation as of another."""

import struct

import pytest

pytest.importorskip("matplotlib")


def size(path):
    """Width and height in pixels, from the header of a PNG file."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_the_translation_is_printed_and_its_attention_drawn(run, workdir, tmp_path):
    short = f"--workdir={workdir}", "--min_length=3", "--max_length=5"
    translated = run("translate", *short, "red cat runs")
    aligned = run("align", *short, f"--output={tmp_path / 'a.png'}", "red cat runs")
    assert aligned == translated != "\n"
    # A longer translation has more rows.
    given = "red cat runs " * 6
    assert given.strip() in run(
        "align", f"--workdir={workdir}", f"--output={tmp_path / 'b.png'}", f"--translation={given}", "red cat runs"
    )
    assert size(tmp_path / "b.png")[1] > size(tmp_path / "a.png")[1]


def test_mistakes_are_found_before_a_model_is_loaded(fail, unloaded, workdir, tmp_path):
    output = f"--output={tmp_path / 'no' / 'a.png'}"
    assert "there is no folder" in fail("align", f"--workdir={workdir}", output, "red cat")
    assert "SENTENCE" in fail("align", f"--workdir={workdir}", f"--output={tmp_path / 'a.png'}")
    assert "known ending: choose" in fail("align", f"--workdir={workdir}", f"--output={tmp_path / 'a.txt2'}", "red cat")


def test_a_sentence_that_is_translated_in_parts_is_not_drawn(fail, workdir, tmp_path):
    output = tmp_path / "a.png"
    said = fail("align", f"--workdir={workdir}", f"--output={output}", "the cat sat. " * 30)
    assert "has more than 40 tokens and was translated in parts: align each part" in said and not output.exists()


def test_a_layer_that_does_not_exist_is_an_error_and_nothing_is_written(fail, workdir, tmp_path):
    said = fail("align", f"--workdir={workdir}", f"--output={tmp_path / 'a.png'}", "--layer=1", "red cat")
    assert "layer is 1" in said and not (tmp_path / "a.png").exists()
