import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from sacrebleu.metrics.base import Score

from flax_transformer.commands.corpus_scores import Judge, System, report
from flax_transformer.workdir import WorkDirectory

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()


def sentence(number):
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, rng.integers(1, 7)))


@pytest.fixture(scope="module")
def translations(translator):
    return translator.translate([sentence(number) for number in range(23)])


@pytest.fixture
def files(tmp_path, translations):
    """Sources, and references two in three of which are the model's translations, so that it is good, not perfect."""
    source, reference = tmp_path / "source.txt", tmp_path / "reference.txt"
    source.write_text("".join(f"{sentence(number)}\n" for number in range(23)), encoding="utf-8")
    lines = [line if number % 3 else f"{line} the cat ." for number, line in enumerate(translations)]
    reference.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return source, reference


def evaluate(run, workdir, files, *options):
    return run("evaluate", "--workdir", workdir, "--source", files[0], "--reference", files[1], *options)


@pytest.mark.slow
def test_scores_and_signatures_equal_those_of_the_sacrebleu_command(run, workdir, files, tmp_path, translations):
    written = tmp_path / "translations.txt"
    report = json.loads(evaluate(run, workdir, files, "--output=json", "--translations", written))
    assert written.read_text(encoding="utf-8").splitlines() == translations
    command = [sys.executable, "-m", "sacrebleu", files[1], "-i", written, "-m", "bleu", "chrf", "ter", "-w", "9"]
    peers = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    for peer, name in zip(peers, ("bleu", "chrf", "ter"), strict=True):
        assert report[name] == pytest.approx(peer["score"], abs=1e-6)
        assert report["signatures"][name] == peer["signature"]
    assert 20 < report["bleu"] < 99
    ratio = float(re.search(r"ratio = ([0-9.]+)", peers[0]["verbose_score"])[1])
    assert report["length_ratio"] == pytest.approx(ratio, abs=1e-3)
    assert report["sentences"] == 23
    assert report["sentences_per_second"] == pytest.approx(23 / report["seconds"])


@pytest.mark.slow
def test_the_default_tokeniser_is_that_of_training_or_of_the_script(run, workdir, broken, files, tmp_path, monkeypatch):
    def tokeniser(folder, files, *options):
        report = json.loads(evaluate(run, folder, files, "--output=json", *options))
        return re.search("tok:([^|]+)", report["signatures"]["bleu"])[1]

    chinese = tmp_path / "chinese.txt"
    chinese.write_text("我们明天去北京看朋友\n" * 23, encoding="utf-8")
    assert tokeniser(workdir, files) == "13a" and tokeniser(workdir, (files[0], chinese)) == "zh"
    config = WorkDirectory(broken).read_config()
    # The second one as config.json was before the section had sections.
    for chosen in ({"evaluation": {"tokenize": "char"}}, {"tokenize": "char"}):
        WorkDirectory(broken).write_config(config | {"training": chosen})
        assert tokeniser(broken, files) == "char"
    assert tokeniser(broken, (files[0], chinese)) == "char"
    assert tokeniser(broken, files, "--tokenize=intl") == "intl"
    # Both are scored with one tokeniser, although their trainings used different ones.
    assert tokeniser(broken, files, "--compare", broken) == "char"
    assert tokeniser(broken, files, "--tokenize=13a", "--compare", broken) == "13a"
    warned = []
    monkeypatch.setattr(
        "flax_transformer.commands.corpus_scores.warn_of_missing_spaces", lambda *said: warned.append(said)
    )
    tokeniser(workdir, (files[0], chinese), "--tokenize=13a")
    assert [(tokenize, setting) for tokenize, _, setting in warned] == [("13a", "--tokenize")]


def test_text_shows_the_same_numbers(run, workdir, files):
    report = json.loads(evaluate(run, workdir, files, "--output=json"))
    said = evaluate(run, workdir, files)
    for name in ("bleu", "chrf", "ter"):
        assert f"{report[name]:.2f}" in said
        assert report["signatures"][name] in said
    assert f"{report['length_ratio']:.3f}" in said and workdir in said


