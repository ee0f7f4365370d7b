"""Compiles an experiment's training step for a slice of devices, and reports what the compiler says about it.

It is the same step that training runs, lowered from shapes alone: no array is created, and the devices of the slice do
not have to exist.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from flax_transformer.data.batch import Batch
from flax_transformer.errors import is_out_of_memory
from flax_transformer.experiment import Experiment
from flax_transformer.monitoring.utilization import CHIPS, Work, memory_of
from flax_transformer.planning.hlo import Collective, Module, read_collectives
from flax_transformer.tokens import Tokens
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import create_state, make_create_state, make_train_step

# The number of loss chunks to try if the step does not fit and the target slots can be divided.
LOSS_CHUNKS = 8
# In seconds, for a clock of 0.1 GHz.
LONGEST_CYCLE = 1e-8


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled training step; all figures are for one device.

    Attributes:
        arguments: bytes of the state and the batch.
        temporaries: bytes of everything that exists only during the step.
        peak: bytes in all: arguments, results not stored in place of arguments, temporaries and code.
        flops: floating-point operations that the compiler counts; `None` if there are loops, of which it counts only
            one iteration.
        seconds: the compiler's estimate for a step without collectives; `None` if it makes none.
        collectives: the collective operations, by kind.
        compile_seconds: how long compiling took on this machine.
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
    """The result for a step that needs more memory than the device has.

    Attributes:
        needed: bytes, at least: some compilers count only temporaries; `None` if the compiler did not say.
        available: bytes that the step may use; `None` if the compiler did not say.
        compile_seconds: how long compiling took until it failed.
    """

    needed: float | None
    available: float | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way of running the step on a slice.

    Attributes:
        changes: the settings that differ from the experiment's, in words; empty if there are none.
        parallelism: how devices share the work.
        rows: rows of the global batch, filled up to a multiple of the devices.
        empty_rows: how many of these rows only fill up the batch.
        micro_batches: into how many micro-batches a device divides its rows.
        devices: the number of devices.
        gradient_bytes: size of the whole gradient, in float32.
        work: the floating-point operations of a step, and what the devices can do.
        result: the compiled program, or why there is none.
    """

    changes: str
    parallelism: str
    rows: int
    empty_rows: int
    micro_batches: int
    devices: int
    gradient_bytes: int
    work: Work
    result: Program | TooLarge

    @property
    def fits(self) -> bool:
        """Whether every device has enough memory for the step."""
        return isinstance(self.result, Program)


