"""Trains models that differ in one thing, three seeds each: parts of the model, and ingredients of a training.

    python -m benchmarks.ablations models --multi30k=data/multi30k/raw --workdirs=runs/ablations
    python -m benchmarks.ablations ingredients --multi30k=data/multi30k/tok --start_from=runs/multi30k_tok \
        --workdirs=runs/ingredients

The first of the `models` is the tutorial's on a small scale, but for the norm: five encoder and five decoder layers,
d_ff = 3 * d_model, sinusoidal positions, and the norm before each sub-layer, since with the norm after it so short a
training has hardly begun. They translate Multi30k; `experiments/` compares the same on the built-in Kannada phrases.
Their scores are those of the test set.

What keeps a model from learning its text by heart shows only late in a training. So the `ingredients` go on from a
model of `configs/multi30k_en_de.py` that has been trained to its end, all for equally many updates; their scores are
those of the validation set.

Each run is an ordinary training in a folder of its own, at the end of which it is scored with greedy search. Runs that
are done are not made again, so the program may be stopped; results/ablations.json and results/ingredients.json hold
all of them, and `python -m benchmarks.quality table` shows them.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import RESULTS
from flax_transformer.workdir import WorkDirectory

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models that differ in one thing from the first of them.

    Attributes:
        file: where the results are kept.
        shared: the settings that all runs share.
        variants: the settings that differ, by what a variant is called.
    """

    file: Path
    shared: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]

    def read(self) -> list[dict[str, Any]]:
        """The runs that are done."""
        return json.loads(self.file.read_text("utf-8"))["runs"] if self.file.exists() else []

    def run(self, config: str, workdirs: Path) -> None:
        """Trains what is not trained yet, and writes."""
        runs = self.read()
        done = {(run["variant"], run["seed"]) for run in runs}
        for seed, (number, (variant, changes)) in itertools.product(SEEDS, enumerate(self.variants.items())):
            if (variant, seed) in done:
                continue
            settings = {**self.shared, **changes, "training.seed": seed, "data.seed": seed}
            machine = report.machine()
            found = train(config, settings, str(workdirs / f"{number}-{seed}"))
            print(f"{variant}, seed {seed}: BLEU {found['bleu']:.1f}", file=sys.stderr, flush=True)
            runs.append({"variant": variant, "seed": seed, "settings": settings, "machine": machine, **found})
            report.write(self.file, "benchmarks.ablations", ("jax", "flax", "sacrebleu"), {"runs": runs})

    def table(self) -> str:
        """The table for docs/results.md: seeds, their mean, and in brackets the lowest and the highest."""
        lines = ["| model | seeds | BLEU | chrF | loss, nats |", "|---|---|---|---|---|"]
        runs = self.read()
        for variant in dict.fromkeys([*self.variants, *(run["variant"] for run in runs)]):
            cells = [str(sum(run["variant"] == variant for run in runs))]
            for metric, digits in (("bleu", 1), ("chrf", 1), ("loss", 3)):
                found = [run[metric] for run in runs if run["variant"] == variant]
                spread = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if len(found) > 1 else ""
                cells.append(f"{statistics.mean(found):.{digits}f}{spread}" if found else "not run")
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        processors = collections.Counter(run["machine"]["processor"] for run in runs if "machine" in run)
        counted = [f"{count} runs on {processor}" for processor, count in processors.items()]
        return "\n".join([*lines, *(["", f"Machines: {', '.join(counted)}."] if counted else [])]) + "\n"


MODELS = Comparison(
    file=RESULTS / "ablations.json",
    shared={
        "model.d_model": 128,
        "model.num_heads": 4,
        "model.d_ff": 384,
        "model.num_encoder_layers": 5,
        "model.num_decoder_layers": 5,
        "model.norm": "pre",
        "model.dropout_rate": 0.1,
        "model.max_length": 128,
        "vocabulary.size": 4000,
        "data.rows": 12,
        "data.source_slots": 64,
        "data.source_sampling": 0.0,
        "data.target_sampling": 0.0,
        "training.weights": "trained",
        "training.steps": 1500,
        "training.schedule.learning_rate": 2e-3,
        "training.schedule.warmup_steps": 300,
        "training.evaluation.every": 1500,
        "training.evaluation.sentences": 8,  # so few are translated on the way; the test set is translated whole
        "training.evaluation.best_metric": "loss",
        "training.checkpoints.every": 500,
        "training.checkpoints.average_last": 0,
    },
    variants={
        "five layers, 3·d_model, pre-norm, sinusoidal": {},
        "learned positions": {"model.positions": "learned"},
        "one layer": {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1},
        "4·d_model": {"model.d_ff": 512},
        "post-norm": {"model.norm": "post"},
    },
)
INGREDIENTS = Comparison(
    file=RESULTS / "ingredients.json",
    shared={
        "data.test": "",
        "data.source_sampling": 0.0,
        "data.target_sampling": 0.0,
        "training.weights": "trained",
        "training.steps": 2000,
        "training.schedule.learning_rate": 5e-4,
        "training.schedule.warmup_steps": 100,
        "training.evaluation.every": 1000,
        "training.checkpoints.average_last": 0,
    },
    variants={
        "dropout alone": {},
        "BPE-dropout of the source": {"data.source_sampling": 0.1},
        "BPE-dropout of the target": {"data.target_sampling": 0.1},
        "no label smoothing": {"training.label_smoothing": 0.0},
    },
)


def train(config: str, settings: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Trains, and returns the last scores, of the test set if there is one, and the losses of the validation set."""
    changes = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "flax_transformer", "train", f"--config={config}", f"--workdir={workdir}"]
    subprocess.run([*command, *changes], check=True, stdout=subprocess.DEVNULL)
    lines = WorkDirectory(workdir).read_metrics()
    last = [line for line in lines if line["kind"] in ("valid", "test")][-1]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "valid"}
    names = ("bleu", "chrf", "exact_match", "loss", "signature")  # scores of a validation set have no signature
    return {name: last[name] for name in names if name in last} | {"valid_loss": losses}


def main() -> None:
    """Reads the command line, trains what is not trained yet, and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.split("\n")[0])
    parser.add_argument("comparison", choices=("models", "ingredients"))
    parser.add_argument("--multi30k", required=True, help="a folder of Multi30k's text")
    parser.add_argument("--start_from", help="the work directory of the model with which `ingredients` go on")
    parser.add_argument("--workdirs", type=Path, required=True, help="where the trainings go")
    options = parser.parse_args()
    if (options.comparison == "ingredients") != bool(options.start_from):
        parser.error("ingredients need --start_from, models do not")
    comparison = MODELS
    if options.start_from:
        shared = {**INGREDIENTS.shared, "training.start_from": options.start_from}
        comparison = dataclasses.replace(INGREDIENTS, shared=shared)
    comparison.run(f"configs/multi30k_en_de.py:{options.multi30k}", options.workdirs)


if __name__ == "__main__":
    main()
