"""Measures what subword sampling costs: how fast a config trains with it and without it, in turn.

    python -m benchmarks.sampling --config=configs/multi30k_en_de.py:data/multi30k/raw

Each run trains for as many updates as an epoch has, so one epoch is made in the background meanwhile. Run it on a
machine that does nothing else.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.report import RESULTS
from benchmarks.training_engines import Ours, Run
from flax_transformer.commands.config import read_config
from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText, load_corpus
from flax_transformer.data.epochs import training_corpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig, Experiment


def variants(config: DataConfig) -> dict[str, DataConfig]:
    """The config with and without sampling, which makes sources longer: without it, fewer source slots suit them."""
    without = dataclasses.replace(config, source_sampling=0.0, target_sampling=0.0)
    return {
        "as the config says": config,
        "none": without,
        "none, and as many source slots as target slots": dataclasses.replace(
            without, source_slots=config.target_slots
        ),
    }


class Epochs:
    """The batches of a corpus in their order, an epoch's number of them at a time."""

    def __init__(self, text: ParallelText, vocabularies: VocabularyPair, config: DataConfig, max_length: int):
        """Tokenises a corpus."""
        self._corpus = training_corpus(text, vocabularies, config, max_length=max_length)
        self._updates = round(self._corpus.epoch_steps)
        self._next = self._updates // 2  # so that each run has the beginning of an epoch in its middle

    def packed(self) -> Iterator[Batch]:
        start = self._next
        self._next += self._updates
        return self._corpus.batches(start, self._next)


def main() -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a config that samples, and after a colon its folder of text")
    parser.add_argument("--pairs", type=int, help="the first pairs of the corpus only (default all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default 3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling.json", help="where the JSON goes")
    options = parser.parse_args()

    machine = report.machine()
    experiment = Experiment.from_mapping(read_config(options.config, []))
    text = load_corpus(experiment.data.train)
    text = ParallelText(*(side[: options.pairs] for side in (text.source, text.target, text.repeats)))
    vocabularies = VocabularyPair.train(text.source, text.target, experiment.vocabulary)
    size = vocabularies.target.size
    experiment = experiment.changed({"model.source_vocab_size": size, "model.target_vocab_size": size})
    settings, engines = variants(experiment.data), {}
    for name, data in settings.items():
        epochs = Epochs(text, vocabularies, data, experiment.model.max_length)
        engines[name] = Ours(dataclasses.replace(experiment, data=data), epochs, "cpu")
        engines[name].first_call()
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for number, (name, engine) in itertools.product(range(options.repeats + 1), engines.items()):
        run = engine.train()
        if number:  # The first one warms up.
            runs[name].append(run)
        print(f"{name}, run {number}: {run.tokens / run.seconds:.0f} target tokens/s", file=sys.stderr, flush=True)

    print("| subword sampling | slots | updates | ms an update | target tokens/s |\n|---|---|---|---|---|")
    records = []
    for name, each in runs.items():
        record = {
            "name": name,
            "data": dataclasses.asdict(settings[name]),
            "runs": [dataclasses.asdict(run) for run in each],
            "target_tokens_per_s": statistics.median(run.tokens / run.seconds for run in each),
            "ms_per_update": statistics.median(1e3 * run.seconds / run.updates for run in each),
        }
        records.append(record)
        slots = f"{settings[name].source_slots}/{settings[name].target_slots}"
        rate, milliseconds = record["target_tokens_per_s"], record["ms_per_update"]
        print(f"| {name} | {slots} | {each[0].updates} | {milliseconds:.0f} | {rate:.0f} |")
    measured = {"seed": report.SEED, "machine": machine, "model": dataclasses.asdict(experiment.model)}
    measured |= {"results": records}
    report.write(options.output, "benchmarks.sampling", ("jax", "flax", "sentencepiece"), measured)


if __name__ == "__main__":
    main()
