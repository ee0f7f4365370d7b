"""Takes an experiment and the name of a slice and leaves what the compiler says of its training step there.

The step is the one that training runs, lowered for shapes alone: no array is made, and no device of the slice is there.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from flax_transformer.data.batch import Batch
from flax_transformer.experiment import Experiment
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import TrainState, create_state, make_train_step
from flax_transformer.training.utilization import CHIPS, Work, memory_of

# A step that the chip has no room for is tried again with so many chunks, if the slots can be divided.
LOSS_CHUNKS = 8
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "f64": 8, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices tell each other in one step, all of one kind.

    Attributes:
        kind: XLA's name, e.g. "all-reduce".
        count: how often.
        bytes: of what is reduced, or of what has been gathered, on one device.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled training step, the figures for one device.

    Attributes:
        arguments: bytes of the state and the batch.
        temporaries: bytes of everything that lives during the step only.
        peak: bytes in all: arguments, results that take no argument's place, temporaries and code.
        flops: floating-point operations that the compiler counts; `None` where there are loops, of which it counts one
            turn.
        seconds: its estimate of a step without collectives; `None` where it makes none.
        collectives: by kind.
        compile_seconds: what compiling took here.
    """

    arguments: int
    temporaries: int
    peak: int
    flops: float | None
    seconds: float | None
    collectives: list[Collective]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler's refusal: the step needs more memory than there is.

    Attributes:
        needed: bytes; `None` where the compiler did not tell.
        available: bytes that it may use.
        compile_seconds: until it refused.
    """

    needed: float | None
    available: float | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way of running the step on a slice.

    Attributes:
        changes: what was changed in the config, in words; empty for the config as it is.
        parallelism: how devices share the work.
        rows: of the global batch, filled up to a multiple of the devices.
        micro_batches: in how many parts a device takes its rows.
        devices: their number.
        gradient_bytes: of the whole gradient, in float32.
        work: what a step asks of the devices.
        result: the program, or why there is none.
    """

    changes: str
    parallelism: str
    rows: int
    micro_batches: int
    devices: int
    gradient_bytes: int
    work: Work
    result: Program | TooLarge

    @property
    def fits(self) -> bool:
        """Whether every device has room for the step."""
        return isinstance(self.result, Program)


