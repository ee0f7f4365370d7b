"""Models are saved whole, and not over each other."""

import jax
import numpy as np
import pytest

from flax_transformer.trained_model import TrainedModel
from tests.small_models import small_model, word_vocabularies


def test_a_model_is_saved_into_an_empty_folder_only(tmp_path):
    vocabularies = word_vocabularies()
    first, second = small_model(vocabularies, 1), small_model(vocabularies, 2)
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved is not empty: name a new folder"):
        second.save(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, TrainedModel.load(tmp_path / "saved").params, first.params)
