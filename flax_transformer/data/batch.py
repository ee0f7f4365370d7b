"""Holds what arrives at the model at each step: packed sentence pairs, the one shape that data and training share.

An unpacked batch is the case where every token that is not padding has segment 1.
Glossary: B rows of a batch (under `pmap`, devices and the rows of each), S source slots, T target slots.
"""

import flax.struct
import jax
import numpy as np
from jaxtyping import Int


class Batch(flax.struct.PyTreeNode):
    """Packed sentence pairs, int32; padding is 0 throughout.

    Attributes:
        source: source token ids.
        source_segments: the number of each token's pair within its row, from 1; 0 is padding.
        source_positions: the position of each token within its sentence, from 0.
        target: target token ids, unshifted.
        target_segments: as on the source side; equal numbers translate each other.
        target_positions: as on the source side.
    """

    source: Int[np.ndarray | jax.Array, "*B S"]
    source_segments: Int[np.ndarray | jax.Array, "*B S"]
    source_positions: Int[np.ndarray | jax.Array, "*B S"]
    target: Int[np.ndarray | jax.Array, "*B T"]
    target_segments: Int[np.ndarray | jax.Array, "*B T"]
    target_positions: Int[np.ndarray | jax.Array, "*B T"]
