"""Gives a model for many languages the embeddings of languages that it does not know yet, as a start for training.

Glossary: V a vocabulary's size, D d_model.
"""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.trained_model import TrainedModel

MEAN = "mean"
# The parameters with an entry for each piece, and the axis along which these entries lie.
BY_PIECE = {
    "shared_embedding/embedding": 0,  # [V, D]
    "source_embedding/embedding": 0,
    "target_embedding/embedding": 0,
    "output_kernel": 1,  # [D, V]
    "output_bias": 0,
}


def start_new_languages(model: TrainedModel, vocabularies: VocabularyPair, like: str) -> PyTree:
    """The model's parameters for vocabularies that know further languages (`VocabularyPair.speaking` with `add`).

    Args:
        model: a model that does not know them; it is not changed.
        vocabularies: its vocabularies, with tokens for the new languages.
        like: the language whose vectors the new tokens begin with, or "mean" for the mean of all that the model knows.

    Raises:
        ValueError: the model does not know the language `like`.
    """
    before, after = model.vocabularies.target, vocabularies.target
    known, pieces = before.all_pieces(), after.all_pieces()
    new = [number for number, piece in enumerate(pieces) if number >= len(known) or piece != known[number]]
    if not new:
        return model.params
    examples = sorted(before.language_ids) if like == MEAN else [known.index(before.speaking(like).language)]
    params = {path: np.asarray(leaf) for path, leaf in flatten_dict(model.params, sep="/").items()}
    for path, axis in BY_PIECE.items():
        if path in params:
            entries = np.moveaxis(params[path], axis, 0)
            grown = np.zeros((len(pieces), *entries.shape[1:]), entries.dtype)
            grown[: len(entries)] = entries
            grown[new] = entries[examples].mean(axis=0)
            params[path] = np.moveaxis(grown, 0, axis)
    return unflatten_dict(params, sep="/")