def find_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice that need not be there.

    Args:
        topology: "here", "cpu:8" (so many devices of this machine's CPU), or a TPU's, e.g. "v5e:4x4".

    Raises:
        ValueError: there is no such slice, or the TPU's compiler is not installed.
    """
    if topology == "here":
        return jax.devices()
    kind, _, size = topology.partition(":")
    if kind == "cpu":
        if not size.isdecimal() or len(jax.devices("cpu")) < int(size) or int(size) < 1:
            raise ValueError(
                f"--topology is {topology!r}, and this process has {len(jax.devices('cpu'))} CPU devices: give "
                "cpu:N, and let no XLA_FLAGS set another number of devices"
            )
        return jax.devices("cpu")[: int(size)]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU's compiler is not installed: pip install 'flax_transformer[libtpu]'")
    # Nothing is there to be asked what machine this is, or to be kept from other processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Both cores of a v4 chip are one device, as they are on a Cloud TPU.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "INVALID_ARGUMENT" not in reason:
            raise ValueError(f"the TPU's compiler does not start: {reason}") from error
        raise ValueError(
            f"--topology is {topology!r}: {reason.partition('INVALID_ARGUMENT: ')[2]}; give here, cpu:8, or a TPU and "
            "its chips, e.g. v5e:4x4, v4:2x2x1, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1"
        ) from error


def device_memory(device: jax.Device) -> float | None:
    """Bytes that a device has, as its maker says or as it says itself; `None` where nobody does."""
    chip = CHIPS.get(device.device_kind)
    if chip is not None:
        return chip.memory / chip.devices
    statistics = device.memory_stats() if device.platform == "gpu" else None
    return statistics["bytes_limit"] if statistics else None


def plans(experiment: Experiment, devices: list[jax.Device], memory: float | None) -> Iterator[Plan]:
    """Compiles the experiment's step, and where it has no room, again with one remedy more each time until it has.

    The remedies, in turn: micro-batches, the loss in chunks, computing activations again, parameters divided.

    Args:
        experiment: with the vocabulary's sizes filled in.
        devices: of the slice.
        memory: bytes of a device, where its compiler does not know; `None` if nobody does.
    """
    plan = make_plan(experiment, devices, memory, changes="")
    yield plan
    changes = []
    for name in ("micro-batches", "loss chunks", "remat", "fsdp"):
        if plan.fits:
            return
        changed = _remedy(name, experiment, plan, len(devices))
        if changed is None:
            continue
        experiment, change = changed
        changes.append(change)
        plan = make_plan(experiment, devices, memory, changes=", ".join(changes))
        yield plan


def _remedy(name: str, experiment: Experiment, plan: Plan, num_devices: int) -> tuple[Experiment, str] | None:
    """The experiment with a remedy, and what it changes, in words; `None` where it has it already."""
    training, model = experiment.training, experiment.model
    assert isinstance(plan.result, TooLarge)
    share = plan.rows // num_devices
    if name == "micro-batches":
        needed, available = plan.result.needed, plan.result.available
        parts = 2 * plan.micro_batches
        if needed and available:
            # Parameters and gradients do not shrink with the rows: twice the excess is a guess on the safe side.
            parts = plan.micro_batches * 2 ** math.ceil(math.log2(2 * needed / available))
        rows = max(1, share // parts)
        if rows >= (training.rows_per_device or share):
            return None
        training = dataclasses.replace(training, rows_per_device=rows)
        change = f"training.rows_per_device={rows}"
    elif name == "loss chunks":
        if training.loss_chunks > 1 or experiment.data.target_slots % LOSS_CHUNKS:
            return None
        training = dataclasses.replace(training, loss_chunks=LOSS_CHUNKS)
        change = f"training.loss_chunks={LOSS_CHUNKS}"
    elif name == "remat":
        if model.remat:
            return None
        model = dataclasses.replace(model, remat=True)
        change = "model.remat=True"
    else:
        if num_devices == 1 or "fsdp" in training.parallelism:
            return None
        training = dataclasses.replace(training, parallelism="fsdp")
        change = "training.parallelism=fsdp"
    return dataclasses.replace(experiment, training=training, model=model), change


def make_plan(experiment: Experiment, devices: list[jax.Device], memory: float | None, *, changes: str) -> Plan:
    """Compiles one step; arguments as in `plans`, `changes` in words."""
    config, data = experiment.training, experiment.data
    parallelism = Parallelism(config.parallelism, devices)
    parts = parallelism.micro_batches(data.rows, config.rows_per_device)
    multiple = parallelism.num_devices * parts
    rows = -(-data.rows // multiple) * multiple
    lowered = _lower(experiment, parallelism, rows, parts)
    begin = time.monotonic()
    result: Program | TooLarge
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result = _read_refusal(str(error), time.monotonic() - begin)
    else:
        result = _read_program(compiled, time.monotonic() - begin)
        if memory is not None and result.peak > memory:
            result = TooLarge(result.peak, memory, result.compile_seconds)
    return Plan(
        changes=changes,
        parallelism=str(parallelism),
        rows=rows,
        micro_batches=parts,
        devices=parallelism.num_devices,
        gradient_bytes=4 * count_parameters(experiment),
        work=Work.of(experiment, rows, parallelism.devices),
        result=result,
    )


def count_parameters(experiment: Experiment) -> int:
    """The model's parameters."""
    shapes = jax.eval_shape(lambda: create_state(experiment, jax.random.key(0)).params)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _lower(experiment: Experiment, parallelism: Parallelism, rows: int, micro_batches: int) -> jax.stages.Lowered:
    data = experiment.data

    def create() -> TrainState:
        return create_state(experiment, jax.random.key(0, impl=experiment.training.rng_impl))

    # Numbers that take no memory: whoever looks at a batch sees arrays.
    source, target = (np.broadcast_to(np.int32(0), (rows, slots)) for slots in (data.source_slots, data.target_slots))
    batch = Batch(source, source, source, target, target, target)
    return parallelism.lower(make_train_step(experiment, micro_batches), parallelism.shapes(create), batch)


def _read_program(compiled: Any, seconds: float) -> Program:
    memory, costs, module = compiled.memory_analysis(), compiled.cost_analysis(), Module(compiled.as_text())
    seconds_of_step, cycles = None, module.cycles(loops=False)
    if cycles:
        # For each operation that it has no estimate of, the TPU's compiler adds -1 second. It counts loops as one turn.
        estimate = costs["optimal_seconds"]
        seconds_of_step = (estimate - math.floor(min(estimate, 0))) * module.cycles(loops=True) / cycles
    return Program(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory_of(compiled),
        flops=None if module.has_loops else costs.get("flops"),
        seconds=seconds_of_step,
        collectives=read_collectives(module),
        compile_seconds=seconds,
    )


def _read_refusal(message: str, seconds: float) -> TooLarge:
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    needed = available = None
    if found:
        needed, available = (
            float(found[number]) * 1024.0 ** ("KMGT".index(found[number + 1]) + 1) for number in (1, 3)
        )
    return TooLarge(needed, available, seconds)


class Module:
    """The text of an optimised HLO module, and how often a step runs each of its computations.

    Attributes:
        computations: the lines of each, by name.
        times: how often each is run, a loop's body as often as it turns; by name.
    """

    def __init__(self, text: str):
        """Parses the text that XLA writes."""
        self.computations: dict[str, list[str]] = {}
        self.times: dict[str, int] = defaultdict(int)
        entry = name = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                name = head[2]
                self.computations[name] = []
                entry = name if head[1] else entry
            elif name:
                self.computations[name].append(line)
        self._visit(entry, 1)

    def _visit(self, name: str, times: int) -> None:
        self.times[name] += times
        for line in self.computations[name]:
            turns = times * self._turns(line) if " while(" in line else times
            for called in re.findall(r"(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)", line):
                if called in self.computations:
                    self._visit(called, turns)

    def _turns(self, line: str) -> int:
        """How often a loop turns: XLA tells, or it is the number that the loop's condition compares with."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = self.computations.get(condition[1], []) if condition else []
        return max((int(number) for number in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))), default=1)

    @property
    def has_loops(self) -> bool:
        """Whether a computation is run more often than its place in the text tells."""
        return any(" while(" in line for lines in self.computations.values() for line in lines)

    def cycles(self, *, loops: bool) -> int:
        """The TPU compiler's estimates of single operations, added up; a loop's body once, or as often as it turns."""
        total = 0
        for name, lines in self.computations.items():
            cycles = sum(map(int, re.findall(r"estimated_cycles\W+(\d+)", "\n".join(lines))))
            total += cycles * (self.times[name] if loops else self.times[name] > 0)
        return total


def read_collectives(module: Module) -> list[Collective]:
    """What devices tell each other in a step."""
    # Where one runs beside other work, the TPU's compiler writes it into several computations: they share a channel.
    # Under `pmap` all share one channel, but stand in one computation.
    found: dict[tuple[str, str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, lines in module.computations.items():
        for number, line in enumerate(lines):
            match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
            if not match or not module.times[name]:
                continue
            kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
            channel = re.search(r"channel_id=(\d+)", line)
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            if match[2] == "all-gather" and "-start(" in line:
                shapes = shapes[len(shapes) // 2 :]  # what is given stands before what is made
            size = sum(ITEM_BYTES[dtype] * math.prod(map(int, re.findall(r"\d+", shape))) for dtype, shape in shapes)
            places = found[kind, channel[1] if channel else f"{name}:{number}", str(shapes)]
            count, total = places.get(name, (0, 0))
            places[name] = (count + module.times[name], total + module.times[name] * size)
    sums: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for (kind, _, _), places in found.items():
        count, total = max(places.values())
        sums[kind] = (sums[kind][0] + count, sums[kind][1] + total)
    return [Collective(kind, *sums[kind]) for kind in sorted(sums)]
