"""Scores trained models on test sets, keeps the results, and writes docs/results.md from them.

    python -m benchmarks.quality measure multi30k_tok --title="Multi30k, English to German, tokenised" \
        --workdir=runs/multi30k_tok --test 2016 test_2016_flickr.en test_2016_flickr.de -- --tokenize=none --beam_size=5
    python -m benchmarks.quality table

`measure` runs `flax-transformer evaluate` for each --test, with the options that follow `--`, and writes the scores,
the settings, the sizes of the corpora and the course of the training to results/quality/NAME.json. Run it where the
training was run, since it reads the corpora to count their pairs. `table` writes docs/results.md from all of
them, and from results/ablations.json and results/ingredients.json.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import ablations, report
from benchmarks.report import RESULTS
from flax_transformer.data.corpus import load_corpus
from flax_transformer.trained_model import TrainedModel
from flax_transformer.workdir import WorkDirectory

FOLDER = RESULTS / "quality"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
INTRODUCTION = """\
# Results

`python -m benchmarks.quality table` writes this page from `benchmarks/results/quality/`, where the settings, versions
and learning curve of each training are. The checkpoint of a training and the settings of the search were chosen on the
validation set; then each test set was scored once. (A training also scores its own test set at its end, and no choice
depends on that.) Times count from the start of a training to its last evaluation, on the machine that is named, where
other programs ran beside it.
"""
MODELS = """\
## One thing changed

Small models that translate Multi30k from English to German, trained for 1,500 steps: d_model 128, four heads, five
encoder and five decoder layers. Each row differs from the first in one thing ("one layer" is one layer on each side).
The numbers are the mean of the seeds, and in brackets the lowest and the highest; greedy search, test set of 2016.
(`python -m benchmarks.ablations models --multi30k=data/multi30k/raw --workdirs=runs/ablations`).
[Learning](learning.md) compares similar models, with two layers and the norm after each sub-layer, on the built-in
Kannada phrases.
"""
INGREDIENTS = """\
## What each ingredient gives

