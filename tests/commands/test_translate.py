import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from flax_transformer.decoding.results import Translation
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.marian_shortlist import write_shortlist
from flax_transformer.trained_model import TrainedModel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lines(source):
    return source.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def expected(translator, lines):
    return translator.hypotheses(lines, BeamSearch(beam_size=3, num_return=2))


def test_sentences_on_the_command_line_are_translated_as_those_of_a_file(run, fail, workdir, tmp_path, monkeypatch):
    sentences = ["red cat runs", "", "the dog sat"]
    (tmp_path / "file").write_text("".join(f"{sentence}\n" for sentence in sentences))
    from_file = run("translate", f"--workdir={workdir}", f"--input={tmp_path / 'file'}", "--beam_size=2")
    assert run("translate", f"--workdir={workdir}", "--beam_size=2", *sentences) == from_file
    assert from_file.count("\n") == 3
    both = fail("translate", f"--workdir={workdir}", f"--input={tmp_path / 'file'}", "red cat")
    assert "--input cannot be combined with sentences on the command line" in both
    assert "--interactive" in fail("translate", f"--workdir={workdir}", "--interactive", "red cat")
    given = (tmp_path / "file").read_text()
    assert run("translate", f"--workdir={workdir}", "--beam_size=2", "-", given=given) == from_file
    taken = fail("translate", "--workdir", workdir, "red cat")
    assert "--workdir names red cat, which does not exist: if it is a sentence, put it first" in taken
    warned = []
    monkeypatch.setattr(warnings, "warn", lambda text, *_, **__: warned.append(str(text)))
    run("translate", f"--workdir={workdir}", "--beam_size=2", str(tmp_path / "file"))
    assert "is translated as a sentence: --input= names a file" in warned[0]


def test_a_sentence_that_begins_with_a_dash_is_not_given_another(run, workdir, translator, monkeypatch):
    seen = []

    def hypotheses(self, sentences, search, **options):
        seen.extend(sentences)
        return [[Translation(text="x")] for _ in sentences]

    monkeypatch.setattr(Translator, "hypotheses", hypotheses)
    run("translate", f"-workdir={workdir}", "-beam_size=1", "-the cat runs")
    run("translate", f"--workdir={workdir}", "--beam_size=1", "-hello there")
    run("translate", f"--workdir={workdir}", "--beam_size=1", "--", "-ab")
    assert seen == ["-the cat runs", "-hello there", "-ab"]


def test_each_line_of_a_file_has_its_translation_and_empty_lines_stay_empty(run, workdir, source, translator, lines):
    said = run("translate", "--workdir", workdir, "--input", source).split("\n")
    assert said == [*translator.translate(lines), ""]
    assert len(set(said)) == len(set(lines)) and said[lines.index("")] == ""


def test_mbr_chooses_among_samples_of_the_seed(run, workdir, source, translator, lines):
    options = ("--mbr=5", "--max_length=6", "--seed=1")
    expected = translator.translate(lines, Sampling(mbr=5, max_length=6), seed=1)
    assert run("translate", "--workdir", workdir, "--input", source, *options).split("\n") == [*expected, ""]


def test_standard_input_and_an_output_file_give_the_same_translations(run, workdir, source, tmp_path):
    said = run("translate", "--workdir", workdir, "--input", source)
    output = tmp_path / "out.txt"
    assert run("translate", "--workdir", workdir, "--output", output, given=source.read_text(encoding="utf-8")) == ""
    assert output.read_bytes() == said.encode()


def test_a_byte_order_mark_carriage_returns_and_the_last_line_feed_are_not_text(run, workdir, source):
    data = b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    said = run("translate", "--workdir", workdir, "--input", source)
    assert run("translate", "--workdir", workdir, given=data) == said


@pytest.mark.slow
def test_a_small_buffer_changes_nothing(run, workdir, source):
    said = run("translate", "--workdir", workdir, "--input", source, "--beam_size=1")
    assert run("translate", "--workdir", workdir, "--input", source, "--beam_size=1", "--buffer_lines=2") == said


def test_tsv_has_a_row_for_each_rank(run, workdir, source, expected):
    said = run("translate", "--workdir", workdir, "--input", source, "--beam_size=3", "--nbest=2", "--format=tsv")
    rows = [row.split("\t") for row in said.splitlines()]
    wanted = [
        (str(number), str(rank), one.text)
        for number, several in enumerate(expected, 1)
        for rank, one in enumerate(several, 1)
    ]
    assert [(number, rank, text) for number, rank, _, text in rows] == wanted
    scores = [one.score for several in expected for one in several]
    np.testing.assert_allclose([float(score) for _, _, score, _ in rows], scores, atol=1e-4)


