"""Multiplies vectors by the kernel of a projection, and lets a training step choose how that is differentiated.

Glossary: D inner width, F outer width.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Gradients, and the parameters of an exported program, come as numpy's.
Factor = jax.Array | np.ndarray
Axes = tuple[int, ...]

# Unlike a variable of Python's, it is part of the key under which `jax.jit` keeps what it traced.
_written_out = jax.make_user_context(default_value=False)


def gradients_written_out() -> AbstractContextManager[None]:
    """While it is open, what is traced uses `written_out` for every projection.

    A training step differentiates once, in reverse, and opens it around that; elsewhere projections are jax's own
    products, which can be transformed in every way.
    """
    return _written_out(True)


def project(
    inputs: Float[Array, "*B D"], kernel: Float[Array | np.ndarray, "D F"], dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """inputs kernel.

    Args:
        inputs: any number of vectors.
        kernel: as a dense layer has it.
        dtype: of the result and of the sums in it; that of `inputs` if not given.
    """
    if _written_out.value:
        return written_out(inputs, kernel, dtype)
    return _product(inputs, kernel, (inputs.ndim - 1,), (0,), dtype)


def dense_project(inputs: jax.Array, kernel: Factor, dimensions: Any, precision: Any = None) -> jax.Array:
    """`project` as `nn.Dense` wants its `dot_general`."""
    assert dimensions == (((inputs.ndim - 1,), (0,)), ((), ())) and precision is None
    return project(inputs, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def written_out(
    inputs: Float[Array, "*B D"], kernel: Float[Array | np.ndarray, "D F"], dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """The same product, with its gradients written out in the order that a CPU computes fastest.

    jax makes the kernel's gradient transposed, and transposes it: XLA for CPUs takes about twice as long for that. Made
    of two matrices, inputs^T gradient, it is read there as it lies; with more dimensions, one of them is written anew.
    XLA for TPUs takes less memory with the dimensions as they are.

    As with every `jax.custom_vjp`, forward mode is an error (`jax.jvp`, `jax.linearize`, `jax.hessian`), and so is a
    gradient inside `jax.shard_map` unless `check_vma=False`.
    """
    return _product(inputs, kernel, (inputs.ndim - 1,), (0,), dtype)


def _product(left: Factor, right: Factor, left_axes: Axes, right_axes: Axes, dtype: DTypeLike | None) -> jax.Array:
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=dtype)


def _forward(inputs: jax.Array, kernel: Factor, dtype: DTypeLike | None) -> tuple[jax.Array, tuple[jax.Array, Factor]]:
    return written_out(inputs, kernel, dtype), (inputs, kernel)


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


written_out.defvjp(_forward, _backward)