def test_a_corpus_gives_both_sides(run, workdir, files):
    both = json.loads(evaluate(run, workdir, files, "--output=json"))
    corpus = f"files:{files[0]},{files[1]}"
    report = json.loads(run("evaluate", "--workdir", workdir, "--corpus", corpus, "--output=json"))
    timing = {"seconds", "sentences_per_second"}
    assert {key: report[key] for key in report.keys() - timing} == {key: both[key] for key in both.keys() - timing}


@pytest.mark.slow
def test_the_options_of_the_search_are_used(run, workdir, files):
    short = json.loads(evaluate(run, workdir, files, "--output=json", "--max_length=3"))
    assert short["search"] == "a beam of 4, alpha 0.6"
    assert "translated with greedy search" in evaluate(run, workdir, files, "--beam_size=1")
    assert short["length_ratio"] < json.loads(evaluate(run, workdir, files, "--output=json"))["length_ratio"]


def test_a_better_model_is_significantly_better(run, workdir, files):
    compare = ("--compare", workdir, "--compare_checkpoint=2")
    report = json.loads(evaluate(run, workdir, files, "--output=json", *compare))
    assert report["bleu"] > report["compare"]["bleu"] and report["ter"] < report["compare"]["ter"]
    assert report["compare"]["models"] == [{"workdir": workdir, "checkpoint": 2}]
    assert 0 < report["compare"]["p_values"]["bleu"] < 0.05
    assert "|bs:1000|seed:" in report["signatures"]["bleu"]
    said = evaluate(run, workdir, files, *compare)
    model = rf"{re.escape(workdir)} \(chosen\)"
    assert re.search(rf"^BLEU: {model} is better by .*, significantly: equally good models would rarely", said, re.M)
    assert re.search(rf"^TER: {model} is (better|ahead) by ", said, re.M)  # though less of it is better


def test_a_model_is_not_better_than_itself(run, workdir, files):
    said = evaluate(run, workdir, files, "--compare", workdir)
    for name in ("BLEU", "chrF", "TER"):
        assert f"{name}: both score the same." in said
    report = json.loads(evaluate(run, workdir, files, "--compare", workdir, "--output=json"))
    assert set(report["compare"]["p_values"].values()) == {1.0}


def test_several_references_and_the_translations_of_another_system(run, workdir, files, tmp_path, translations):
    other, theirs = tmp_path / "other.txt", tmp_path / "theirs.txt"
    other.write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    theirs.write_text("".join(f"{line[: len(line) // 2]} on\n" for line in translations), encoding="utf-8")
    options = ("--source", files[0], "--reference", files[1], other, "--compare_translations", theirs)
    options += ("--chrf_word_order=2", "--metrics", "bleu", "chrf")
    report = json.loads(run("evaluate", "--workdir", workdir, *options, "--output=json"))
    assert [report["bleu"], report["chrf++"]] == pytest.approx([100, 100]) and "ter" not in report
    assert "nrefs:2" in report["signatures"]["bleu"] and "nw:2" in report["signatures"]["chrf++"]
    command = [sys.executable, "-m", "sacrebleu", files[1], other, "-i", theirs, "-m", "bleu", "chrf"]
    peers = subprocess.run([*command, "--chrf-word-order", "2", "-w", "9"], capture_output=True, check=True, text=True)
    for peer, name in zip(json.loads(peers.stdout), ("bleu", "chrf++"), strict=True):
        assert report["compare"][name] == pytest.approx(peer["score"], abs=1e-6)
        assert 0 < report["compare"]["p_values"][name] < 0.05
    assert report["compare"]["translations"] == str(theirs) and "seconds" not in report["compare"]
    said = run("evaluate", "--workdir", workdir, *options)
    assert re.search(rf"^ *[\d.]+ +[\d.]+ +[\d.]+ +{re.escape(str(theirs))}$", said, re.M), said


def judged(metrics, references, *systems):
    """The scores of each system by a metric, and how likely the difference of the first two is by chance."""
    judge = Judge(["x"] * len(references[0]), references, metrics)
    systems = [System(str(number), {}, translations) for number, translations in enumerate(systems)]
    scores = [judge.scores(system) for system in systems]
    p_values = judge.compare(systems, scores)[0] if len(systems) == 2 else {}
    return [{name: score.score for name, score in each.items()} for each in scores], p_values


