"""Trains a model for each row of a table through the command line, and compares every way to translate with it.

The models learn to write digits for their names, which takes seconds. The rows differ in what changes the program most:
norm, tied embeddings, positions, dtype and search.
"""

import json
import random

import pytest

DIGITS = "zero one two three four five six seven eight nine".split()

# The settings of the model, the options of the search, and how far rounding may move a score, also as a share of it.
TABLE = {
    "the paper's": (
        {"norm": "post", "tie_embeddings": "three_way", "positions": "sinusoidal", "dtype": "float32"},
        ["--beam_size=4"],
        1e-3,
    ),
    "pre-norm, learned": (
        {"norm": "pre", "tie_embeddings": "decoder", "positions": "learned", "dtype": "float32"},
        ["--beam_size=1"],
        1e-3,
    ),
    "bfloat16, concatenated": (
        {"norm": "pre", "tie_embeddings": "three_way", "positions": "sinusoidal_concatenated", "dtype": "bfloat16"},
        ["--beam_size=2", "--length_penalty=length", "--alpha=1", "--stopping=first"],
        0.2,
    ),
    "float16, untied": (
        {"norm": "post", "tie_embeddings": "none", "positions": "learned", "dtype": "float16"},
        ["--sample", "--top_k=1"],
        0.1,
    ),
}
IN_EACH_RUN = {"the paper's"}  # `make test` leaves the others to `make test-slow`


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a corpus: names of digits in *.in, the digits in *.out."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for split, pairs in (("train", 2000), ("test", 40)):
        rows = [rng.choices(range(10), k=rng.randint(1, 3)) for _ in range(pairs)]
        (folder / f"{split}.in").write_text("".join(" ".join(DIGITS[digit] for digit in row) + "\n" for row in rows))
        (folder / f"{split}.out").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "row", [row if row in IN_EACH_RUN else pytest.param(row, marks=pytest.mark.slow) for row in TABLE]
)
def test_a_trained_model_scores_and_every_way_to_translate_agrees(row, corpus, tmp_path, run):
    model, search, rounding = TABLE[row]
    sizes = {"d_model": 32, "num_heads": 2, "d_ff": 64, "num_encoder_layers": 1, "num_decoder_layers": 1}
    settings = {
        f"model.{name}": value for name, value in {**sizes, **model, "dropout_rate": 0, "max_length": 32}.items()
    }
    settings |= {
        "vocabulary.size": 90,
        "vocabulary.byte_fallback": False,
        "data.train": f"files:{corpus}/train.in,{corpus}/train.out",
        "data.valid": "",
        "data.test": "",
        "data.rows": 16,
        "training.steps": 250,
        "training.schedule.learning_rate": 1e-2,
        "training.schedule.warmup_steps": 20,
        "training.parallelism.layout": "jit",
    }
    changes = [f"--config.{name}={value}" for name, value in settings.items()]
    run("train", "--config=quickstart", f"--workdir={tmp_path}/run", *changes)

    model = f"--workdir={tmp_path}/run"
    test = [f"--source={corpus}/test.in", f"--reference={corpus}/test.out"]
    report = json.loads(run("evaluate", model, *search, *test, "--output=json"))
    assert report["chrf"] > 90

    translate = ["translate", model, *search]
    together = run(*translate, f"--input={corpus}/test.in")
    found = [
        json.loads(line)
        for line in run(*translate, "--format=jsonl", given=(corpus / "test.in").read_text()).splitlines()
    ]
    assert [one["hypotheses"][0]["text"] for one in found] == together.splitlines()

    one_by_one = run(*translate, "--buffer_lines=1", f"--input={corpus}/test.in")
    differ = sum(ours != theirs for ours, theirs in zip(one_by_one.splitlines(), together.splitlines(), strict=True))
    assert differ <= (rounding > 0.01)  # in half precision, rounding may decide between two near-equal hypotheses

    (tmp_path / "translations").write_text(together)
    pairs = ["--format=jsonl", f"--source={corpus}/test.in", f"--target={tmp_path}/translations"]
    scored = [json.loads(line) for line in run("score", model, *pairs).splitlines()]
    for ours, theirs in zip(scored, found, strict=True):
        assert ours["log_prob"] == pytest.approx(theirs["hypotheses"][0]["log_prob"], rel=rounding, abs=rounding)
