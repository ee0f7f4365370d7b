"""What a translator returns: translations and alignments."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Translation:
    """One translation of a sentence.

    Attributes:
        text: what it says.
        tokens: its pieces, the end of sentence included, of each part where the sentence was split; "▁" is a space.
        ids: the same as token ids.
        token_log_probs: the log-probability of each token, in nats.
        log_prob: their sum.
        score: that sum divided by the length penalty.
    """

    text: str = ""
    tokens: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    log_prob: float = 0.0
    score: float = 0.0


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What each target token looked at; `plots.plot_attention` draws it.

    Attributes:
        source_tokens: pieces of the source, S of them.
        target_tokens: pieces of the target, T of them.
        weights: cross-attention, heads averaged; row t is that of the query which predicted target token t.
    """

    source_tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]
    weights: Float[np.ndarray, "T S"]