def test_a_blank_reference_counts_for_nothing_where_another_translator_has_one():
    first = ["the cat sat on the mat", "a dog ran over the hill", ""]
    second = ["", "\u200b ", "three birds sang a song"]
    others = ["the cat sat on a mat", "a dog ran", "three birds sang"]
    found, _ = judged(["bleu", "chrf", "ter"], [first, second], others)
    expected, _ = judged(["bleu", "chrf", "ter"], [[*first[:2], second[2]]], others)
    assert found == expected and found[0]["BLEU"] < 70


def test_ter_counts_characters_in_chinese_and_warns_of_thai():
    found, _ = judged(["ter"], [["猫坐在垫子上。", "狗跑过山。"]], ["猫坐在桌子上。", "狗跑过山。"])
    assert 0 < found[0]["TER"] < 20
    with pytest.warns(UserWarning, match="TER divides words at spaces.*look at chrF"):
        judged(["ter"], [["แมวนั่งบนเสื่อ"]], ["แมวนั่งบนโต๊ะ"])


def test_few_sentences_are_no_proof():
    with pytest.warns(UserWarning, match="1 sentences are too few to say which system is better: give at least 50"):
        _, p_values = judged(["chrf"], [["the cat sat"]], ["the cat sat"], ["a dog"])
    assert p_values == {"chrF": 1}


@pytest.mark.parametrize(
    ("p_value", "said"),
    [
        (0.049, "b is better by 2.00, significantly: equally good models would rarely differ"),
        (0.05, "b is ahead by 2.00, not significantly: equally good models could easily differ"),
    ],
)
def test_only_a_p_value_below_five_percent_is_called_significant(monkeypatch, p_value, said):
    judge = Judge(["s"], [["the cat sat"]], ["chrf"])
    scores = [{"chrF": Score("chrF", 30.0)}, {"chrF": Score("chrF", 32.0)}]
    monkeypatch.setattr(judge, "scores", lambda system: scores["ab".index(system.name)])
    monkeypatch.setattr(judge, "compare", lambda systems, scores: ({"chrF": p_value}, {}))
    assert said in report(judge, [System("a", {}, ["x"]), System("b", {}, ["x"])], "", as_json=False)


@pytest.fixture
def comet(tmp_path, monkeypatch):
    """Puts a program in place of comet-score; it keeps the files that it is given."""

    def put(last_line):
        command = tmp_path / "bin" / "comet-score"
        command.parent.mkdir(exist_ok=True)
        command.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\n"
            "given = dict(argument[2:].split('=') for argument in sys.argv[1:] if '=' in argument)\n"
            "for name in ('sources', 'translations', 'references'):\n"
            f"    text = pathlib.Path(given[name]).read_text('utf-8')\n"
            f"    pathlib.Path({str(tmp_path)!r}, f'asked_{{name}}').write_text(text, 'utf-8')\n"
            f"assert given['model'] == 'Unbabel/wmt22-comet-da'\n{last_line}\n"
        )
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
        return lambda name: (tmp_path / f"asked_{name}").read_text("utf-8").splitlines()

    return put


def test_comet_is_asked_with_sources_translations_and_references(run, workdir, files, comet, translations):
    asked = comet("print(given['translations'] + '\\tscore: 0.8125')")
    report = json.loads(evaluate(run, workdir, files, "--metrics", "comet", "chrf", "--output=json"))
    assert report["comet"] == 81.25 and report["signatures"]["comet"] == "Unbabel/wmt22-comet-da, half precision"
    assert asked("translations") == translations
    assert asked("sources")[4] == sentence(4) and asked("references")[3] == f"{translations[3]} the cat ."
    said = evaluate(run, workdir, files, "--metrics", "comet", "--compare", workdir)
    assert "   81.25" in said and "p-value" not in said