def test_jsonl_has_all_fields_of_a_hypothesis(run, workdir, source, lines, expected):
    said = run("translate", "--workdir", workdir, "--input", source, "--beam_size=3", "--nbest=2", "--format=jsonl")
    objects = [json.loads(line) for line in said.splitlines()]
    assert [each["line"] for each in objects] == [*range(1, len(lines) + 1)]
    assert [each["source"] for each in objects] == lines
    for each, several in zip(objects, expected, strict=True):
        assert [one["text"] for one in each["hypotheses"]] == [one.text for one in several]
        for one in each["hypotheses"]:
            assert len(one["tokens"]) == len(one["token_log_probs"])
            assert one["log_prob"] == pytest.approx(sum(one["token_log_probs"]), abs=1e-4)


def test_the_attention_of_each_target_token_sums_to_one(run, workdir, source):
    said = run("translate", "--workdir", workdir, "--input", source, "--format=jsonl", "--alignment")
    for each in map(json.loads, said.splitlines()):
        (one,) = each["hypotheses"]
        alignment = one["alignment"]
        assert alignment["target_tokens"] == one["tokens"]
        assert len(alignment["weights"]) == len(one["tokens"])
        for row in alignment["weights"]:
            assert len(row) == len(alignment["source_tokens"]) and sum(row) == pytest.approx(1.0, abs=1e-3)


def test_a_translation_begins_as_its_prefix_says(run, workdir, source, lines, tmp_path):
    prefixes = ["the red cat", "", "dog", "", "a", "", "old mouse"]
    file = tmp_path / "prefixes.txt"
    file.write_text("\n".join(prefixes), encoding="utf-8")
    said = run("translate", "--workdir", workdir, "--input", source, "--prefixes", file).splitlines()
    free = run("translate", "--workdir", workdir, "--input", source).splitlines()
    for line, prefix, translation, other in zip(lines, prefixes, said, free, strict=True):
        assert translation.startswith(prefix if line else "")
        assert prefix or translation == other


@pytest.mark.slow
def test_samples_follow_the_seed(run, workdir, source):
    sample = ("translate", "--workdir", workdir, "--input", source, "--sample", "--temperature=2", "--top_k=20")
    first = run(*sample, "--seed=1")
    assert run(*sample, "--seed=1") == first
    assert run(*sample, "--seed=2") != first
    assert first != run("translate", "--workdir", workdir, "--input", source)


def test_limits_are_kept(run, workdir, source):
    said = run("translate", "--workdir", workdir, "--input", source, "--format=jsonl", "--max_length=5")
    lengths = [len(each["hypotheses"][0]["tokens"]) for each in map(json.loads, said.splitlines())]
    assert max(lengths) == 5
    limits = ("--format=jsonl", "--min_length=7", "--max_length=9", "--no_repeat_ngram=2")
    said = run("translate", "--workdir", workdir, "--input", source, *limits)
    for each in map(json.loads, said.splitlines()):
        tokens = each["hypotheses"][0]["tokens"]
        assert not tokens or 7 <= len(tokens) <= 9
        assert len({*zip(tokens, tokens[1:], strict=False)}) == max(len(tokens) - 1, 0)


