"""Runs an experiment from the command line: measures, keeps the numbers, and draws them for docs/learning.md."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from benchmarks import report
from flax_transformer.figures import Figure, save

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
PACKAGES = ("jax", "flax", "optax", "babel", "sentencepiece")
Results = dict[str, Any]


def padded(rows: Sequence[Sequence[int]], width: int | None = None) -> Int[np.ndarray, "B S"]:
    """Token ids of sentences as an array, padded with 0 to the width, or to the longest of them."""
    ids = np.zeros((len(rows), width or max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def kept(name: str) -> Results:
    """The numbers that an experiment measured when it was run last; raises FileNotFoundError if it never was."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["results"]


def run(name: str, measure: Callable[[Path], Results], draw: Callable[[Results], Mapping[str, Figure]]) -> None:
    """Measures and draws, or with --draw only draws again what was measured before.

    Args:
        name: of experiments/results/NAME.json.
        measure: takes the folder of the trainings, and returns numbers that JSON can hold.
        draw: takes these numbers, and returns figures by the names of their files.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}")
    parser.add_argument("--workdirs", type=Path, default=Path("runs/experiments"), help="where the trainings are")
    parser.add_argument("--draw", action="store_true", help="draw the results that are there")
    options = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if not options.draw:
        machine, began = report.machine(), time.monotonic()
        results = measure(options.workdirs)
        facts = {"machine": machine, "seconds": round(time.monotonic() - began), "results": results}
        report.write(path, f"experiments.{name}", PACKAGES, facts)
    FIGURES.mkdir(parents=True, exist_ok=True)
    for figure_name, figure in draw(kept(name)).items():
        save(figure, FIGURES / f"{figure_name}.svg")
        print(f"drawn: {FIGURES / figure_name}.svg")
