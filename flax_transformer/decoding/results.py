"""What a translator returns: translations and alignments."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Translation:
    """One translation of a sentence.

    Attributes:
        text: the translation as text.
        tokens: its pieces, including the end of sentence (of each part, if the sentence was split); "▁" is a space.
        ids: the ids of these tokens.
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


def in_parts(translation: Translation, eos_id: int) -> bool:
    """Whether the sentence was too long for the model, so that parts of it were translated, each with an end."""
    return translation.ids.count(eos_id) > 1


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How much each target token attends to each source token; `plots.plot_attention` draws it.

    Attributes:
        source_tokens: the S pieces of the source.
        target_tokens: the T pieces of the target.
        weights: cross-attention, averaged over heads; row t belongs to the query that predicts target token t.
    """

    source_tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]
    weights: Float[np.ndarray, "T S"]
