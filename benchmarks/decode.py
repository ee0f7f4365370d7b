"""Takes one Transformer with random weights in three engines and leaves how fast each decodes, as JSON and as a table.

    python -m benchmarks.decode                    # 32 sentences of 20 tokens, exactly 24 tokens out
    python -m benchmarks.decode --text test.en     # real sentences, text in and text out
    python -m benchmarks.decode --text test.en --one_by_one 100    # how long one sentence takes

The engines (decode_engines.py) are this library, transformers and CTranslate2, float32 and int8. Each has a process of
its own, since the threads of some go on to wait busily when their work is done, and they take turns, so that whatever
else slows the machine down slows all of them down. A first call, which compiles, is timed apart. Run it on a machine
that does nothing else.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import peers, report
from benchmarks.decode_engines import ENGINES, TARGET_LENGTH, Engine, Tokens
from benchmarks.report import RESULTS, SEED
from flax_transformer.config import TransformerConfig
from flax_transformer.data.lines import read_lines
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.experiment import VocabularyConfig

SENTENCES, SOURCE_LENGTH = 32, 20


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every engine does, and how much of it.

    Attributes:
        run: the outputs of one engine with one beam.
        sentences: how many there are.
        tokens: of an output.
        texts: the sentences, if it begins with text.
    """

    run: Callable[[Engine, int], list[Any]]
    sentences: int
    tokens: Callable[[Any], int]
    texts: Sequence[str] = ()


_in_this_process: list[Any] = []  # an engine, and its workload


def _build(name: str, config: TransformerConfig, text: "Text | None", batch_tokens: int) -> None:
    """Makes one engine, in a process of its own."""
    params, workload = fixed_workload(config) if text is None else text_workload(config, text)
    _in_this_process[:] = [ENGINES[name](config, params, text and text.vocabulary, batch_tokens), workload]


def _run(beam: int) -> tuple[float, list[Any], dict[str, Any]]:
    """The seconds that this process's engine takes, its outputs, and what else it tells."""
    engine, workload = _in_this_process
    start = time.perf_counter()
    outputs = workload.run(engine, beam)
    return time.perf_counter() - start, outputs, engine.report()


