"""Makes small models with random weights, and sentences for them, for tests that only need some model.

Their translations mean nothing, but they depend on every token of the source, so that any mix-up changes them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.trained_model import TrainedModel, param_shapes

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()


def say(number, length):
    """A sentence of some words; each number makes a different one."""
    return " ".join(np.random.default_rng(number).choice(WORDS, length))


def word_vocabularies(make=say):
    """The vocabularies of such sentences, or of those that another function makes of their number and length."""
    lines = [make(100 + number, 6) for number in range(40)]
    return VocabularyPair.train(lines, lines, VocabularyConfig(size=110, byte_fallback=False))


def small_config(size, **changes):
    """A config of `size` tokens on both sides, with other settings."""
    settings = {
        "d_model": 16,
        "num_heads": 2,
        "d_ff": 24,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "tie_embeddings": "none",  # otherwise the model would repeat its last token
        **changes,
    }
    return TransformerConfig(source_vocab_size=size, target_vocab_size=size, **settings)


def random_params(config, seed):
    """Matrices large enough that the model is sure of itself, and that its outputs differ by their sources."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        constants = {"scale": np.ones, "bias": np.zeros}
        return jnp.asarray(constants.get(path[-1].key, partial(rng.normal, 0.0, 0.7))(leaf.shape), "float32")

    return jax.tree_util.tree_map_with_path(fill, param_shapes(config))


def small_model(vocabularies, seed, **changes):
    """A model with these vocabularies; other arguments as above."""
    config = small_config(vocabularies.source.size, **changes)
    return TrainedModel(config, random_params(config, seed), vocabularies)