def test_comet_judges_with_each_reference_that_is_not_blank(comet):
    asked = comet("print('x\\tscore: 0.5')")
    judge = Judge(["s1", "s2"], [["r1", ""], ["q1", "q2"]], ["comet"])
    assert judge.scores(System("", {}, ["t1", "t2"]))["COMET"].score == 50
    given = [asked(name) for name in ("sources", "translations", "references")]
    assert given == [["s1", "s1", "s2"], ["t1", "t1", "t2"], ["r1", "q1", "q2"]]


def test_without_its_command_or_its_model_comet_is_an_error_before_the_model_loads(
    fail, unloaded, workdir, files, comet, monkeypatch
):
    options = ("--source", files[0], "--reference", files[1], "--metrics", "comet")
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        assert "install it as docs/quality.md says, or leave comet out" in fail(
            "evaluate", "--workdir", workdir, *options
        )
    comet("sys.exit('Traceback:\\nConnectionError: no route to host')")
    said = fail("evaluate", "--workdir", workdir, *options)
    assert "comet-score failed (ConnectionError: no route to host)" in said and "can download Unbabel/" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"one test set: .*--source.*--reference.*--corpus"),
        (["--source={source}"], r"one test set"),
        (["--source={source}", "--reference={reference}", "--corpus=tsv:x"], r"one test set"),
        (["--source={source}", "--reference={short}"], r"has 23 lines, .* has 2 lines: line i of"),
        (["--source={empty}", "--reference={empty}"], r"is empty: give a test set that has sentences"),
        (["--corpus=tsw:x"], r"unknown kind: did you mean 'tsv'"),
        (["--corpus=tsv:{short}"], r"short:1: there is no tab"),
        (["--corpus=tsv:{source}/none"], r"cannot read .*check the path"),
        (["--output=scores.txt"], r"--output: invalid choice: 'scores.txt'"),
        (["--tokenize=14a"], r"--tokenize: invalid choice: '14a'"),
        (["--source={source}", "--reference={reference}", "--translations=none/x"], r"there is no folder none"),
        (["--source={source}", "--reference={reference}", "--translations={reference}"], r"--reference reads"),
        (["--corpus=files:{source}, {reference}", "--translations={reference}"], r"--corpus reads"),
        (["--corpus=tsv:{source}", "--translations={workdir}/joint.model"], r"belongs to the work directory"),
        (["--source=-", "--reference=-"], r"only one of them; .*--corpus=tsv:-"),
        (["--compare_checkpoint=2"], r"--compare_checkpoint needs --compare"),
        (["--compare=a", "--compare_translations=b"], r"both name a second system: remove one"),
        (
            ["--source={source}", "--reference={reference}", "--compare_translations={short}"],
            r"has 23 lines, .*has 2 lines: line i of",
        ),
        (["--corpus=files:{source},{reference}", "--compare_translations={short}"], r"has 2 lines, the corpus 23"),
        (["--metrics=meteor"], r"--metrics: invalid choice: 'meteor'"),
        (["--metrics=chrf", "--tokenize=zh"], r"--tokenize is for bleu, which --metrics leaves out"),
        (["--metrics=bleu", "--metrics=ter", "--chrf_word_order=2"], r"--chrf_word_order is for chrf"),
        (["--mbr=4", "--beam_size=2"], r"--beam_size applies to beam search only: remove it, or --sample and --mbr"),
    ],
)
def test_a_mistake_is_an_error_of_one_line_before_the_model_loads(
    fail, unloaded, workdir, files, tmp_path, options, message
):
    names = {
        "workdir": workdir,
        "source": files[0],
        "reference": files[1],
        "short": tmp_path / "short",
        "empty": tmp_path / "empty",
    }
    names["short"].write_text("one\ntwo\n")
    names["empty"].write_text("")
    said = fail("evaluate", "--workdir", workdir, *(option.format(**names) for option in options))
    assert re.search(message, said), said


def test_both_models_load_before_either_translates(fail, workdir, files, monkeypatch, tmp_path):
    monkeypatch.setattr("flax_transformer.decoding.translator.Translator.translate", None)
    files = ("--source", files[0], "--reference", files[1])
    said = fail("evaluate", "--workdir", workdir, *files, "--compare", tmp_path)
    assert "is not a work directory" in said