The tokenised model of Multi30k goes on for 2,000 steps, with dropout alone or with one thing more; the mean of the
seeds, and in brackets the lowest and the highest. Greedy search on the validation set
(`python -m benchmarks.ablations ingredients --multi30k=data/multi30k/tok --start_from=runs/multi30k_tok
--workdirs=runs/ingredients`). R-Drop (Liang et al., 2021; `training.r_drop=5`) makes the predictions of two passes with
different dropout alike, and takes twice the time; "no smoothing of tokens that are never chosen"
(`training.smooth_never_chosen=false`) leaves padding and such tokens out of label smoothing. Neither helped here, so
both settings were removed; revision a81b3b6 has them. Trainings that have an ingredient from their beginning were not
compared; the model that goes on was trained with BPE-dropout of the source.
"""


def course(workdir: WorkDirectory) -> dict[str, Any]:
    """How a training went: its commands, machine, time and learning curve, from `metrics.jsonl`."""
    lines = workdir.read_metrics()
    starts = [line for line in lines if line["kind"] == "start"]
    # Of a step that was scored twice, because the training was killed, the later line counts.
    evaluations = list({line["step"]: line for line in lines if line["kind"] == "valid"}.values())
    curve = [{name: line[name] for name in ("step", "loss", "bleu", "chrf")} for line in evaluations]
    first = {name: starts[0][name] for name in ("command", "versions", "revision", "devices")}
    return first | {"starts": len(starts), "hours": evaluations[-1]["seconds"] / 3600, "curve": curve}


def scores(workdir: str, files: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """What `evaluate` prints for a test set: the name of a corpus, or a file of sources and those of references."""
    source, *references = files
    test = [f"--source={source}", "--reference", *references] if references else [f"--corpus={source}"]
    command = [sys.executable, "-m", "flax_transformer", "evaluate", f"--workdir={workdir}", *test]
    command += ["--output=json", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(options: argparse.Namespace) -> None:
    """Scores a model and writes what is known of it."""
    machine = report.machine()
    workdir = WorkDirectory(options.workdir)
    config, training = workdir.read_config(), course(workdir)
    pairs = {name: len(load_corpus(config["data"][name]).source) for name in ("train", "valid")}
    tests = {name: scores(options.workdir, files, options.options) for name, *files in options.test}
    for name, found in tests.items():
        print(f"{name}: BLEU {found['bleu']:.1f}, chrF {found['chrf']:.1f}", file=sys.stderr)
    measured = {
        "title": options.title,
        "machine": machine,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(TrainedModel.load(options.workdir).params)),
        "seed": config["training"]["seed"],
        "config": config,
        "pairs": pairs,
        "training": training,
        "tests": tests,
    }
    report.write(FOLDER / f"{options.name}.json", "benchmarks.quality", ("jax", "flax", "sacrebleu"), measured)


def row(name: str, result: Mapping[str, Any]) -> str:
    """A row of the table for each test set of a result."""
    config, training = result["config"], result["training"]
    model = config["model"]
    sizes = f"{model['num_encoder_layers']}+{model['num_decoder_layers']} layers, {model['d_model']}, "
    sizes += f"{result['parameters'] / 1e6:.1f} million parameters"
    hours = training["hours"]
    time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    steps = f"{config['training']['steps']:,} steps, {time}, seed {config['training']['seed']}"
    return "".join(
        f"| [{result['title']}](#{name}) | {test} | {found['bleu']:.1f} | {found['chrf']:.1f} | {sizes} | {steps} |\n"
        for test, found in result["tests"].items()
    )


def details(name: str, result: Mapping[str, Any]) -> str:
    """What one needs to repeat a result."""
    training, machine = result["training"], result["machine"]
    first = next(iter(result["tests"].values()))
    sizes = ", ".join(f"{count:,} for {name}" for name, count in result["pairs"].items())
    command = re.sub(r"^train\.py", "python train.py", training["command"])
    curve = ", ".join(f"{entry['step']:,}: {entry['bleu']:.1f}" for entry in training["curve"])
    versions = ", ".join(f"{package} {number}" for package, number in training["versions"].items())
    return f"""
## {name}

{result["title"]}.

    {command}
    {shlex.join(result["command"])}

- corpus: `{result["config"]["data"]["train"]}`; sentence pairs: {sizes}
- search and signatures: {first["search"]}; BLEU `{first["signatures"]["bleu"]}`; chrF `{first["signatures"]["chrf"]}`
- BLEU on the validation set after so many steps: {curve}
- {machine["processor"]}, {machine["cores"]} cores; {versions}; revision {training["revision"]}
"""


def page() -> str:
    """The text of docs/results.md."""
    results = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    table = "| experiment | test set | BLEU | chrF | model | training |\n|---|---|---|---|---|---|\n"
    table += "".join(row(name, result) for name, result in results.items())
    text = f"{INTRODUCTION}\n{table}"
    for title, comparison in ((MODELS, ablations.MODELS), (INGREDIENTS, ablations.INGREDIENTS)):
        if comparison.file.exists():
            text += f"\n{title}\n{comparison.table()}"
    return text + "".join(map(details, results, results.values()))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table", help="write docs/results.md")
    measured = verbs.add_parser("measure", help="score a model")
    measured.add_argument("name", help="of the file in results/quality")
    measured.add_argument("--title", required=True, help="what the model translates, for a person")
    measured.add_argument("--workdir", required=True, help="the work directory of its training")
    measured.add_argument(
        "--test",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FILE"),
        help="a test set: its name, and a corpus or files of its sources and its references",
    )
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    options.options = arguments[cut + 1 :]
    if options.verb == "measure":
        measure(options)
        return
    PAGE.write_text(page(), "utf-8")
    print(f"written to {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