def test_several_checkpoints_make_an_ensemble(run, workdir, source, translator, lines):
    others = [TrainedModel.load(workdir, step=step) for step in (2, 3)]
    expected = Translator(others).translate(lines)
    assert expected != translator.translate(lines)
    said = run("translate", "--workdir", workdir, workdir, "--checkpoint", 2, 3, "--input", source)
    assert said.splitlines() == expected
    assert run("translate", "--workdir", workdir, "--checkpoint", 2, "latest", "--input", source) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input={folder}/none.txt"], r"none.txt .*check the path"),
        (["--input={folder}"], r"cannot read .*check the path"),
        (["--input={latin}"], r"latin.txt:2: byte 3 of the line, 0xe9, is not UTF-8: convert"),
        (["--output={folder}/none/out.txt"], r"there is no folder .*none"),
        (["--output={folder}"], r"a folder: name a file"),
        (["--output={source}"], r"--input reads"),
        (["--output={folder}/out.txt.gz"], r"outputs are not compressed"),
        (["--output="], r"--output: the name is empty"),
        (["--workdir="], r"--workdir: the name is empty"),
        (["--output={folder}/hard.txt"], r"--input reads"),
        (["--output={workdir}/config.json"], r"belongs to the work directory"),
        (["--input=-", "--prefixes=-"], r"standard input can be only one of them"),
        (["--prefixes={latin}"], r"latin.txt:2: byte 3"),
        (["--prefixes={short}"], r"source.txt has 7 lines, .*short.txt has 1 lines"),
        (["--nbest=2"], r"--nbest is 2, .*--format=tsv or jsonl"),
        (["--nbest=9", "--format=tsv"], r"--nbest is 9, but beam_size is 4"),
        (["--alignment"], r"--alignment .*--format=jsonl"),
        (["--beam_size=0"], r"--beam_size is 0: it must be at least 1"),
        (["--beam_size=x"], r"--beam_size: 'x': give a whole number"),
        (["--sample", "--beam_size=4"], r"--beam_size .*beam search .*--sample"),
        (["--top_k=3"], r"--top_k .*sampling .*--sample"),
        (["--sample", "--temperature=0"], r"--temperature is 0.0: it must be above 0"),
        (["--length_penalty=none"], r"--length_penalty: invalid choice: 'none'"),
        (["--checkpoint=newest"], r"--checkpoint: 'newest': choose chosen, best, latest, averaged or the number"),
        (
            ["--checkpoint", "1", "2", "--workdir", "a", "b", "c"],
            r"2 values of --checkpoint for 4 of --workdir",
        ),
        (["--interactive"], r"--input cannot be combined with --interactive"),
        (["--beam-size=3"], r"--beam-size.* --beam_size\?"),
        (["--buffer_lines=0"], r"--buffer_lines: '0': give a whole number above 0"),
    ],
)
def test_a_mistake_is_an_error_of_one_line_before_the_model_loads(
    fail, unloaded, workdir, source, tmp_path, options, message
):
    (tmp_path / "latin.txt").write_bytes("the\ncaf\xe9 1\n".encode("latin-1").replace(b"caf", b"ca"))
    (tmp_path / "short.txt").write_text("one\n")
    (tmp_path / "hard.txt").hardlink_to(source)
    names = {
        "workdir": workdir,
        "folder": tmp_path,
        "source": source,
        "latin": tmp_path / "latin.txt",
        "short": tmp_path / "short.txt",
    }
    options = [option.format(**names) for option in options]
    said = fail("translate", "--workdir", workdir, "--input", source, *options)
    assert said.startswith("flax-transformer translate: ")
    assert re.search(message, said), said
    assert source.read_text(encoding="utf-8")  # also if it was given as the output


def test_a_layer_that_does_not_exist_is_an_error_before_anything_is_translated(fail, workdir, monkeypatch):
    monkeypatch.setattr(Translator, "hypotheses", None)
    said = fail("translate", "--workdir", workdir, "--format=jsonl", "--alignment=1", given="the cat\n")
    assert re.search(r"layer is 1, the decoder has 1: choose", said)


def test_lines_before_one_that_is_not_text_are_translated(fail, workdir, translator, tmp_path):
    output = tmp_path / "out.txt"
    said = fail("translate", "--workdir", workdir, "--output", output, given=b"the cat\na dog\n\xff\nold\n")
    assert "standard input:3: byte 1 of the line, 0xff, is not UTF-8" in said
    assert output.read_text(encoding="utf-8").splitlines() == translator.translate(["the cat", "a dog"])


def test_a_prompt_answers_each_sentence_until_the_input_ends(run, workdir, translator):
    said = run("translate", "--workdir", workdir, "--interactive", given="the cat\na dog sat\n")
    for translation in translator.translate(["the cat", "a dog sat"]):
        assert translation in said
    assert said.endswith("\n")


def test_a_prompt_streams_pieces_if_the_search_has_one_hypothesis(run, workdir, translator, monkeypatch):
    streamed = []
    stream = Translator.stream

    def watch(self, *arguments, **options):
        for piece in stream(self, *arguments, **options):
            streamed.append(piece)
            yield piece

    monkeypatch.setattr(Translator, "stream", watch)
    said = run("translate", "--workdir", workdir, "--interactive", "--beam_size=1", given="the cat\n")
    translation = translator.translate(["the cat"], BeamSearch(beam_size=1))[0]
    assert "".join(streamed) == translation and translation in said


def test_a_prompt_shows_each_of_the_n_best_with_its_score(run, workdir, translator):
    said = run("translate", "--workdir", workdir, "--interactive", "--nbest=3", given="the cat\n")
    for one in translator.hypotheses(["the cat"], BeamSearch(num_return=3))[0]:
        assert f"{one.score:.3f}"[:-1] in said and one.text in said


