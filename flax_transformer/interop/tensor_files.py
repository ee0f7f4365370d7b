"""Reads the tensors of a downloaded model without running any code that a malicious file may contain."""

import json

import jax.numpy as jnp
import numpy as np
from etils import epath

from flax_transformer.interop.folders import file_inside

# The NumPy reader of safetensors does not support bfloat16.
TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
SAFETENSORS, SHARDS, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of `model.safetensors`, of its shards, or of `pytorch_model.bin`, as float32.

    Raises:
        ValueError: there is no such file, it cannot be read, it contains something else, or a library is missing.
    """
    if (folder / SAFETENSORS).exists():
        tensors = _read_safetensors(folder / SAFETENSORS)
    elif (folder / SHARDS).exists():
        tensors = {}
        for file in _shards(folder / SHARDS):
            tensors |= _read_safetensors(file)
    elif (folder / TORCH).exists():
        tensors = _read_torch(folder / TORCH)
    else:
        raise ValueError(f"{folder} has no weights, neither {SAFETENSORS} nor {TORCH}: download one of them")
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def _read_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
    except ImportError as error:
        raise ValueError(f"{file.name} needs safetensors: pip install 'flax_transformer[interop]'") from error
    try:
        stored = dict(safetensors.deserialize(file.read_bytes()))
    except (safetensors.SafetensorError, ValueError) as error:
        raise _damaged(file, error) from error
    for name, tensor in stored.items():
        if tensor["dtype"] not in TYPES:
            raise ValueError(
                f"{file.name}: the tensor {name} has type {tensor['dtype']}, but must have one of {', '.join(TYPES)}: "
                "quantised weights cannot be converted, take the original ones"
            )
    return {
        name: np.frombuffer(tensor["data"], TYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in stored.items()
    }


def _shards(file: epath.Path) -> list[epath.Path]:
    """The files in a list of shards; raises ValueError if one is outside the folder."""
    try:
        names = sorted(set(json.loads(file.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error
    return [file_inside(file.parent, name, file.name) for name in names]


def _read_torch(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{file.name} needs PyTorch, which is not installed: pip install torch, or download {SAFETENSORS}"
        ) from error
    try:
        # `weights_only` refuses everything pickled that is not a tensor, and does not run it.
        with file.open("rb") as stream:
            loaded = dict(torch.load(stream, map_location="cpu", weights_only=True))
        kinds = {name: tensor.is_floating_point() for name, tensor in loaded.items()}
    except Exception as error:  # For damaged files, or other objects than tensors, torch raises many kinds of errors.
        raise ValueError(
            f"{file} is damaged, or contains more than tensors ({type(error).__name__}): download it again, and if "
            "that does not help, do not trust it"
        ) from error
    if not all(kinds.values()):
        name = min(name for name, is_floating in kinds.items() if not is_floating)
        raise ValueError(
            f"{file.name}: the tensor {name} has type {loaded[name].dtype}, which is not floating point: quantised "
            "weights cannot be converted, take the original ones"
        )
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}


def _damaged(file: epath.Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged ({str(error) or type(error).__name__}): download it again")
