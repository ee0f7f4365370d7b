"""Chooses among samples the translation that is most like the others: minimum Bayes risk decoding.

The most probable translation is often short or repeats itself, while samples of a good model vary around the right one.
The risk of a translation is estimated as Eikema and Aziz (2022) do: the samples are its references, too.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from flax_transformer.decoding.results import Translation


def rank_by_agreement(samples: Sequence[Translation]) -> list[Translation]:
    """The samples of one sentence, the one with the highest mean chrF against all of them first.

    Samples with the same text count as often as they were drawn, and stand side by side in the result.

    Args:
        samples: translations drawn at random, as `Translator.hypotheses` returns them with `Sampling(num_return=N)`.
    """
    texts = sorted({sample.text for sample in samples})
    counts = np.array([sum(sample.text == text for sample in samples) for text in texts], np.float64)
    gains = dict(zip(texts, agreement(texts) @ counts, strict=True))
    return sorted(samples, key=lambda sample: (-gains[sample.text], sample.text))


def agreement(texts: Sequence[str]) -> Float[np.ndarray, "texts texts"]:
    """The chrF of each text with each text as its reference, from 0 to 1."""
    metric = _chrf()
    found = np.eye(len(texts))
    for column, reference in enumerate(texts):
        for row, text in enumerate(texts):
            if row != column:
                found[row, column] = metric.sentence_score(text, [reference]).score / 100
    return found


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF  # only where it is needed, since it takes a while to load

    return CHRF()