def test_ctrl_c_leaves_the_prompt_without_an_error(run, workdir, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run("translate", "--workdir", workdir, "--interactive").endswith("\n")


def start(workdir, source):
    """The program in its own process."""
    command = [sys.executable, "-m", "flax_transformer", "translate", "--workdir", workdir, "--input", str(source)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_sentence_that_is_too_long_gives_a_warning_of_one_line(workdir, source, translator):
    source.write_text("the cat sat. " * 30 + "\nthe cat\n")
    said, warned = start(workdir, source).communicate()
    long, short = said.splitlines()
    assert long and short == translator.translate(["the cat"])[0]
    assert re.fullmatch(r"flax-transformer translate: warning: .* is longer than model.max_length = 40: .*\n", warned)


def test_a_reader_that_closes_the_pipe_ends_the_program_silently(workdir, source):
    with start(workdir, source) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + 13  # SIGPIPE, as a shell reports it


@pytest.fixture
def listed(workdir, translator, tmp_path):
    """A copy of the work directory, whose sentences may be translated with their own words alone."""
    size, shares_ids = translator.vocabularies.source.size, translator.vocabularies.shares_ids
    chosen = Shortlist(3, np.zeros(size + 1, int), np.zeros(0, np.int32), joint=shares_ids)
    folder = shutil.copytree(workdir, tmp_path / "listed")
    write_shortlist(folder / "shortlist.bin", chosen)
    return folder


def test_the_shortlist_of_a_work_directory_or_a_file_restricts_the_search_unless_it_is_switched_off(
    run, fail, workdir, listed, source
):
    def said(folder, *options):
        return run("translate", "--workdir", folder, "--input", source, "--beam_size=2", *options)

    free, restricted = said(workdir), said(listed)
    assert restricted != free == said(listed, "--no_shortlist")
    assert said(workdir, "--shortlist", listed / "shortlist.bin") == restricted
    assert "not allowed with argument" in fail("translate", "--workdir", listed, "--shortlist=a", "--no_shortlist")
    assert "is not a binary shortlist" in fail(
        "translate", "--workdir", workdir, "--shortlist", source, "--input", source
    )


def test_given_translations_are_scored_over_all_tokens_even_with_a_shortlist(run, workdir, listed):
    pair = "a dog runs\tthe cat sat\n"
    assert run("score", "--workdir", workdir, given=pair) == run("score", "--workdir", listed, given=pair)


def test_a_damaged_shortlist_is_an_error_that_names_the_work_directory(fail, listed, source):
    (listed / "shortlist.bin").write_bytes((listed / "shortlist.bin").read_bytes()[:-3])
    assert f"{listed}/shortlist.bin is damaged" in fail("translate", "--workdir", listed, "--input", source)


PAGE = "<!DOCTYPE html>\n<h1 title='old'>The dog</h1>\n<p>it is <b>old</b> &amp; slow.<br>\n"


def test_a_page_of_html_is_translated_as_a_whole(run, workdir, tmp_path):
    page, output = tmp_path / "page.html", tmp_path / "out.html"
    page.write_bytes(PAGE.encode())
    assert run("translate", "--workdir", workdir, "--markup", "--input", page, "--output", output) == ""
    said = output.read_text()
    wanted = ["<!DOCTYPE html>", '<h1 title="old">', "</h1>", "<p>", "<b>", "</b>", "<br>", "</p>"]
    assert sorted(re.findall("<[^>]+>", said)) == sorted(wanted)
    assert run("translate", "--workdir", workdir, "--markup", given=PAGE) == said


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--markup", "--format=tsv"), "--format is for lines, and --markup translates a whole page"),
        (("--markup", "--prefixes=x"), "--prefixes is for lines"),
        (("--markup", "--nbest=2"), "--nbest is 2, but --markup writes the page once"),
        (("--markup", "--interactive"), "--markup cannot be combined with --interactive"),
        (("--replace_unknown", "--interactive"), "--replace_unknown cannot be combined with --interactive"),
    ],
)
def test_options_that_do_not_go_with_pages(fail, unloaded, options, error):
    assert error in fail("translate", "--workdir=runs/x", *options)


def test_unknown_characters_are_copied_if_asked_for(run, workdir, translator):
    line = "the \u2603 dog"
    said = run("translate", "--workdir", workdir, "--replace_unknown", given=f"{line}\n")
    assert said == f"{translator.translate([line], replace_unknown=True)[0]}\n"
