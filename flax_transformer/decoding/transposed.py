"""Stores the matrices of a model as a CPU reads them fastest when it multiplies them by a few vectors.

XLA on a CPU first rearranges a kernel [D, F], so that the D weights of each output lie side by side. For the few rows
of a step of a search that takes as long as the product itself, or longer. Here each kernel is stored that way, [F, D].

Glossary: D inner width, F outer width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.model import Transformer
from flax_transformer.projections import kernels_transposed


class TransposedParams(flax.struct.PyTreeNode):
    """Parameters of a model whose kernels are stored [F, D].

    Attributes:
        params: the parameters; all but the kernels as `Transformer` has them.
    """

    params: PyTree

    def original(self) -> PyTree:
        """The parameters as `Transformer` has them."""
        return _with_transposed_kernels(self.params)


def transpose_kernels(params: PyTree) -> TransposedParams:
    """Transposes the kernels; the arrays that it is given stay as they are."""
    return TransposedParams(_with_transposed_kernels(params))


@contextlib.contextmanager
def opened(
    config: TransformerConfig, params: PyTree | TransposedParams
) -> Iterator[tuple[Transformer, dict[str, Any]]]:
    """The model and its variables, to be applied inside the context while a program is traced.

    Args:
        config: the model's config.
        params: its parameters, stored in either way.
    """
    if isinstance(params, TransposedParams):
        with kernels_transposed():
            yield Transformer(config), {"params": params.original()}
    else:
        yield Transformer(config), {"params": params}


def _with_transposed_kernels(params: PyTree) -> PyTree:
    def change(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf.T if path[-1].key in ("kernel", "output_kernel") else leaf

    return jax.tree_util.tree_map_with_path(change, params)
