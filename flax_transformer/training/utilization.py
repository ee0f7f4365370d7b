"""Takes a model's shape and a device and leaves how much of what the device can do a step asks for.

Glossary: S source and T target slots of a row, D d_model, F d_ff, V target vocabulary.
"""

import dataclasses

import jax

from flax_transformer.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do, as its maker says.

    Attributes:
        product: its name where it is rented or bought.
        flops: floating-point operations a second of its matrix units, in `dtype`, without sparsity.
        memory: bytes of high-bandwidth memory.
        devices: how many devices jax makes of one chip.
        dtype: in which it is that fast.
    """

    product: str
    flops: float
    memory: float
    devices: int = 1
    dtype: str = "bfloat16"


GB, GIB, TERA = 1e9, 2.0**30, 1e12

# By jax's `device_kind`. Sources: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x, read in November
# 2026; NVIDIA's data sheets of the V100, T4, A100, L4, H100 and H200 (dense rates, the SXM form where there are two).
CHIPS = {
    "TPU v4": Chip("v4", 275 * TERA, 32 * GIB),
    "TPU v5 lite": Chip("v5e", 197 * TERA, 16 * GB),
    "TPU v5": Chip("v5p", 459 * TERA, 95 * GB),
    "TPU v6 lite": Chip("v6e", 918 * TERA, 32 * GB),
    "TPU7x": Chip("tpu7x", 2307 * TERA, 192 * GIB, devices=2),
    "Tesla V100-SXM2-16GB": Chip("V100", 125 * TERA, 16 * GB, dtype="float16"),
    "Tesla T4": Chip("T4", 65 * TERA, 16 * GB, dtype="float16"),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312 * TERA, 40 * GB),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312 * TERA, 80 * GB),
    "NVIDIA L4": Chip("L4", 121 * TERA, 24 * GB),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989 * TERA, 80 * GB),
    "NVIDIA H200": Chip("H200", 989 * TERA, 141 * GB),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Floating-point operations a second of a device at its best; `None` where nobody has told, and in float32."""
    chip = CHIPS.get(device.device_kind)
    # Every chip of the table multiplies the two 16-bit types equally fast, or has one of them only.
    if chip is None or dtype == "float32":
        return None
    return chip.flops / chip.devices


def model_flops(config: TransformerConfig, rows: int, source_slots: int, target_slots: int) -> float:
    """Floating-point operations of the matrix products that one update of some rows asks for, padding included.

    The backward pass counts twice the forward pass; what `remat` computes again does not count, nor do additions,
    softmax and norms: the "model FLOPs" of Chowdhery et al., 2022 (PaLM, appendix B).
    """
    d_model, d_ff = config.d_model, config.d_ff
    feed_forward = 2 * 2 * d_model * d_ff
    projection = 2 * d_model * d_model
    # Scores and weighted sums of one query over all slots that it may look at.
    over_source, over_target = 2 * 2 * source_slots * d_model, 2 * 2 * target_slots * d_model
    encoder = config.num_encoder_layers * (4 * projection + over_source + feed_forward)
    memory = config.num_decoder_layers * 2 * projection
    decoder = config.num_decoder_layers * (6 * projection + over_target + over_source + feed_forward)
    logits = 2 * d_model * config.target_vocab_size
    return 3.0 * rows * (source_slots * (encoder + memory) + target_slots * (decoder + logits))
