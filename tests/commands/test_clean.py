import gzip
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from flax_transformer.commands import clean as command
from flax_transformer.commands.clean import NAMES, STATEFUL
from flax_transformer.data.cleaning import RULES
from flax_transformer.text.spelling import in_one_cell
from tests.data.test_cleaning import BAD, GOOD


def good_pairs(count):
    """Different pairs that break no rule."""
    return [(f"ಇದು ಮನೆ ಸಂಖ್ಯೆ {number} ಆಗಿದೆ", f"this is house number {number}") for number in range(100, 100 + count)]


@pytest.fixture
def clean(run, tmp_path):
    """Cleans pairs, and returns the pairs that stay and the report."""

    def clean(pairs, *options, given=("raw.kn", "raw.en"), made=("clean.kn", "clean.en")):
        for name, side in zip(given, zip(*pairs, strict=True), strict=True):
            (tmp_path / name).write_bytes("".join(f"{text}\n" for text in side).encode("utf-8", "surrogateescape"))
        files = [f"--{side}={tmp_path / name}" for side, name in zip(("source", "target"), given, strict=True)]
        outputs = [f"--output_{side}={tmp_path / name}" for side, name in zip(("source", "target"), made, strict=True)]
        languages = ["--source_language=kn", "--target_language=en"]
        report = run("clean", *files, *outputs, *languages, "--processes=1", *options)
        lines = [(tmp_path / name).read_text(encoding="utf-8").split("\n")[:-1] for name in made]
        return list(zip(*lines, strict=True)), report

    return clean


def test_a_clean_corpus_stays_as_it_is(clean):
    pairs = GOOD + good_pairs(300)
    kept, report = clean(pairs)
    assert kept == pairs
    assert report == f"{len(pairs)} pairs, of which {len(pairs)} stay (100.00 %)\n"


def test_each_rule_is_reported_with_examples_and_cleaning_again_changes_nothing(clean, tmp_path):
    rng = random.Random(0)
    bad = [pair for pairs in BAD.values() for pair in pairs]
    pairs = GOOD + good_pairs(50) + bad + rng.sample(GOOD, 5)
    rng.shuffle(pairs)
    kept, report = clean(pairs, f"--lines={tmp_path / 'lines.tsv'}", "--examples=2")
    assert sorted(kept) == sorted(GOOD + good_pairs(50))
    assert kept == [pair for pair in dict.fromkeys(pairs) if pair in set(kept)]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)  [\d.]+ %$", report, re.MULTILINE)}
    assert counts.keys() == BAD.keys() | {"duplicate"} and counts["duplicate"] == 5
    assert sum(counts.values()) == len(bad) + 5
    assert 2 * len(counts) >= report.count("    line ") > len(counts)
    # Every dropped pair is listed with the number of its line.
    listed = (tmp_path / "lines.tsv").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
    fields = [line.split("\t") for line in listed]
    assert all(tuple(sides) == tuple(map(in_one_cell, pairs[int(number) - 1])) for number, _, *sides in fields)
    assert Counter(rule for _, rule, *_ in fields) == counts
    again, report = clean(kept, given=("clean.kn", "clean.en"), made=("again.kn", "again.en"))
    assert again == kept and "100.00 %" in report


def test_the_help_names_every_rule_in_the_order_in_which_they_are_asked():
    assert (*RULES, *STATEFUL) == NAMES
    assert re.findall(r"^  (\w+)  ", command.__doc__, re.MULTILINE) == [*NAMES]


def test_several_processes_find_the_same(clean, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 100)  # far more chunks than the processes work on ahead
    pairs = [pair for number in range(3) for pair in good_pairs(2100 + number)] + BAD["ratio"]
    assert clean(pairs, "--processes=2") == clean(pairs)


def test_a_dry_run_writes_nothing(clean, run, tmp_path):
    (tmp_path / "a").write_text("ಮನೆ\n\n", encoding="utf-8")
    (tmp_path / "b").write_text("house\nhouse\n")
    options = ("clean", f"--source={tmp_path / 'a'}", f"--target={tmp_path / 'b'}", "--dry_run", "--processes=1")
    report = run(*options)
    assert "2 pairs, of which 1 stay (50.00 %)" in report and "empty" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    # but the list of dropped pairs, which is for reading
    assert run(*options, f"--output_source={tmp_path / 'out'}", f"--lines={tmp_path / 'lines'}") == report
    assert (tmp_path / "lines").read_text() == "2\tempty\t\thouse\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "lines"]


