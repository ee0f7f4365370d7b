"""Takes vectors and a matrix and leaves their products, with gradients in the order that a CPU computes fastest.

Glossary: D inner width, F outer width.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Gradients, and the parameters of an exported program, come as numpy's.
Factor = jax.Array | np.ndarray
Axes = tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    inputs: Float[Array, "*B D"], kernel: Float[Array | np.ndarray, "D F"], dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """inputs kernel, with the gradients that differentiating it gives.

    jax makes the kernel's gradient transposed, and transposes it: XLA for CPUs takes about twice as long for that. Made
    of two matrices, inputs^T gradient, it is read there as it lies; with more dimensions, one of them is written anew.
    XLA for TPUs takes less memory with the dimensions as they are.

    As with every `jax.custom_vjp`, `jax.jvp`, `jax.jacfwd` and `jax.hessian` of it are errors; `jax.jacrev` of a
    gradient is not.

    Args:
        inputs: any number of vectors.
        kernel: as a dense layer has it.
        dtype: of the result and of the sums in it; that of `inputs` if not given.
    """
    return _product(inputs, kernel, (inputs.ndim - 1,), (0,), dtype)


def _product(left: Factor, right: Factor, left_axes: Axes, right_axes: Axes, dtype: DTypeLike | None) -> jax.Array:
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=dtype)


def _forward(inputs: jax.Array, kernel: Factor, dtype: DTypeLike | None) -> tuple[jax.Array, tuple[jax.Array, Factor]]:
    return product(inputs, kernel, dtype), (inputs, kernel)


def _backward(
    dtype: DTypeLike | None, residuals: tuple[jax.Array, Factor], gradient: Factor
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = residuals

    def of_rows(inputs: Factor, gradient: Factor) -> jax.Array:
        rows = tuple(range(inputs.ndim - 1))
        return _product(inputs, gradient, rows, rows, dtype)

    def of_matrices(inputs: Factor, gradient: Factor) -> jax.Array:
        return of_rows(inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))

    to_inputs = _product(gradient, kernel, (gradient.ndim - 1,), (1,), dtype)
    to_kernel = jax.lax.platform_dependent(inputs, gradient, cpu=of_matrices, default=of_rows)
    return to_inputs.astype(inputs.dtype), to_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def dense_product(inputs: jax.Array, kernel: Factor, dimensions: Any, precision: Any = None) -> jax.Array:
    """`product` as `nn.Dense` wants its `dot_general`."""
    assert dimensions == (((inputs.ndim - 1,), (0,)), ((), ())) and precision is None
    return product(inputs, kernel)
