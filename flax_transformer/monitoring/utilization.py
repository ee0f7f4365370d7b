"""Counts the floating-point operations and the memory of a training step, and compares them with what devices offer.

Glossary: S source and T target slots of a row, D d_model, F d_ff, V target vocabulary.
"""

import dataclasses
from typing import Any

import jax

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specification of a chip, according to its manufacturer.

    Attributes:
        flops: floating-point operations per second of its matrix units, in `dtypes`, without sparsity.
        memory: bytes of high-bandwidth memory.
        devices: how many jax devices one chip is.
        dtypes: the types in which it reaches `flops`.
    """

    flops: float
    memory: float
    devices: int = 1
    dtypes: tuple[str, ...] = ("bfloat16", "float16")


GB, GIB, TERA = 1e9, 2.0**30, 1e12

# By jax's `device_kind`. Sources: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x, read in November
# 2026; NVIDIA's data sheets of the V100, T4, A100, L4, H100 and H200 (dense rates, the SXM form where there are two).
# What Google calls GB are GiB: the compiler lets a program for v5e use 15.75 GiB.
CHIPS = {
    "TPU v4": Chip(275 * TERA, 32 * GIB),
    "TPU v5 lite": Chip(197 * TERA, 16 * GIB),
    "TPU v5": Chip(459 * TERA, 95 * GIB),
    "TPU v6 lite": Chip(918 * TERA, 32 * GIB),
    "TPU7x": Chip(2307 * TERA, 192 * GIB, devices=2),
    "Tesla V100-SXM2-16GB": Chip(125 * TERA, 16 * GB, dtypes=("float16",)),
    "Tesla T4": Chip(65 * TERA, 16 * GB, dtypes=("float16",)),
    "NVIDIA A100-SXM4-40GB": Chip(312 * TERA, 40 * GB),
    "NVIDIA A100-SXM4-80GB": Chip(312 * TERA, 80 * GB),
    "NVIDIA L4": Chip(121 * TERA, 24 * GB),
    "NVIDIA H100 80GB HBM3": Chip(989 * TERA, 80 * GB),
    "NVIDIA H200": Chip(989 * TERA, 141 * GB),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """A device's maximum of floating-point operations per second; `None` if unknown, as it is for float32."""
    chip = CHIPS.get(device.device_kind)
    if chip is None or dtype not in chip.dtypes:
        return None
    return chip.flops / chip.devices


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one step on all devices together, and what these devices can do.

    Attributes:
        target_slots: target slots of the global batch.
        flops: floating-point operations of the model.
        peak_flops: the most floating-point operations per second of all devices; `None` if unknown.
    """

    target_slots: int
    flops: float
    peak_flops: float | None

    @classmethod
    def of(cls, experiment: Experiment, rows: int, devices: list[jax.Device]) -> "Work":
        """The work of a step on so many rows, including the empty rows that fill up the batch."""
        data = experiment.data
        peak = peak_flops(devices[0], experiment.model.dtype)
        return cls(
            target_slots=rows * data.target_slots,
            flops=model_flops(experiment.model, rows, data.source_slots, data.target_slots),
            peak_flops=None if peak is None else len(devices) * peak,
        )


def device_memory_peak(devices: list[jax.Device]) -> dict[str, float]:
    """The metric `memory_bytes`: the most bytes in use so far on a device of this process; empty on a CPU."""
    statistics = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for stats in statistics if stats and "peak_bytes_in_use" in stats]
    return {"memory_bytes": float(max(peaks))} if peaks else {}


def memory_of(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs on a device: arguments, results that do not replace arguments, temporaries, code."""
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def model_flops(config: TransformerConfig, rows: int, source_slots: int, target_slots: int) -> float:
    """Floating-point operations of the matrix products in one update on so many rows, including padding.

    These are the "model FLOPs" of Chowdhery et al., 2022 (PaLM, appendix B): the backward pass counts twice as much as
    the forward pass; additions, softmax, norms and what `remat` computes again do not count.
    """
    d_model, d_ff = config.d_model, config.d_ff
    feed_forward = 2 * 2 * d_model * d_ff
    projection = 2 * d_model * d_model
    # Attention scores and weighted sums of one query over all slots.
    over_source, over_target = 2 * 2 * source_slots * d_model, 2 * 2 * target_slots * d_model
    encoder = config.num_encoder_layers * (4 * projection + over_source + feed_forward)
    memory = config.num_decoder_layers * 2 * projection
    past = 2 * projection if config.decoder_autoregression == "ssru" else 4 * projection + over_target
    decoder = config.num_decoder_layers * (past + 2 * projection + over_source + feed_forward)
    logits = 2 * d_model * config.target_vocab_size
    return 3.0 * rows * (source_slots * (encoder + memory) + target_slots * (decoder + logits))
