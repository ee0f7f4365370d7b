"""Trains an experiment with this library or with PyTorch, and measures the time."""

import dataclasses
import functools
import time
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import torch

from benchmarks.report import SEED
from benchmarks.torch_training import make_step
from benchmarks.training_data import Data, PackedData
from flax_transformer.experiment import Experiment
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import create_state, make_train_step

LEARNING_RATE = 1e-4
MATMUL_SIZE = {"cpu": 2048, "gpu": 8192}


@dataclasses.dataclass(frozen=True)
class Run:
    """The time and the result of an engine's updates.

    Attributes:
        seconds: from the first batch until the last update was done.
        cpu_seconds: CPU time of all threads of the process, including busy waiting; other programs hardly affect it.
        updates: number of updates.
        tokens: number of target tokens without padding.
        loss: label-smoothed loss of the last update, in nats per token.
    """

    seconds: float
    cpu_seconds: float
    updates: int
    tokens: int
    loss: float


class Engine(Protocol):
    """One way to train."""

    def first_call(self) -> dict[str, float]:
        """The seconds of everything that only a first call does, by name; call it at most once."""
        ...

    def train(self) -> Run:
        """Makes the updates of one run."""
        ...

    def matmul_rate(self) -> float:
        """Floating-point operations per second of one large matrix product in the model's type."""
        ...


class Ours:
    """This library, as in the training loop; its step also computes norms of gradients and counts correct tokens."""

    def __init__(self, experiment: Experiment, data: PackedData, device: str):
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
