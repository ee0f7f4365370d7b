"""Provides small random models with vocabularies, which the tests convert."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.interop.marian import from_marian, to_marian
from flax_transformer.trained_model import TrainedModel, param_shapes

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()


def sentence(number, length):
    return " ".join(np.random.default_rng(number).choice(WORDS, length))


SENTENCES = [sentence(number, length) for number, length in enumerate([3, 9, 1, 14, 2, 5, 4, 11, 6, 3, 3, 8])]


@pytest.fixture(scope="session")
def vocabularies():
    lines = [sentence(100 + number, 6) for number in range(40)]
    return VocabularyPair.train(lines, lines, VocabularyConfig(size=110, byte_fallback=False))


@pytest.fixture(scope="session")
def make_model(vocabularies):
    """Makes a model of random parameters, biases and norms included; `pair` is its vocabularies."""

    def make(seed=0, pair=vocabularies, **changes):
        config = TransformerConfig(
            source_vocab_size=pair.source.size,
            target_vocab_size=pair.target.size,
            **{
                "d_model": 16,
                "num_heads": 2,
                "d_ff": 24,
                "num_encoder_layers": 1,
                "num_decoder_layers": 2,
                "max_length": 40,
                "tie_embeddings": "none",  # otherwise the model would repeat its last token
                **changes,
            },
        )
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            if leaf.ndim == 1:
                return rng.normal(float(path[-1].key == "scale"), 0.1, leaf.shape).astype("float32")
            return rng.normal(0.0, 0.5, leaf.shape).astype("float32")

        params = jax.tree_util.tree_map_with_path(draw, param_shapes(config))
        return TrainedModel(config, params, pair)

    return make


@pytest.fixture(scope="session")
def sentences():
    """Twelve, of 1 to 14 words."""
    return SENTENCES


MARIAN = {"positions": "sinusoidal_concatenated", "output_bias": True}
TYINGS = ["three_way", "decoder", "none"]


def same_tree(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture
def folder(make_model, tmp_path):
    """A model as it is downloaded."""
    to_marian(make_model(**MARIAN), tmp_path / "downloaded")
    return tmp_path / "downloaded"


def change(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def fails(folder, tmp_path, match, convert=from_marian):
    """Converting must fail with one line, and leave nothing."""
    with pytest.raises(ValueError, match=match) as raised:
        convert(folder, tmp_path / "work")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))


QUERY = "model.decoder.layers.1.self_attn.q_proj.weight"
