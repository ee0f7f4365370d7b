"""Makes a model's parameters from another library's named tensors, once it is known which tensor is which parameter.

Glossary: D d_model, V a vocabulary's size.
"""

from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.tensor_files import Tensors
from flax_transformer.trained_model import param_shapes


def check_depth(config: TransformerConfig, tensors: Tensors, place: str) -> None:
    """Raises ValueError if a config has more layers than there are tensors; then not even their names are computed."""
    layers = config.num_encoder_layers + config.num_decoder_layers
    if layers > len(tensors):
        raise ValueError(
            f"{place} has {layers} layers, but there are only {len(tensors)} tensors: download both files again"
        )


def check_embeddings(name: str, matrix: np.ndarray, size: int, place: str) -> None:
    """Raises ValueError if a matrix of embeddings is not one for a vocabulary of that size."""
    if matrix.ndim != 2 or matrix.shape[0] != size:
        raise ValueError(
            f"the embeddings {name} are {list(matrix.shape)}, but {place} has a vocabulary of {size}: "
            "download both files again"
        )


def build_params(config: TransformerConfig, found: Tensors, names: Mapping[str, str], place: str) -> PyTree:
    """Builds the parameters: float32 copies of the tensors, which may be mapped from files and of other types.

    Args:
        config: the model's config.
        found: the tensors by the paths of our parameters.
        names: the name that the other library has for each path.
        place: where the configuration stands, for errors.

    Raises:
        ValueError: a tensor is missing, or has another shape than the config asks for.
    """
    for path, leaf in flatten_dict(param_shapes(config), sep="/").items():
        if path not in found:
            raise ValueError(f"the tensor {names[path]} is missing: the file is not complete, download it again")
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"the tensor {names[path]} does not fit {place}: its shape is {list(found[path].shape)}, but must "
                f"be {list(leaf.shape)}: download both files again"
            )
    return unflatten_dict({path: np.array(leaf, np.float32, order="C") for path, leaf in found.items()}, sep="/")


def embeddings(config: TransformerConfig, params: PyTree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices of source, target and output, each [V, D]."""
    if config.tie_embeddings == "three_way":
        shared = np.asarray(params["shared_embedding"]["embedding"])
        return shared, shared, shared
    source, target = (np.asarray(params[f"{side}_embedding"]["embedding"]) for side in ("source", "target"))
    return source, target, np.asarray(params["output_kernel"]).T if config.tie_embeddings == "none" else target
