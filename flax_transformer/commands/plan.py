"""Compiles the training step for a TPU slice, or for other devices, that this machine
need not have, and shows the memory and the time that the step would take there.

All figures come from the compiler, and nothing is run. If the step does not fit into
memory, it is compiled again with one more remedy at a time until it fits.
"""

import argparse
import os
import sys
from typing import Any

from flax_transformer.commands.config import add_config_option, read_config
from flax_transformer.commands.options import number
from flax_transformer.commands.process import start_devices
from flax_transformer.ranges import AT_LEAST_NONE

EXAMPLES = """examples:
  flax-transformer plan --config=wmt14_en_de_big --topology=v5e:4x4
  flax-transformer plan --config=wmt14_en_de_big --topology=v5e:16x16 --parallel=fsdp --config.data.rows=1024
  flax-transformer plan --config=quickstart --topology=cpu:8

product   --topology       product   --topology       product           --topology
v4-8      v4:2x2x1         v5e-4     v5e:2x2          v5p-128           v5p:4x4x4
v6e-16    v6e:4x4          v5e-16    v5e:4x4          a host of tpu7x   tpu7x:2x2x1
                           v5e-256   v5e:16x16

Compiling for a TPU takes minutes on a small machine."""
USAGE = "--config CONFIG --topology NAME [OPTIONS] [--config.SECTION.KEY=VALUE ...]"
MEMORY_REMEDY = "plan on a machine that has more"
GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_config_option(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="the devices: a TPU slice, e.g. v5e:4x4 (needs the extra libtpu); cpu:N for N devices of this machine's "
        "CPU; or the word here for the devices of this machine",
    )
    parser.add_argument(
        "--parallel",
        metavar="KIND",
        help="use this layout instead of training.parallelism.layout: pmap, data, fsdp, data=2,fsdp=4 or jit",
    )

    parser.add_argument(
        "--price_per_hour",
        type=number(float, AT_LEAST_NONE, f"a number, {AT_LEAST_NONE}"),
        metavar="X",
        help="what all the devices together cost an hour, in any currency, for an estimate of what training costs",
    )


def run(options: argparse.Namespace) -> None:
    """Compiles and prints; raises ValueError that says what to do."""
    if options.topology != "here":
        # Set before jax loads: planning needs a compiler and no device.
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Hides what libtpu logs about not being on a TPU machine.
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    kind, _, size = options.topology.partition(":")
    if kind == "cpu" and size.isdecimal() and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        count = f"--xla_force_host_platform_device_count={size}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    # jax loads here, so that --help answers at once.
    start_devices()
    from flax_transformer.planning import plan as planning

    experiment = _load(options)
    devices = planning.find_devices(options.topology)
    memory = planning.device_memory(devices[0])
    room = "" if memory is None else f", {_gb(memory)} each"
    print(f"{options.topology}: {len(devices)} devices of kind {devices[0].device_kind}{room}")
    print(
        f"{planning.count_parameters(experiment):,} parameters, {experiment.model.dtype}; rows of "
        f"{experiment.data.source_slots} source and {experiment.data.target_slots} target slots"
    )
    print("compiling ...", flush=True)
    fits = False
    for plan in planning.plans(experiment, devices, memory):
        print()
        fits = _show(plan, memory, experiment.training.steps, options.price_per_hour)
        sys.stdout.flush()
    if not fits:
        sys.exit(1)


def _load(options: argparse.Namespace) -> Any:
    """The experiment, with a vocabulary of the size that the config asks for where none is known yet."""
    from flax_transformer.experiment import Experiment

    experiment = Experiment.from_mapping(read_config(options.config, options.changes))
    model, size = experiment.model, experiment.vocabulary.size
    return experiment.changed(
        {
            "model.source_vocab_size": model.source_vocab_size or size,
            "model.target_vocab_size": model.target_vocab_size or size,
            "training.parallelism.layout": options.parallel or experiment.training.parallelism.layout,
        }
    )


def _show(plan: Any, memory: float | None, steps: int, price_per_hour: float | None) -> bool:
    """Prints one plan; whether it fits.

    Args:
        plan: the plan.
        memory: bytes of a device; `None` if unknown.
        steps: the number of steps of the training.
        price_per_hour: of all devices; `None` if not given.
    """
    micro_batches = f", {plan.micro_batches} micro-batches" if plan.micro_batches > 1 else ""
    empty = f" ({plan.empty_rows} of them empty)" if plan.empty_rows else ""
    print(
        f"{plan.changes or 'as the config says'}: {plan.parallelism}, {plan.rows:,} rows a step{empty}{micro_batches}"
    )
    result = plan.result
    if not plan.fits:
        needed = (
            "more memory than the device has" if result.needed is None else f"at least {_gb(result.needed)} a device"
        )
        available = "" if result.available is None else f" of {_gb(result.available)}"
        print(f"  does not fit: it needs {needed}{available} (compiled for {result.compile_seconds:.0f} s)")
        return False
    of_chip = "" if memory is None else f" of {_gb(memory)} ({result.peak / memory:.0%})"
    print(f"  memory a device     {_gb(result.peak)}{of_chip}")
    print(f"    state and batch   {_gb(result.arguments)}")
    print(f"    temporaries       {_gb(result.temporaries)}")
    counted = "" if result.flops is None else f"; the compiler counts {result.flops:.3g}"
    print(f"  floating point      {plan.work.flops / plan.devices:.3g} operations a device and step{counted}")
    print(f"  gradient            {plan.gradient_bytes:,} bytes, float32")
    for collective in result.collectives:
        print(f"  {collective.kind:<18}  {collective.bytes:,} bytes a device and step, in {collective.count}")
    if result.seconds:
        tokens = plan.work.target_slots * (1 - plan.empty_rows / plan.rows) / result.seconds
        print(f"  a step              {1e3 * result.seconds:.1f} ms by the compiler's estimate, without collectives")
        print(f"    target tokens/s   {tokens:,.0f}, if no slot is empty")
        print(f"    {_hours(steps, result.seconds, price_per_hour)}")
        if plan.work.peak_flops:
            share, peak = plan.work.flops / result.seconds / plan.work.peak_flops, plan.work.peak_flops / plan.devices
            print(f"    utilisation       {share:.0%} of {peak / 1e12:.0f} TFLOP/s (model FLOPs)")
    elif price_per_hour is not None:
        print("  hours               unknown: this compiler does not estimate times")
    verdict = "it fits" if memory else "device memory is unknown, so whether it fits cannot be checked"
    print(f"  compiled in {result.compile_seconds:.0f} s; {verdict}")
    return True


def _hours(steps: int, seconds: float, price_per_hour: float | None) -> str:
    """How long the steps take, and what that costs if a price is given."""
    hours = steps * seconds / 3600
    cost = "" if price_per_hour is None else f", which cost {hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    return f"{f'{steps:,} steps':<17} at least {hours:,.1f} hours{cost}"


def _gb(number: float) -> str:
    return f"{number / GB:.3f} GB"
