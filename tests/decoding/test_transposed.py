import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.transposed import opened, transpose_kernels
from flax_transformer.model import Transformer

V = 13
SOURCE, TARGET = jnp.array([[4, 5, 2, 0, 0], [7, 8, 9, 3, 2]]), jnp.array([[6, 2, 0], [5, 11, 2]])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tie_embeddings": "none", "output_bias": True}, marks=pytest.mark.slow),
        {"tie_embeddings": "three_way"},
        {"tie_embeddings": "decoder", "decoder_autoregression": "ssru"},
    ],
    ids=["untied", "tied", "recurrent"],
)
def test_a_model_computes_the_same_from_transposed_kernels(make_model, changes):
    config, params = make_model(V, 3, **changes)
    expected = Transformer(config).apply({"params": params}, SOURCE, TARGET, deterministic=True)
    with opened(config, transpose_kernels(params)) as (model, variables):
        found = model.apply(variables, SOURCE, TARGET, deterministic=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_transposing_changes_the_shape_of_each_kernel_alone_and_can_be_undone(make_model):
    config, params = make_model(V, 3, tie_embeddings="none")
    stored = transpose_kernels(params)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(stored.params), jax.tree.leaves(params), strict=True
    ):
        is_kernel = path[-1].key.endswith("kernel")
        assert ours.shape == (theirs.shape[::-1] if is_kernel else theirs.shape)
    jax.tree.map(np.testing.assert_array_equal, stored.original(), params)
    ensemble = Ensemble.on_devices([config], [params], jax.local_devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, ensemble.params(0), params)
