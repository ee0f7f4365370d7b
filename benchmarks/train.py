"""Measures how fast this library and PyTorch train the same model, and reports it as JSON and as a table.

    python -m benchmarks.train step                              # one update of `base`, 32 rows of 32+32 tokens
    python -m benchmarks.train epoch --data FOLDER               # an epoch of Multi30k with `tiny`, packed or padded
    python -m benchmarks.train pipeline --data FOLDER            # batches alone, beside how fast `tiny` takes them
    python -m benchmarks.train step --device gpu --preset big    # bfloat16, rows of 256+256 tokens

PyTorch's model is `nn.Transformer`, optionally compiled. Each library has its own process and all cores, and they take
turns, so that anything else that slows the machine down affects both. Compiling is timed separately. Run it on a
machine that does nothing else.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import torch

from benchmarks import report
from benchmarks.report import RESULTS, THREADS
from benchmarks.training_data import Data, FullRows, Sentences, pipeline_rates
from benchmarks.training_engines import LEARNING_RATE, InTorch, Ours, Run
from flax_transformer.config import TransformerConfig
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import Experiment, ParallelismConfig, ScheduleConfig, TrainingConfig, VocabularyConfig
from flax_transformer.monitoring.utilization import model_flops

ENGINES = ("flax_transformer", "torch", "torch_compiled")

_in_this_process: list[Any] = []  # an engine


def _build(name: str, experiment: Experiment, data: Data, device: str, threads: int) -> None:
    """Makes one engine, in its own process."""
    if threads < THREADS:
        # XLA makes as many threads as it has cores.
        os.sched_setaffinity(0, range(threads))
    torch.set_num_threads(threads)
    makers = {"torch": InTorch, "torch_compiled": functools.partial(InTorch, compiled=True), "flax_transformer": Ours}
    _in_this_process[:] = [makers[name](experiment, data, device)]


def _call(method: str) -> Any:
    return getattr(_in_this_process[0], method)()


def measure(engines: dict[str, Executor], repeats: int, flops: float | None) -> list[dict[str, Any]]:
    """Lets the engines train in turn, and returns a record for each.

    Args:
        engines: the engines by name, each in its own process.
        repeats: number of timed runs of each.
        flops: operations of the matrix products of one update, if all updates have the same number.
    """

    def ask(name: str, method: str) -> Any:
        time.sleep(0.5)  # The idle threads of the previous engine keep cores busy for a while.
        return engines[name].submit(_call, method).result()

    first = {name: ask(name, "first_call") for name in engines}
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(repeats + 1):
        for name in engines:
            run = ask(name, "train")
            if number:  # The first one warms up.
                runs[name].append(run)
                rates[name].append(ask(name, "matmul_rate"))
            print(f"{name}, run {number}: {run.seconds:.2f} s, loss {run.loss:.3f}", file=sys.stderr, flush=True)
    machine_rate = max(statistics.median(each) for each in rates.values())
    records = []
    for name in engines:
        seconds = [run.seconds for run in runs[name]]
        median, run = statistics.median(seconds), runs[name][-1]
        record = {
            "engine": name,
            **first[name],
            "updates": run.updates,
            "target_tokens": run.tokens,
            "seconds": seconds,
            "cpu_seconds": [run.cpu_seconds for run in runs[name]],
            "update_ms": 1e3 * median / run.updates,
            "target_tokens_per_s": run.tokens / median,
            "last_loss": run.loss,
            "matmul_gflops": statistics.median(rates[name]) / 1e9,
        }
        if flops:
            record["share_of_matmul_rate"] = flops * run.updates / median / machine_rate
        records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    first = records[0]
    lines = [
        "| engine | trace + compile, or first calls, s | update, ms | target tokens/s | times torch's "
        "| share of matmul rate | matmul, GFLOP/s | CPU time, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    torch_rate = next((record["target_tokens_per_s"] for record in records if "torch" in record["engine"]), None)
    for record in records:
        begin = [f"{record[name]:.1f}" for name in ("trace_s", "compile_s", "first_call_s") if name in record]
        cells = [
            record["engine"],
            " + ".join(begin),
            f"{record['update_ms']:.1f}",
            f"{record['target_tokens_per_s']:.0f}",
            f"{record['target_tokens_per_s'] / torch_rate:.2f}" if torch_rate else "",
            f"{record['share_of_matmul_rate']:.0%}" if "share_of_matmul_rate" in first else "",
            f"{record['matmul_gflops']:.0f}",
            f"{1e3 * statistics.median(record['cpu_seconds']) / record['updates']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _experiment(model: TransformerConfig, device: str, loss_chunks: int) -> Experiment:
    training = TrainingConfig(
        parallelism=ParallelismConfig(loss_chunks=loss_chunks),
        schedule=ScheduleConfig(name="constant", learning_rate=LEARNING_RATE, warmup_steps=1),
        rng_impl="rbg" if device == "gpu" else TrainingConfig.rng_impl,
    )
    return Experiment(model=model, training=training)


def _start(names: Iterable[str], experiment: Experiment, data: Data, device: str, threads: int) -> dict[str, Executor]:
    return {
        name: ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_build, initargs=(name, experiment, data, device, threads)
        )
        for name in names
    }


def main() -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("step", "epoch", "pipeline"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["flax_transformer", "torch"])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--preset", choices=("base", "big", "tiny"), default="base", help="of step (default base)")
    parser.add_argument(
        "--loss_chunks", type=int, help="training.parallelism.loss_chunks of this library (default 1 for step, else 8)"
    )
    parser.add_argument("--vocabulary_size", type=int, default=8000, help="of step (default 8000)")
    parser.add_argument("--rows", type=int, help="of step (default 32, on a GPU 128)")
    parser.add_argument(
        "--data", type=Path, help="epoch: Multi30k's raw text; pipeline: a folder of train.de, train.en"
    )
    parser.add_argument("--updates", type=int, help="in a run (default 5, on a GPU 20; of text a whole epoch)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each engine (default 5)")
    parser.add_argument("--threads", type=int, default=THREADS, help="and cores, of each engine (default all)")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default benchmarks/results/...)")
    options = parser.parse_args()
    on_gpu = options.device == "gpu"
    # This process only counts and writes; the others share the GPU, so none of them may reserve all of its memory.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"JAX_PLATFORMS": "cuda" if on_gpu else "cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    machine, flops, pipeline = report.machine(), None, []
    if options.what == "step":
        size, rows, slots = options.vocabulary_size, options.rows or (128 if on_gpu else 32), 256 if on_gpu else 32
        model = getattr(TransformerConfig, options.preset)(
            source_vocab_size=size, target_vocab_size=size, dtype="bfloat16" if on_gpu else "float32"
        )
        flops = model_flops(model, rows, slots, slots)
        data: Data = FullRows.draw(model, rows, slots, options.updates or (20 if on_gpu else 5))
        engines = options.engines
    else:
        if options.data is None:
            parser.error(f"{options.what} needs --data, a folder of train.en and train.de")
        text = load_corpus(f"files:{options.data}/train.en,{options.data}/train.de")
        vocabularies = VocabularyPair.train(text.source, text.target, VocabularyConfig(size=4000))
        size = vocabularies.target.size
        model = TransformerConfig.tiny(norm="pre", source_vocab_size=size, target_vocab_size=size)
        data, engines = Sentences.encode(text, vocabularies, options.updates), options.engines
        if options.what == "pipeline":
            # A few batches are enough to compare how many tokens the pipeline makes with how many the model consumes.
            pipeline, engines = pipeline_rates(data, options.repeats), ["flax_transformer"]
            data = dataclasses.replace(data, updates=options.updates or 50)
    if on_gpu:
        engines = ["torch_compiled" if name == "torch" else name for name in engines]
    loss_chunks = options.loss_chunks or (1 if options.what == "step" else 8)
    experiment = _experiment(model, options.device, loss_chunks)
    processes = _start(engines, experiment, data, options.device, options.threads)
    if on_gpu:
        machine = next(iter(processes.values())).submit(report.machine).result()
    records = measure(processes, options.repeats, flops)

    print(table(records))
    measured = {"seed": report.SEED, "machine": machine, "model": dataclasses.asdict(model)}
    measured |= {"loss_chunks": loss_chunks, "results": records}
    if pipeline:
        made, taken = statistics.median(pipeline), records[0]["target_tokens_per_s"]
        measured["pipeline_target_tokens_per_s"] = pipeline
        print(f"the pipeline alone: {made:.0f} target tokens/s, {made / taken:.1f} times what the model takes")
    name = f"train_{options.what}_{options.preset}" if options.what == "step" else f"train_{options.what}"
    path = options.output or RESULTS / f"{name}_{options.device}.json"
    report.write(path, "benchmarks.train", ("jax", "flax", "optax", "torch", "sentencepiece"), measured)


if __name__ == "__main__":
    main()
