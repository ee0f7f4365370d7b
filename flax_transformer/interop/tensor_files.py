"""Takes a folder as it was downloaded and leaves its tensors, having run none of what a hostile file may hold."""

import json
import pickle

import numpy as np
from etils import epath

SAFETENSORS, SHARDS, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of `model.safetensors`, of its shards, or of `pytorch_model.bin`, as float32.

    Raises:
        ValueError: there is no such file, it cannot be read, it holds something else, or a library is missing.
    """
    if (folder / SAFETENSORS).exists():
        tensors = _read_safetensors(folder / SAFETENSORS)
    elif (folder / SHARDS).exists():
        tensors = {}
        for name in _shards(folder / SHARDS):
            tensors |= _read_safetensors(folder / name)
    elif (folder / TORCH).exists():
        tensors = _read_torch(folder / TORCH)
    else:
        raise ValueError(f"{folder} holds no weights, neither {SAFETENSORS} nor {TORCH}: download one of them")
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            raise ValueError(
                f"the tensor {name} holds {tensor.dtype}, not floating-point numbers: quantised weights "
                "cannot be converted, take the original ones"
            )
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def _read_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ValueError(f"{file.name} needs safetensors: pip install 'flax_transformer[interop]'") from error
    try:
        return safetensors.numpy.load(file.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error


def _shards(file: epath.Path) -> list[str]:
    """The names of the files that a list of shards names, none of them outside the folder."""
    try:
        names = sorted(set(json.loads(file.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{file} names {name!r}, which is no file beside it: do not trust this folder")
        if not (file.parent / name).exists():
            raise ValueError(f"{file.parent} lacks {name}, which {file.name} names: download it too")
    return names


def _read_torch(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{file.name} needs PyTorch, which is not installed: pip install torch, or download {SAFETENSORS}"
        ) from error
    try:
        # What is pickled besides tensors is refused, not run.
        with file.open("rb") as stream:
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).numpy() for name, tensor in loaded.items()
        }
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged, or holds more than tensors ({type(error).__name__}): download it again, and if that "
            "does not help, do not trust it"
        ) from error


def _damaged(file: epath.Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged ({str(error) or type(error).__name__}): download it again")
