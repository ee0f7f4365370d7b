"""Chooses among samples the translation that is most like the others: minimum Bayes risk decoding.

The most probable translation is often short or repeats itself, while samples of a good model vary around the right one.
The risk of a translation is estimated as Eikema and Aziz (2022) do: the samples are its references, too.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from flax_transformer.decoding.results import Translation

ORDERS = range(1, 7)  # lengths of the sequences of characters that chrF counts
BETA = 2  # how much more recall counts than precision


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
    """The chrF of each text with each text as its reference, from 0 to 1 (Popović, 2015).

    It equals sacrebleu's, which would count the sequences of each text once for each other text.
    """
    precisions, recalls, orders = (np.zeros((len(texts), len(texts))) for _ in range(3))
    for order in ORDERS:
        counts = _counts(["".join(text.split()) for text in texts], order)
        matches = np.stack([np.minimum(counts, row).sum(axis=1) for row in counts])
        totals = counts.sum(axis=1)
        both = (totals[:, None] > 0) & (totals > 0)  # other orders do not count
        orders += both
        precisions += np.divide(matches, totals[:, None], out=np.zeros(matches.shape), where=both)
        recalls += np.divide(matches, totals, out=np.zeros(matches.shape), where=both)
    weighted = BETA**2 * precisions + recalls
    product = (1 + BETA**2) * precisions * recalls
    found = np.divide(product, weighted * orders, out=np.zeros(product.shape), where=weighted > 0)
    np.fill_diagonal(found, 1.0)
    return found


def _counts(texts: Sequence[str], order: int) -> Int[np.ndarray, "texts sequences"]:
    """How often each text has each sequence of `order` characters that any of them has."""
    found = [Counter(text[start : start + order] for start in range(len(text) - order + 1)) for text in texts]
    columns = {sequence: column for column, sequence in enumerate(sorted(set().union(*found)))}
    counts = np.zeros((len(texts), len(columns)), np.int64)
    for row, counted in zip(counts, found, strict=True):
        for sequence, count in counted.items():
            row[columns[sequence]] = count
    return counts
