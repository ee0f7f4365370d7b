import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.positions import LearnedPositions, check_length, sinusoidal_positions

D_MODEL = 16


def paper_formula(positions, d_model):
    """Section 3.5 in float64: PE(pos, 2i) = sin(pos / 10000^(2i/d_model)), PE(pos, 2i+1) its cosine."""
    vectors = np.zeros((len(positions), d_model))
    for row, position in enumerate(positions):
        for i in range(d_model // 2):
            angle = position / 10000 ** (2 * i / d_model)
            vectors[row, 2 * i], vectors[row, 2 * i + 1] = np.sin(angle), np.cos(angle)
    return vectors


@pytest.mark.parametrize("d_model", [2, D_MODEL, 512])
def test_interleaved_is_the_papers_formula_at_any_position(d_model):
    positions = np.array([0, 1, 2, 49, 50, 999, 5000])
    vectors = sinusoidal_positions(jnp.array(positions), d_model)
    # An angle of 5000 radians has a rounding error in float32, and its sine has the same.
    error = np.abs(vectors - paper_formula(positions, d_model))
    assert (error <= 2e-7 * (1 + positions[:, None])).all()


def test_concatenated_has_the_same_features_with_the_sines_first():
    positions = jnp.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 5000]])
    interleaved = sinusoidal_positions(positions, D_MODEL)
    concatenated = sinusoidal_positions(positions, D_MODEL, interleaved=False)
    assert jnp.array_equal(concatenated[..., : D_MODEL // 2], interleaved[..., 0::2])
    assert jnp.array_equal(concatenated[..., D_MODEL // 2 :], interleaved[..., 1::2])


@pytest.mark.parametrize("d_model", [2, 4, D_MODEL])
def test_with_an_endpoint_wavelengths_end_at_ten_thousand_times_the_shortest(d_model):
    positions, half = np.array([0, 1, 2, 50, 999]), d_model // 2
    vectors = np.asarray(sinusoidal_positions(jnp.array(positions), d_model, interleaved=False, endpoint=True))
    angles = positions[:, None] / np.geomspace(1, 10000, half)
    error = np.abs(vectors - np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))
    assert (error <= 2e-7 * (1 + positions[:, None])).all()


def test_an_odd_number_of_features_is_an_error():
    with pytest.raises(ValueError, match="d_model is 7: sines and cosines come in pairs"):
        sinusoidal_positions(jnp.arange(3), 7)


def test_a_vector_depends_on_the_position_and_not_on_its_index_in_the_row():
    packed = sinusoidal_positions(jnp.array([[0, 1, 2, 0, 1]]), D_MODEL)
    assert jnp.array_equal(packed[0, :2], packed[0, 3:])


def learned(positions, max_length=5):
    module = LearnedPositions(max_length, D_MODEL)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return module, variables, variables["params"]["embedding"], jnp.array(positions)


def test_learned_positions_are_rows_of_a_float32_table():
    module, variables, table, positions = learned([[4, 0, 1], [2, 2, 3]])
    assert table.shape == (5, D_MODEL)
    assert table.dtype == jnp.float32
    assert jnp.array_equal(module.apply(variables, positions), table[positions])


def test_a_learned_position_past_the_table_is_an_error_with_a_remedy():
    module, variables, _, positions = learned([[0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(ValueError, match="7 positions, but model.max_length is 5: raise it"):
        module.apply(variables, positions)


def test_a_learned_position_past_the_table_is_nan_under_jit_and_the_others_are_right():
    module, variables, table, positions = learned([[3, 4, 5, 5000]])
    vectors = jax.jit(module.apply)(variables, positions)
    assert jnp.array_equal(vectors[0, :2], table[3:5])
    assert jnp.isnan(vectors[0, 2:]).all()


def test_a_sentence_as_long_as_the_table_fits():
    check_length(5, 5)
    with pytest.raises(ValueError, match="6 positions"):
        check_length(6, 5)
