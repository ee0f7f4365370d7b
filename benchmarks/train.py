"""Takes a model and text in two libraries and leaves how fast each trains, as JSON and as a table.

    python -m benchmarks.train step                              # one update of `base`, 32 rows of 32+32 tokens
    python -m benchmarks.train epoch --data FOLDER               # an epoch of Multi30k with `tiny`, packed or padded
    python -m benchmarks.train pipeline --data FOLDER            # batches alone, beside how fast `tiny` takes them
    python -m benchmarks.train step --device gpu --preset big    # bfloat16, rows of 256+256 tokens

The libraries are this one and PyTorch's `nn.Transformer`, on request also compiled. Each has a process of its own and
all cores, and they take turns, so that whatever else slows the machine down slows all of them down. Compiling is timed
apart. Run it on a machine that does nothing else.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import report
from benchmarks.report import RESULTS, SEED, THREADS
from benchmarks.torch_training import make_step
from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText, load_corpus
from flax_transformer.data.pipeline import PackedCorpus, Packing, TokenSide
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig, Experiment, TrainingConfig, VocabularyConfig
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import create_state, make_train_step
from flax_transformer.training.utilization import model_flops

ENGINES = ("flax_transformer", "torch", "torch_compiled")
# As in configs/multi30k_en_de.py.
MULTI30K = DataConfig(rows=32, source_slots=64, target_slots=64, seed=SEED)
LEARNING_RATE = 1e-4
MATMUL_SIZE = {"cpu": 2048, "gpu": 8192}

Padded = tuple[np.ndarray, np.ndarray]


class Data(Protocol):
    """What is trained on, as each library takes it."""

    def packed(self) -> Iterable[Batch]:
        """Batches of this library."""
        ...

    def padded(self) -> list[Padded]:
        """Source and target of each batch, a sentence a row."""
        ...


@dataclasses.dataclass(frozen=True)
class FullRows:
    """The same rows of random tokens again and again, none of them padding."""

    source: np.ndarray
    target: np.ndarray
    updates: int

    @classmethod
    def draw(cls, config: TransformerConfig, rows: int, slots: int, updates: int) -> "FullRows":
        """Rows that look like sentences to neither library."""
        tokens = np.random.default_rng(SEED).integers(4, config.source_vocab_size, (2, rows, slots), np.int32)
        return cls(*tokens, updates)

    def packed(self) -> Iterable[Batch]:
        ones = np.ones_like(self.source)
        positions = ones.cumsum(axis=1, dtype=np.int32) - 1
        return [Batch(self.source, ones, positions, self.target, ones, positions)] * self.updates

    def padded(self) -> list[Padded]:
        return [(self.source, self.target)] * self.updates


@dataclasses.dataclass(frozen=True)
class Sentences:
    """A corpus, tokenised; of an epoch's batches `updates` are taken, or all."""

    source: TokenSide
    target: TokenSide
    packing: Packing
    config: DataConfig
    updates: int | None

    def corpus(self) -> PackedCorpus:
        """The corpus as training has it."""
        return PackedCorpus(self.source, self.target, self.packing, self.config)

    def packed(self) -> Iterator[Batch]:
        corpus = self.corpus()
        return corpus.batches(0, self.updates or round(corpus.epoch_steps))

    def padded(self) -> list[Padded]:
        """Sentences of like length together, as many target tokens a batch as a packed one has on average."""
        pairs = np.concatenate([self.packing[row] for row in range(len(self.packing))])
        lengths = self.source.lengths[pairs], self.target.lengths[pairs]
        pairs = pairs[np.lexsort(lengths)]
        tokens = self.target.lengths[pairs]
        a_batch = tokens.sum() / (len(self.packing) / self.config.rows)
        number = (np.cumsum(tokens) - 1) // a_batch
        batches = np.split(pairs, np.flatnonzero(np.diff(number)) + 1)
        order = np.random.default_rng(SEED).permutation(len(batches))[: self.updates]
        return [(_pad(self.source, batches[place]), _pad(self.target, batches[place])) for place in order]


def _pad(side: TokenSide, pairs: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(pairs), side.lengths[pairs].max()), np.int32)
    for row, pair in zip(rows, pairs, strict=True):
        row[: len(side[pair])] = side[pair]
    return rows


