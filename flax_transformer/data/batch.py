"""The batch of sentence pairs that the data pipeline makes and each training step takes."""

import flax.struct

from flax_transformer.tokens import Tokens


class Batch(flax.struct.PyTreeNode):
    """Packed sentence pairs; segment i of the target translates segment i of the source.

    Attributes:
        source: the source side, [B, S].
        target: the target side, [B, T], not shifted: the model itself puts `start_id` in front.
    """

    source: Tokens
    target: Tokens
