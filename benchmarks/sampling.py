"""Measures what subword sampling costs: how fast `tiny` trains on a corpus with it and without it, in turn.

    python -m benchmarks.sampling --data data/multi30k/raw

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
from benchmarks.training_data import MULTI30K
from benchmarks.training_engines import LEARNING_RATE, Ours, Run
from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText, load_corpus
from flax_transformer.data.epochs import training_corpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import Experiment, ParallelismConfig, ScheduleConfig, TrainingConfig, VocabularyConfig


class Epochs:
    """The batches of a corpus in their order, an epoch's number of them at a time."""

    def __init__(self, text: ParallelText, vocabularies: VocabularyPair, strength: float):
        """Tokenises a corpus, with subword sampling of this strength on both sides."""
        config = dataclasses.replace(MULTI30K, source_sampling=strength, target_sampling=strength)
        self._corpus = training_corpus(text, vocabularies, config, max_length=256)
        self._updates = round(self._corpus.epoch_steps)
        self._next = self._updates // 2  # so that each run has the beginning of an epoch in its middle

    def packed(self) -> Iterator[Batch]:
        start = self._next
        self._next += self._updates
        return self._corpus.batches(start, self._next)


def main() -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of train.en and train.de")
    parser.add_argument("--pairs", type=int, help="the first pairs of the corpus only (default all)")
    parser.add_argument("--strength", type=float, default=0.1, help="of the sampling (default 0.1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling.json", help="where the JSON goes")
    options = parser.parse_args()

    machine = report.machine()
    text = load_corpus(f"files:{options.data}/train.en,{options.data}/train.de")
    text = ParallelText(*(side[: options.pairs] for side in (text.source, text.target, text.repeats)))
    vocabularies = VocabularyPair.train(text.source, text.target, VocabularyConfig(size=4000))
    size = vocabularies.target.size
    experiment = Experiment(
        model=TransformerConfig.tiny(norm="pre", source_vocab_size=size, target_vocab_size=size),
        training=TrainingConfig(
            parallelism=ParallelismConfig(loss_chunks=8),
            schedule=ScheduleConfig(name="constant", learning_rate=LEARNING_RATE, warmup_steps=1),
        ),
    )
    engines = {
        strength: Ours(experiment, Epochs(text, vocabularies, strength), "cpu") for strength in (0.0, options.strength)
    }
    for engine in engines.values():
        engine.first_call()
    runs: dict[float, list[Run]] = {strength: [] for strength in engines}
    for number, (strength, engine) in itertools.product(range(options.repeats + 1), engines.items()):
        run = engine.train()
        if number:  # The first one warms up.
            runs[strength].append(run)
        rate = run.tokens / run.seconds
        print(f"sampling {strength:g}, run {number}: {rate:.0f} target tokens/s", file=sys.stderr, flush=True)

    print("| sampling | updates | target tokens/s | CPU ms per 1,000 target tokens |\n|---|---|---|---|")
    records = []
    for strength, each in runs.items():
        record = {
            "sampling": strength,
            "updates": each[0].updates,
            "runs": [dataclasses.asdict(run) for run in each],
            "target_tokens_per_s": statistics.median(run.tokens / run.seconds for run in each),
            "cpu_ms_per_1000_tokens": statistics.median(1e6 * run.cpu_seconds / run.tokens for run in each),
        }
        records.append(record)
        print(
            f"| {strength:g} | {record['updates']} | {record['target_tokens_per_s']:.0f} "
            f"| {record['cpu_ms_per_1000_tokens']:.0f} |"
        )
    without, with_sampling = records
    slower = 1 - with_sampling["target_tokens_per_s"] / without["target_tokens_per_s"]
    more = with_sampling["cpu_ms_per_1000_tokens"] / without["cpu_ms_per_1000_tokens"] - 1
    print(f"with sampling: {slower:.1%} fewer target tokens/s, {more:.1%} more CPU time")
    measured = {"machine": machine, "model": dataclasses.asdict(experiment.model), "results": records}
    report.write(options.output, "benchmarks.sampling", ("jax", "flax", "sentencepiece"), measured)


if __name__ == "__main__":
    main()