@dataclasses.dataclass(frozen=True)
class Run:
    """What an engine's updates took.

    Attributes:
        seconds: from the first batch until the last update was done.
        cpu_seconds: of all threads of the process, busy waiting among it; other programs hardly change it.
        updates: how many.
        tokens: target tokens, padding left out.
        loss: label-smoothed, of the last update, in nats a token.
    """

    seconds: float
    cpu_seconds: float
    updates: int
    tokens: int
    loss: float


class Engine(Protocol):
    """One way to train."""

    def first_call(self) -> dict[str, float]:
        """Seconds of what only a first call does, by its name; done at most once."""
        ...

    def train(self) -> Run:
        """Makes the updates of one run."""
        ...

    def matmul_rate(self) -> float:
        """Floating-point operations a second of one large product in the model's type."""
        ...


class Ours:
    """This library, as the training loop runs it; the step also takes norms of gradients and counts right tokens."""

    def __init__(self, experiment: Experiment, data: Data, device: str):
        self._data, self._device, self._dtype = data, device, experiment.model.dtype
        self._parallelism = Parallelism("jit")
        rng = jax.random.key(SEED, impl=experiment.training.rng_impl)
        self._state = self._parallelism.create(functools.partial(create_state, experiment), rng)
        self._step: Any = self._parallelism.transform(make_train_step(experiment, 1), donate_state=True)

    def first_call(self) -> dict[str, float]:
        batch = next(iter(self._data.packed()))
        start = time.perf_counter()
        lowered = self._step.lower(self._state, batch)
        traced = time.perf_counter()
        self._step = lowered.compile()
        return {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}

    def train(self) -> Run:
        updates, tokens, batches = 0, [], self._data.packed()
        start, cpu_start = time.perf_counter(), time.process_time()
        for batch in batches:
            self._state, metrics = self._step(self._state, batch)
            updates, tokens = updates + 1, [*tokens, metrics.sums.tokens]
        jax.block_until_ready((self._state, metrics))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        loss = metrics.sums.smoothed / metrics.sums.tokens
        return Run(seconds, cpu_seconds, updates, round(sum(map(float, tokens))), float(loss))

    def matmul_rate(self) -> float:
        size = MATMUL_SIZE[self._device]
        matrix = jnp.ones((size, size), self._dtype)
        product = jax.jit(jnp.matmul)
        return _best_rate(size, lambda: product(matrix, matrix).block_until_ready())


class InTorch:
    """`nn.Transformer`; its padded batches are ready before the clock starts."""

    def __init__(self, experiment: Experiment, data: Data, device: str, *, compiled: bool = False):
        torch.manual_seed(SEED)
        self._device, self._dtype = {"cpu": "cpu", "gpu": "cuda"}[device], experiment.model.dtype
        self._size, pad_id = MATMUL_SIZE[device], experiment.model.pad_id
        self._batches = []
        for source, target in data.padded():
            source, target = (torch.tensor(side, dtype=torch.long, device=self._device) for side in (source, target))
            self._batches.append((source, target, source == pad_id if (source == pad_id).any() else None))
        self._tokens = sum(int((target != pad_id).sum()) for _, target, _ in self._batches)
        length = max(max(source.shape[1], target.shape[1]) for source, target, _ in self._batches)
        self._step = make_step(
            experiment.model,
            length,
            learning_rate=LEARNING_RATE,
            label_smoothing=experiment.training.label_smoothing,
            device=self._device,
            compiled=compiled,
        )

    def first_call(self) -> dict[str, float]:
        start = time.perf_counter()
        for batch in self._batches[:3]:
            self._step(*batch).item()
        return {"first_call_s": time.perf_counter() - start}

    def train(self) -> Run:
        start, cpu_start = time.perf_counter(), time.process_time()
        for batch in self._batches:
            loss = self._step(*batch)
        loss = loss.item()
        return Run(time.perf_counter() - start, time.process_time() - cpu_start, len(self._batches), self._tokens, loss)

    def matmul_rate(self) -> float:
        matrix = torch.ones(self._size, self._size, dtype=getattr(torch, self._dtype), device=self._device)

        def product() -> None:
            torch.matmul(matrix, matrix)
            if self._device == "cuda":
                torch.cuda.synchronize()

        return _best_rate(self._size, product)