def _run_one_by_one(beam: int, count: int) -> list[float]:
    """The seconds of each of so many sentences, each translated when the one before is done."""
    engine, workload = _in_this_process
    seconds = []
    for sentence in workload.texts[:count]:
        start = time.perf_counter()
        engine.translate([sentence], beam)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_latency(engines: dict[str, Executor], beam: int, repeats: int, count: int) -> list[dict[str, Any]]:
    """Times every engine in turn, sentence by sentence, after a run that compiles; one record for each."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(repeats + 1):
        for name, engine in engines.items():
            time.sleep(0.5)
            found = engine.submit(_run_one_by_one, beam, count).result()
            seconds[name] += found if number else []
            print(
                f"beam {beam}, {name}, run {number}: p50 {statistics.median(found):.3f} s", file=sys.stderr, flush=True
            )
    return [
        {"engine": name, "beam": beam, "sentences": count, "seconds": each, "p50_s": statistics.median(each)}
        for name, each in seconds.items()
    ]


def measure(engines: dict[str, Executor], workload: Workload, beam: int, repeats: int) -> list[dict[str, Any]]:
    """Times every engine in turn; one record for each."""
    outputs, first_calls, reports = {}, {}, {}
    for name, engine in engines.items():
        first_calls[name], outputs[name], reports[name] = engine.submit(_run, beam).result()
    reference = outputs[next(iter(engines))]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(repeats):
        for name, engine in engines.items():
            time.sleep(0.5)  # The threads of the last one wait busily for more work, for a while.
            seconds[name].append(engine.submit(_run, beam).result()[0])
            print(f"beam {beam}, {name}, run {number + 1}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    records = []
    for name in engines:
        median, tokens = statistics.median(seconds[name]), sum(map(workload.tokens, outputs[name]))
        records.append(
            {
                "engine": name,
                "beam": beam,
                "sentences": workload.sentences,
                "target_tokens": tokens,
                "sentences_unlike_first_engine": sum(
                    mine != theirs for mine, theirs in zip(outputs[name], reference, strict=True)
                ),
                "first_call_s": first_calls[name],
                "seconds": seconds[name],
                "median_s": median,
                "sentences_per_s": workload.sentences / median,
                "target_tokens_per_s": tokens / median,
            }
            | reports[name]
        )
    return records


def fixed_workload(config: TransformerConfig) -> tuple[Any, Workload]:
    """Parameters whose outputs all have exactly `TARGET_LENGTH` tokens, and random sentences."""
    # Steep enough that the end of sentence is impossible before its place, and certain there.
    params = peers.random_params(config, SEED, gain=1.0, end_at=TARGET_LENGTH - 1.5, end_slope=1e5)
    rng = np.random.default_rng(SEED)
    words = rng.integers(4, config.source_vocab_size, (SENTENCES, SOURCE_LENGTH - 1))
    source = [[*map(int, row), config.eos_id] for row in words]

    def run(engine: Engine, beam: int) -> Tokens:
        outputs = engine.decode(source, beam)
        assert all(len(row) == TARGET_LENGTH for row in outputs), [len(row) for row in outputs]
        return outputs

    return params, Workload(run=run, sentences=SENTENCES, tokens=len)


@dataclasses.dataclass(frozen=True)
class Text:
    """Sentences, and the vocabulary that divides them into tokens."""

    sentences: list[str]
    vocabulary: Vocabulary


def text_workload(config: TransformerConfig, text: Text) -> tuple[Any, Workload]:
    """Parameters whose outputs are about as long as the sentences on average, and those sentences."""
    sentences, vocabulary = text.sentences, text.vocabulary
    mean = sum(map(len, vocabulary.encode(sentences))) / len(sentences)
    params = peers.random_params(config, SEED, gain=1.0, end_at=mean, end_slope=20.0, end_bias=3.0, follow_source=True)
    return params, Workload(
        run=lambda engine, beam: engine.translate(sentences, beam),
        sentences=len(sentences),
        tokens=lambda text: text[1],
        texts=sentences,
    )


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "| engine | beam | first call, s | median, s | sentences/s | target tokens/s | unlike the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        lines.append(
            "| {engine} | {beam} | {first_call_s:.1f} | {median_s:.2f} | {sentences_per_s:.1f} "
            "| {target_tokens_per_s:.0f} | {sentences_unlike_first_engine} of {sentences} |".format(**record)
        )
    ours = [record for record in records if "programs" in record]
    lines += [
        f"\nbeam {record['beam']}: {record['slots_filled_while_sentences_wait']:.1%} of the slots hold a sentence "
        f"while others wait; {record['programs']} programs so far, compiled in {record['compile_s']:.1f} s"
        for record in ours
    ]
    return "\n".join(lines)


def latency_table(records: list[dict[str, Any]]) -> str:
    """The records of `measure_latency` as Markdown."""
    rows = [f"| {record['engine']} | {record['beam']} | {1000 * record['p50_s']:.1f} |" for record in records]
    return "\n".join(["| engine | beam | one sentence, p50, ms |", "|---|---|---|", *rows])


def main() -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each engine (default 5)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="sentences, one a line, to translate end to end")
    parser.add_argument("--one_by_one", type=int, metavar="N", help="translate N sentences of the text one by one")
    parser.add_argument("--batch_tokens", type=int, default=2048, help="source tokens in a batch of text (2048)")
    parser.add_argument("--vocabulary_size", type=int, default=8000, help="target tokens to choose from (8000)")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default benchmarks/results/...)")
    options = parser.parse_args()

    on_gpu = jax.default_backend() == "gpu"
    if options.one_by_one and not options.text:
        parser.error("--one_by_one needs --text")
    if on_gpu:
        print("CTranslate2 is left out: decode.py runs it on CPUs", file=sys.stderr)
        options.engines = [name for name in options.engines if not name.startswith("ctranslate2")]
    config = TransformerConfig(
        source_vocab_size=options.vocabulary_size,
        target_vocab_size=options.vocabulary_size,
        positions="sinusoidal_concatenated",
        output_bias=True,
        start_id=Vocabulary.pad_id,
        dtype="bfloat16" if on_gpu else "float32",
    )
    text = None
    if options.text:
        sentences = [line for path in options.text for line in read_lines(path) if line.strip()]
        try:
            vocabulary = Vocabulary.train(sentences, VocabularyConfig(size=options.vocabulary_size))
            text = Text(sentences, vocabulary)
        except ValueError as error:
            parser.error(f"{error} (here --vocabulary_size)")
    _, workload = fixed_workload(config) if text is None else text_workload(config, text)
    machine = report.machine()
    engines = {
        name: ProcessPoolExecutor(
            1,
            mp_context=get_context("spawn"),
            initializer=_build,
            initargs=(name, config, text, options.batch_tokens),
        )
        for name in options.engines
    }
    if options.one_by_one:
        runs = [measure_latency(engines, beam, options.repeats, options.one_by_one) for beam in options.beams]
    else:
        runs = [measure(engines, workload, beam, options.repeats) for beam in options.beams]
    records = [record for run in runs for record in run]
    kind = "latency" if options.one_by_one else "text" if options.text else "fixed"
    path = options.output or RESULTS / f"decode_{kind}_{jax.default_backend()}.json"
    packages = ("jax", "flax", "torch", "transformers", "ctranslate2", "sentencepiece")
    measured = {"seed": SEED, "machine": machine, "model": dataclasses.asdict(config), "results": records}
    print(latency_table(records) if options.one_by_one else table(records))
    report.write(path, "benchmarks.decode", packages, measured)


if __name__ == "__main__":
    main()