def find_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a slice, or descriptions of them that suffice for compiling.

    Args:
        topology: "here", "cpu:8" (that many devices of this machine's CPU), or a TPU slice, e.g. "v5e:4x4".

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
    # There is no TPU here to identify, or to reserve for this process.
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
    """Bytes of a device that a program may use: from the device if it is here, from its specification, or `None`."""
    # jax leaves a part of a GPU's memory to other programs.
    statistics = device.memory_stats() if device in jax.local_devices() else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    chip = CHIPS.get(device.device_kind)
    return None if chip is None else chip.memory / chip.devices


def plans(experiment: Experiment, devices: list[jax.Device], memory: float | None) -> Iterator[Plan]:
    """Compiles the experiment's step and, while it does not fit, compiles it again with one more remedy.

    The remedies are, in this order: smaller micro-batches, down to one row per device; the loss in chunks;
    rematerialisation; dividing the parameters among the devices.

    Args:
        experiment: with the vocabulary's sizes filled in.
        devices: the devices of the slice.
        memory: bytes of a device, for compilers that do not know it (the TPU's does); `None` if unknown.
    """
    plan = make_plan(experiment, devices, memory, changes="")
    yield plan
    changes: dict[str, str] = {}
    for name in ("micro-batches", "loss chunks", "remat", "fsdp"):
        while not plan.fits and (changed := _remedy(name, experiment, plan)) is not None:
            experiment, changes[name] = changed
            plan = make_plan(experiment, devices, memory, changes=", ".join(changes.values()))
            yield plan


def _remedy(name: str, experiment: Experiment, plan: Plan) -> tuple[Experiment, str] | None:
    """The experiment with a remedy, and the changed setting in words; `None` if the remedy cannot be applied."""
    parallelism = experiment.training.parallelism
    assert isinstance(plan.result, TooLarge)
    value: int | str
    share = plan.rows // plan.devices
    if name == "micro-batches":
        needed, available = plan.result.needed, plan.result.available
        excess = needed / available if needed and available else 1.0
        rows = max(1, share // (plan.micro_batches * 2 ** max(1, math.ceil(math.log2(excess)))))
        if rows >= (parallelism.rows_per_device or share):
            return None
        setting, value = "training.parallelism.rows_per_device", rows
    elif name == "loss chunks":
        if parallelism.loss_chunks > 1 or experiment.data.target_slots % LOSS_CHUNKS:
            return None
        setting, value = "training.parallelism.loss_chunks", LOSS_CHUNKS
    elif name == "remat":
        if experiment.model.remat:
            return None
        setting, value = "model.remat", True
    else:
        if plan.devices == 1 or "fsdp" in parallelism.layout:
            return None
        setting, value = "training.parallelism.layout", "fsdp"
    return experiment.changed({setting: value}), f"{setting}={value}"


def make_plan(experiment: Experiment, devices: list[jax.Device], memory: float | None, *, changes: str) -> Plan:
    """Compiles one step; `changes` describes the experiment, the other arguments are those of `plans`."""
    config, data = experiment.training.parallelism, experiment.data
    parallelism = Parallelism(config.layout, devices)
    parts = parallelism.micro_batches(data.rows, config.rows_per_device)
    multiple = parallelism.num_devices * parts
    rows = -(-data.rows // multiple) * multiple
    lowered = _lower(experiment, parallelism, rows, parts)
    begin = time.monotonic()
    result: Program | TooLarge
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result = _read_refusal(str(error), time.monotonic() - begin)
    else:
        result = _read_program(compiled, time.monotonic() - begin)
        # The TPU's compiler, which knows the memory better than a specification, refuses what does not fit.
        if memory is not None and result.peak > memory and devices[0].platform != "tpu":
            result = TooLarge(result.peak, memory, result.compile_seconds)
    return Plan(
        changes=changes,
        parallelism=str(parallelism),
        rows=rows,
        empty_rows=rows - data.rows,
        micro_batches=parts,
        devices=parallelism.num_devices,
        gradient_bytes=4 * count_parameters(experiment),
        work=Work.of(experiment, rows, parallelism.devices),
        result=result,
    )


def count_parameters(experiment: Experiment) -> int:
    """The number of the model's parameters."""
    shapes = jax.eval_shape(lambda: create_state(experiment, jax.random.key(0)).params)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _lower(experiment: Experiment, parallelism: Parallelism, rows: int, micro_batches: int) -> jax.stages.Lowered:
    data = experiment.data
    source, target = (jax.ShapeDtypeStruct((rows, slots), np.int32) for slots in (data.source_slots, data.target_slots))
    batch = Batch(Tokens(source, source, source), Tokens(target, target, target))
    state = parallelism.shapes(make_create_state(experiment), jax.random.key(0, impl=experiment.training.rng_impl))
    return parallelism.lower(make_train_step(experiment, micro_batches), state, batch)


def _read_program(compiled: Any, seconds: float) -> Program:
    memory, costs, module = compiled.memory_analysis(), compiled.cost_analysis(), Module(compiled.as_text())
    seconds_of_step, cycles = None, module.cycles(loops=False)
    if cycles:
        # The TPU's compiler counts -1 second for each custom call, and only one iteration of a loop.
        estimate = costs["optimal_seconds"] + module.num_custom_calls
        if not 0 < estimate < 1 + cycles * LONGEST_CYCLE:
            estimate %= 1  # another version counts other calls: whole seconds cannot be known
        seconds_of_step = estimate * module.cycles(loops=True) / cycles
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
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"(?:temporaries \(|Used ){size}\)? (?:exceeds available HBM \(|of ){size}", message)
    needed = available = None
    if found:
        needed, available = (
            float(found[number]) * 1024.0 ** ("KMGT".index(found[number + 1]) + 1) for number in (1, 3)
        )
    return TooLarge(needed, available, seconds)
