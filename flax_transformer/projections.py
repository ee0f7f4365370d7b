"""The matrix product of every projection, with a choice of how it is differentiated and how its matrix is stored.

Glossary: D features of each input vector, F features of each output vector.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Gradients and the parameters of an exported program can be NumPy arrays.
Factor = jax.Array | np.ndarray
Axes = tuple[int, ...]

# Unlike a Python variable, it is part of the key under which `jax.jit` caches traced functions.
_written_out = jax.make_user_context(default_value=False)
_kernels_transposed = jax.make_user_context(default_value=False)


def gradients_written_out() -> AbstractContextManager[None]:
    """A context in which everything that is traced uses `written_out` for its projections.

    A training step differentiates once, in reverse mode, inside this context. Elsewhere projections are ordinary
    products of JAX, which can be transformed in every way.
    """
    return _written_out(True)


def kernels_transposed() -> AbstractContextManager[None]:
    """A context in which the kernel of each projection is the transpose, made while tracing, of a matrix stored [F, D].

    The products that are traced inside it read the stored matrices as they are.
    """
    return _kernels_transposed(True)


def project(
    inputs: Float[Array, "*B D"], kernel: Float[Array | np.ndarray, "D F"], dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """The product of `inputs` and `kernel`.

    Args:
        inputs: any number of vectors.
        kernel: the matrix of a dense layer.
        dtype: type of the result and of the sums in it; by default that of `inputs`.
    """
    if _written_out.value:
        return written_out(inputs, kernel, dtype)
    if _kernels_transposed.value:
        return project_to_rows(inputs, kernel.T, dtype)
    return _product(inputs, kernel, (inputs.ndim - 1,), (0,), dtype)


def project_to_rows(
    inputs: Float[Array, "*B D"], rows: Float[Array | np.ndarray, "F D"], dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """The product of `inputs` and each row of a matrix, such as an embedding; arguments as in `project`.

    It is `project(inputs, rows.T)`. In the loop of a search, XLA on a CPU would make the transpose anew for each token
    of a single sentence, which takes several times as long as the product.
    """
    if _written_out.value:
        return written_out(inputs, rows.T, dtype)
    return _product(inputs, rows, (inputs.ndim - 1,), (1,), dtype)


def dense(features: int, dtype: DTypeLike, *, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    """A dense layer of the model: its product is `dense_project`, and its kernel begins as in Glorot and Bengio (2010).

    Args:
        features: F.
        dtype: of the result.
        name: of the layer in a compact module.
        use_bias: whether it adds a vector.
    """
    return nn.Dense(
        features,
        dtype=dtype,
        name=name,
        use_bias=use_bias,
        kernel_init=nn.initializers.xavier_uniform(),
        dot_general=dense_project,
    )


def dense_project(inputs: jax.Array, kernel: Factor, dimensions: Any, precision: Any = None) -> jax.Array:
    """`project` with the signature that `nn.Dense` expects of a `dot_general`.

    Over a mesh the result is divided by rows. XLA might otherwise divide it as the kernel is divided, and gather whole
    activations where it could gather kernels.
    """
    assert dimensions == (((inputs.ndim - 1,), (0,)), ((), ())) and precision is None
    return nn.with_logical_constraint(project(inputs, kernel), ("batch",))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def written_out(
    inputs: Float[Array, "*B D"], kernel: Float[Array | np.ndarray, "D F"], dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """The same product, with its gradients written out in the form that a CPU computes fastest.

    JAX computes the transpose of the kernel's gradient and transposes it, which takes XLA on a CPU about twice as long
    as the product of two matrices, inputs^T gradient. With more than two dimensions XLA on a CPU first copies one of
    the factors; on a TPU it needs less memory if the dimensions stay as they are.

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