@pytest.mark.parametrize(
    ("kinds", "left"),
    [(["pair"], [0, 2, 3, 4]), (["source"], [0, 2]), (["target"], [0, 3]), (["source", "target"], [0])],
)
def test_duplicates_of_a_pair_a_source_or_a_target(clean, kinds, left):
    pairs = [("ಮನೆ", "house"), ("ಮನೆ", " house"), ("ಒಂದು ಮನೆ", "house"), ("ಮನೆ", "a house"), ("ಒಂದು ಮನೆ", "a house")]
    kept, _ = clean(pairs, "--duplicates", *kinds)
    assert kept == [pairs[number] for number in left]
    assert clean(pairs, "--without", "duplicate")[0] == pairs
    assert clean(pairs, *(f"--duplicates={kind}" for kind in kinds))[0] == kept


def test_what_another_rule_drops_is_not_seen_by_that_of_duplicates(clean):
    pairs = [("ಮನೆ", "this is a house that is very much longer than that"), ("ಮನೆ", "house")]
    assert clean(pairs, "--duplicates", "source")[0] == pairs[1:]


def test_pairs_with_a_side_in_a_held_out_file_are_dropped(clean, tmp_path):
    pairs = [("ಮನೆ", "house"), ("ಮರ", "tree"), ("ಕಲ್ಲು", "stone"), ("ನದಿ", "river")]
    (tmp_path / "test.kn").write_bytes(gzip.compress("ಮನೆ\n\nxyz\n".encode()))
    (tmp_path / "test.en").write_text(" stone \n")
    kept, report = clean(pairs, f"--held_out={tmp_path / 'test.kn'}", f"--held_out={tmp_path / 'test.en'}")
    assert kept == [pairs[1], pairs[3]] and re.search(r"held_out +2  50.00 %", report)


def test_examples_show_controls_but_leave_joiners_as_they_shape_the_letters(clean):
    _, report = clean([("ಕ್ಲಿಪ್\u200cಬೋರ್ಡ್\x07", "clipboard\ufeff")])
    assert "line 1: ಕ್ಲಿಪ್\u200cಬೋರ್ಡ್\\x07 | clipboard\\ufeff" in report


def test_mistakes_are_found_before_anything_is_written(fail, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "c").write_text("x\ny\n")
    a, b, c, out = (str(tmp_path / name) for name in ("a", "b", "c", "out"))
    both, written = [f"--source={a}", f"--target={b}"], [f"--output_source={out}", f"--output_target={out}2"]
    for arguments, message in [
        (both, "--output_source is not given"),
        ([*both, f"--output_source={out}"], "--output_target is not given"),
        ([*both, f"--output_source={a}", f"--output_target={out}"], "which --source reads"),
        ([*both, f"--output_source={out}", f"--output_target={out}"], "--output_source are both"),
        ([*both, "--output_source=-", f"--output_target={out}"], "report goes to standard output"),
        ([*both, "--dry_run", "--source_language=xx"], "script of the language 'xx' is not known"),
        ([*both, "--dry_run", "--max_ratio=0.5"], "--max_ratio is 0.5: it must be at least 1"),
        ([*both, "--dry_run", "--without", "ratoi"], "ratoi"),
        ([*both, "--dry_run", "--min_script=0.9"], "--min_script needs --source_language or --target_language"),
        ([*both, "--dry_run", f"--held_out={c}", "--without=held_out"], "--without leaves their rule out"),
        ([*both, "--output_source=/dev/stdout", f"--output_target={out}"], "report goes to standard output"),
        ([f"--source={a}", f"--target={c}", *written], "ends after line 1"),
        ([f"--source={a}", "--target=missing", *written], "cannot read missing"),
        ([*both, f"--output_source={out}.gz", f"--output_target={out}"], "outputs are not compressed"),
        (["--source=-", "--target=-", "--dry_run"], "standard input can be only one of them"),
    ]:
        assert message in fail("clean", *arguments)
    assert not list(tmp_path.glob("out*"))


def test_a_stream_that_has_fewer_lines_is_an_error(fail, tmp_path):
    (tmp_path / "c").write_text("x\n")
    options = ("clean", "--source=-", f"--target={tmp_path / 'c'}", "--processes=1")
    # The standard input of a test has no lines.
    assert fail(*options, "--dry_run").endswith(f"line i of - must belong to line i of {tmp_path / 'c'}")
    message = fail(*options, f"--output_source={tmp_path / 'o1'}", f"--output_target={tmp_path / 'o2'}")
    assert "standard input ends after line 0: line i of -" in message
    assert message.endswith(f"(incomplete: {tmp_path / 'o1'}, {tmp_path / 'o2'})")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_a_full_disk_is_an_error_that_says_what_is_incomplete(fail, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"a house {name}\n")
    files = [f"--source={tmp_path / 'a'}", f"--target={tmp_path / 'b'}", f"--output_target={tmp_path / 'out'}"]
    said = fail("clean", *files, "--output_source=/dev/full", "--processes=1")
    assert said.endswith(f"No space left on device (incomplete: /dev/full, {tmp_path / 'out'})")
