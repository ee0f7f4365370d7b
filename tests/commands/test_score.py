import json
import math
import re

import pytest

from flax_transformer.decoding.scoring import TooLong
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator

TARGETS = ["the red cat", "up", "a dog sat on it", "", "mouse", "is it new", "the the the"]


@pytest.fixture
def pairs(source, tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("".join(f"{line}\n" for line in TARGETS), encoding="utf-8")
    return ("--source", source, "--target", target), source.read_text(encoding="utf-8").splitlines()


def test_each_pair_has_the_translators_numbers(run, workdir, pairs, translator):
    files, sources = pairs
    rows = [line.split("\t") for line in run("score", "--workdir", workdir, *files).splitlines()]
    expected = translator.score(sources, TARGETS)
    for number, (row, one) in enumerate(zip(rows, expected, strict=True), 1):
        assert (row[0], row[2]) == (str(number), str(len(one.tokens)))
        assert [float(row[1]), float(row[3])] == pytest.approx([one.log_prob, one.score], abs=1e-4)


def test_tab_separated_pairs_on_standard_input_give_the_same_scores(run, workdir, pairs):
    files, sources = pairs
    table = "".join(f"{source}\t{target}\n" for source, target in zip(sources, TARGETS, strict=True))
    assert run("score", "--workdir", workdir, given=table) == run("score", "--workdir", workdir, *files)


def test_the_summary_adds_up(workdir, pairs, capsys, run):
    from flax_transformer.__main__ import main

    files, _ = pairs
    main(["score", "--workdir", workdir, *map(str, files)])
    written = capsys.readouterr()
    rows = [line.split("\t") for line in written.out.splitlines()]
    log_prob, tokens = sum(float(row[1]) for row in rows), sum(int(row[2]) for row in rows)
    said = re.fullmatch(r"7 pairs, (\d+) tokens, log-probability (\S+), perplexity (\S+) per token\n", written.err)
    assert int(said[1]) == tokens and float(said[2]) == pytest.approx(log_prob, abs=1e-2)
    assert float(said[3]) == pytest.approx(math.exp(-log_prob / tokens), rel=1e-3)


def test_jsonl_has_the_log_probability_of_each_token(run, workdir, pairs):
    files, sources = pairs
    for line, source in zip(
        run("score", "--workdir", workdir, *files, "--format=jsonl").splitlines(), sources, strict=True
    ):
        one = json.loads(line)
        assert one["source"] == source and one["text"] == TARGETS[one["line"] - 1]
        assert one["log_prob"] == pytest.approx(sum(one["token_log_probs"]), abs=1e-4)


def test_the_length_penalty_determines_the_score(run, workdir, pairs):
    files, _ = pairs
    said = run("score", "--workdir", workdir, *files, "--length_penalty=length", "--alpha=1")
    for log_prob, tokens, score in (map(float, line.split("\t")[1:]) for line in said.splitlines()):
        assert score == pytest.approx(log_prob / tokens, abs=1e-4)


def test_translations_of_translate_get_the_same_scores(run, workdir, tmp_path, translator):
    # Short ones, since the vocabulary may split a text into other pieces than the search chose, which gives another
    # score.
    sentences = ["the cat", "up", "a dog sat on it", "mouse"]
    found = translator.hypotheses(sentences, BeamSearch(num_return=4, max_length=3))
    pairs = [(sentence, one) for sentence, several in zip(sentences, found, strict=True) for one in several]
    table = "".join(f"{sentence}\t{one.text}\n" for sentence, one in pairs)
    lines = run("score", "--workdir", workdir, "--format=jsonl", given=table).splitlines()
    scored = [(json.loads(line), one) for line, (_, one) in zip(lines, pairs, strict=True)]
    same = [(line, one) for line, one in scored if line["ids"] == [*one.ids]]
    assert len(same) > 4
    for line, one in same:
        assert line["score"] == pytest.approx(one.score, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (["--source={source}"], "", r"--source and --target belong together"),
        (["--target={source}"], "", r"--source and --target belong together"),
        (["--source={source}", "--target={short}"], "", r"has 7 lines, .* has 1 lines: line i of"),
        (["--source={source}", "--target=none"], "", r"cannot read none .*check the path"),
        (["--source={source}", "--target={source}", "--output={source}"], "", r"--source reads"),
        (["--source=-", "--target=-"], "", r"only one of them; .*leave both out and write pairs to standard input"),
        (["--alpha=x"], "", r"--alpha: invalid float value"),
    ],
)
def test_a_mistake_is_an_error_of_one_line_before_the_model_loads(
    fail, unloaded, workdir, source, tmp_path, options, given, message
):
    (tmp_path / "short").write_text("one\n")
    options = [option.format(source=source, short=tmp_path / "short") for option in options]
    assert re.search(message, fail("score", "--workdir", workdir, *options, given=given))


def test_a_line_without_a_tab_and_an_empty_input_are_errors(fail, workdir):
    assert "standard input:2: there is no tab" in fail("score", "--workdir", workdir, given="a\tb\nc\n")
    assert "there are no pairs" in fail("score", "--workdir", workdir)


def test_an_empty_input_leaves_the_output_as_it_was(fail, workdir, tmp_path):
    (tmp_path / "scores").write_text("kept")
    assert "the input is empty" in fail("score", "--workdir", workdir, "--output", tmp_path / "scores", given="")
    assert (tmp_path / "scores").read_text() == "kept"


def test_a_line_with_more_tokens_than_learned_positions_is_named(fail, workdir, monkeypatch):
    def score(self, sources, targets, search):
        raise TooLong(sources.index("long"), 300, 256)

    monkeypatch.setattr(Translator, "score", score)
    said = fail("score", "--workdir", workdir, given="a\tb\nlong\tb\n")
    assert "line 2: a side has 300 tokens, and the model has learned 256 positions: leave the pair out" in said
