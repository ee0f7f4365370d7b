"""Trains small models that differ in one thing, three seeds each: positions, depth, width of the feed-forward network,
place of the norm.

    python -m benchmarks.ablations --multi30k=data/multi30k/raw --workdirs=runs/ablations

The first model is the tutorial's on a small scale, but for the norm: five encoder and five decoder layers, d_ff = 3 *
d_model, sinusoidal positions, and the norm before each sub-layer, since with the norm after it so short a training has
hardly begun. It translates Multi30k; `experiments/` compares the same on the built-in
Kannada phrases. Each run is an ordinary training in a folder of its own, at the end of which the test set is scored
with greedy search. Runs that are done are not made again, so the program may be stopped; results/ablations.json holds
all of them, and `python -m benchmarks.quality table` shows them.
"""

import argparse
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

FILE = RESULTS / "ablations.json"
SEEDS = (0, 1, 2)
BASE = "five layers, 3·d_model, pre-norm, sinusoidal"
# Settings that all runs share.
SHARED: dict[str, Any] = {
    "model.d_model": 128,
    "model.num_heads": 4,
    "model.d_ff": 384,
    "model.num_encoder_layers": 5,
    "model.num_decoder_layers": 5,
    "model.norm": "pre",
    "model.dropout_rate": 0.1,
    "model.max_length": 128,
    "data.rows": 12,
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
}
# What differs from the first model.
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "learned positions": {"model.positions": "learned"},
    "one layer": {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1},
    "4·d_model": {"model.d_ff": 512},
    "post-norm": {"model.norm": "post"},
}


def train(config: str, settings: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Trains, and returns the scores of the test set and the losses of the validation set."""
    changes = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "flax_transformer", "train", f"--config={config}", f"--workdir={workdir}"]
    subprocess.run([*command, *changes], check=True, stdout=subprocess.DEVNULL)
    lines = WorkDirectory(workdir).read_metrics()
    test = [line for line in lines if line["kind"] == "test"][-1]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "valid"}
    return {name: test[name] for name in ("bleu", "chrf", "exact_match", "loss", "signature")} | {"valid_loss": losses}


def main() -> None:
    """Reads the command line, trains what is not trained yet, and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.split("\n")[0])
    parser.add_argument("--multi30k", required=True, help="the folder of Multi30k's raw text")
    parser.add_argument("--workdirs", default="runs/ablations", help="where the trainings go")
    options = parser.parse_args()
    config = f"configs/multi30k_en_de.py:{options.multi30k}"
    machine = report.machine()
    runs: list[dict[str, Any]] = json.loads(FILE.read_text("utf-8"))["runs"] if FILE.exists() else []
    done = {(run["variant"], run["seed"]) for run in runs}
    for seed, (number, (variant, changes)) in itertools.product(SEEDS, enumerate(VARIANTS.items())):
        if (variant, seed) in done:
            continue
        settings = {**SHARED, **changes, "training.seed": seed, "data.seed": seed}
        found = train(config, settings, str(Path(options.workdirs) / f"{number}-{seed}"))
        print(f"{variant}, seed {seed}: BLEU {found['bleu']:.1f}", file=sys.stderr, flush=True)
        runs.append({"variant": variant, "seed": seed, "settings": settings, **found})
        report.write(FILE, "benchmarks.ablations", ("jax", "flax", "sacrebleu"), {"machine": machine, "runs": runs})


def table(results: Mapping[str, Any]) -> str:
    """The table for docs/results.md: the number of seeds, their mean, and in brackets the lowest and the highest."""
    lines = ["| model | seeds | BLEU | chrF | loss, nats |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        cells = [str(sum(run["variant"] == variant for run in results["runs"]))]
        for metric, digits in (("bleu", 1), ("chrf", 1), ("loss", 3)):
            found = [run[metric] for run in results["runs"] if run["variant"] == variant]
            spread = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.{digits}f}{spread}" if found else "not run")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