def _best_rate(size: int, product: Any) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


_in_this_process: list[Any] = []  # an engine


def _build(name: str, experiment: Experiment, data: Data, device: str, threads: int) -> None:
    """Makes one engine, in a process of its own."""
    if threads < THREADS:
        # XLA makes as many threads as it has cores.
        os.sched_setaffinity(0, range(threads))
    torch.set_num_threads(threads)
    makers = {"torch": InTorch, "torch_compiled": functools.partial(InTorch, compiled=True), "flax_transformer": Ours}
    _in_this_process[:] = [makers[name](experiment, data, device)]


def _call(method: str) -> Any:
    return getattr(_in_this_process[0], method)()


def measure(engines: dict[str, Executor], repeats: int, flops: float | None) -> list[dict[str, Any]]:
    """Lets every engine train in turn; one record for each.

    Args:
        engines: by name, each in its process.
        repeats: timed runs of each.
        flops: operations of the products of one update, if all updates ask for the same.
    """

    def ask(name: str, method: str) -> Any:
        time.sleep(0.5)  # The threads of the last one wait busily for more work, for a while.
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


def _experiment(model: TransformerConfig, device: str) -> Experiment:
    training = TrainingConfig(
        schedule="constant",
        learning_rate=LEARNING_RATE,
        warmup_steps=1,
        rng_impl="rbg" if device == "gpu" else TrainingConfig.rng_impl,
    )
    return Experiment(model=model, training=training)


def _sentences(text: ParallelText, vocabularies: VocabularyPair, updates: int | None) -> Sentences:
    source = TokenSide.encode(vocabularies.source, text.source)
    target = TokenSide.encode(vocabularies.target, text.target)
    packing = Packing.plan(source, target, text.repeats, MULTI30K, max_length=256)
    return Sentences(source, target, packing, MULTI30K, updates)


def _start(names: Iterable[str], experiment: Experiment, data: Data, device: str, threads: int) -> dict[str, Executor]:
    return {
        name: ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_build, initargs=(name, experiment, data, device, threads)
        )
        for name in names
    }


def _pipeline(sentences: Sentences, repeats: int) -> list[float]:
    """Target tokens a second that the pipeline alone makes, as often as asked."""
    corpus, rates = sentences.corpus(), []
    steps = round(corpus.epoch_steps)
    for number in range(repeats):
        start, tokens = time.perf_counter(), 0
        for batch in corpus.batches(number * steps, (number + 1) * steps):
            tokens += np.count_nonzero(batch.target_segments)
        rates.append(tokens / (time.perf_counter() - start))
    return rates


def main() -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("step", "epoch", "pipeline"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["flax_transformer", "torch"])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--preset", choices=("base", "big", "tiny"), default="base", help="of step (default base)")
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
    # This process only counts and writes; the others must not keep all of the GPU's memory from one another.
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
        data, engines = _sentences(text, vocabularies, options.updates), options.engines
        if options.what == "pipeline":
            # What is made is held against what is taken: some batches are enough to tell.
            pipeline, engines = _pipeline(data, options.repeats), ["flax_transformer"]
            data = dataclasses.replace(data, updates=options.updates or 50)
    if on_gpu:
        engines = ["torch_compiled" if name == "torch" else name for name in engines]
    processes = _start(engines, _experiment(model, options.device), data, options.device, options.threads)
    if on_gpu:
        machine = next(iter(processes.values())).submit(report.machine).result()
    records = measure(processes, options.repeats, flops)

    print(table(records))
    measured = {"machine": machine, "model": dataclasses.asdict(model), "results": records}
    if pipeline:
        made, taken = statistics.median(pipeline), records[0]["target_tokens_per_s"]
        measured["pipeline_target_tokens_per_s"] = pipeline
        print(f"the pipeline alone: {made:.0f} target tokens/s, {made / taken:.1f} times what the model takes")
    name = f"train_{options.what}_{options.preset}" if options.what == "step" else f"train_{options.what}"
    path = options.output or RESULTS / f"{name}_{options.device}.json"
    report.write(path, "benchmarks.train", ("jax", "flax", "optax", "torch", "sentencepiece"), measured)


if __name__ == "__main__":
    main()
