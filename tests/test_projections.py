"""Tests that the written-out gradients of a training step are mathematically correct, and that only it uses them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from flax_transformer.projections import (
    gradients_written_out,
    kernels_transposed,
    project,
    project_to_rows,
    written_out,
)

D, F = 7, 11
KERNEL = jnp.linspace(0.5, 1, D * F).reshape(D, F)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
@pytest.mark.parametrize("name", ["project", "written_out", "by_rows", "by_rows_written_out", "transposed"])
def test_product_and_gradients_equal_numpys(name, leading):
    function = globals()[name]
    rng = np.random.default_rng(0)
    inputs, kernel, weights = (rng.normal(size=shape) for shape in ((*leading, D), (D, F), (*leading, F)))
    outputs, gradients = jax.vjp(function, jnp.asarray(inputs, "float32"), jnp.asarray(kernel, "float32"))
    to_inputs, to_kernel = gradients(jnp.asarray(weights, "float32"))
    np.testing.assert_allclose(outputs, inputs @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_inputs, weights @ kernel.T, rtol=1e-4, atol=1e-5)
    by_row = inputs.reshape(-1, D).T @ weights.reshape(-1, F)
    np.testing.assert_allclose(to_kernel, by_row, rtol=1e-4, atol=1e-5)


def by_rows(inputs, kernel):
    return project_to_rows(inputs, kernel.T)


def by_rows_written_out(inputs, kernel):
    with gradients_written_out():
        return project_to_rows(inputs, kernel.T)


def transposed(inputs, kernel):
    with kernels_transposed():
        return project(inputs, kernel)


def test_second_derivatives_agree_with_finite_differences():
    rng = np.random.default_rng(1)
    inputs, kernel = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((2, 5, D), (D, F)))
    check_grads(
        lambda *arrays: written_out(*map(jnp.asarray, arrays)),
        (inputs, kernel),
        order=2,
        modes=["rev"],
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("function", [project, written_out])
def test_gradients_have_the_type_of_their_variables(function):
    inputs, kernel = jnp.ones((2, 5, D), "bfloat16"), jnp.ones((D, F), "bfloat16")
    gradients = jax.grad(lambda *arrays: function(*arrays).astype("float32").sum(), argnums=(0, 1))(inputs, kernel)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("function", [project, written_out])
def test_sums_have_the_requested_type_and_gradients_that_of_their_variables(function):
    inputs, kernel = jnp.full((1, 2, 512), 1 + 2**-7, "bfloat16"), jnp.ones((512, F), "bfloat16")
    products, gradients_of = jax.vjp(lambda *arrays: function(*arrays, jnp.float32), inputs, kernel)
    assert products.dtype == jnp.float32
    # Sums in bfloat16, one by one, would stop growing at 256.
    np.testing.assert_array_equal(products, np.full((1, 2, F), 516.0))
    assert [gradient.dtype for gradient in gradients_of(products)] == [jnp.bfloat16] * 2


def test_only_functions_traced_inside_the_context_use_written_out_gradients():
    def is_written_out():
        return "custom_vjp" in str(jax.make_jaxpr(project)(jnp.ones((2, D)), KERNEL))

    assert not is_written_out()
    with gradients_written_out():
        assert is_written_out()
    assert not is_written_out()


def test_a_function_traced_by_jit_inside_the_context_is_traced_again_outside():
    compiled, inputs = jax.jit(project), jnp.ones((2, 5, D))
    with gradients_written_out():
        inside = jax.grad(lambda kernel: compiled(inputs, kernel).sum())(KERNEL)
    outside, tangent = jax.jvp(lambda kernel: compiled(inputs, kernel).sum(), (KERNEL,), (KERNEL,))
    np.testing.assert_allclose(jnp.vdot(inside, KERNEL), tangent, rtol=1e-5)
    np.testing.assert_allclose(outside, tangent, rtol=1e-5)


@pytest.mark.parametrize("name", ["by_rows", "transposed"])
def test_a_matrix_that_is_stored_by_rows_is_read_as_it_is_in_a_loop_for_a_single_vector(name):
    def step(vector, rows):  # the product feeds the next one, as in a search
        return globals()[name](vector, rows.T)[..., :64] / 64

    def search(vector, rows, steps):
        return jax.lax.fori_loop(0, steps, lambda _, vector: step(vector, rows), vector)

    program = jax.jit(search).lower(jnp.ones((1, 1, 64)), jnp.ones((1000, 64)), 5).compile().as_text()
    assert "f32[1000,64]" in program and not re.search(r"f32\[64,1000\]\S* (copy|transpose|fusion)\(", program)
