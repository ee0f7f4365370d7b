"""Reads the tensors of a downloaded model without running any code that a malicious file may contain."""

import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import UInt8

from flax_transformer.files import is_remote
from flax_transformer.interop.downloaded import damaged, file_inside, read_json

# The types of weights, by the names that safetensors gives them.
TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Tensors = Mapping[str, np.ndarray]

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
SHARDS, TORCH_SHARDS = SAFETENSORS + ".index.json", TORCH + ".index.json"
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


def read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of `model.safetensors` or `pytorch_model.bin`, or of the shards of either.

    Returns:
        Arrays of the types in which they are stored. Those of a file on this machine are mapped from it: they take
        memory only while they are read, and must not be changed.

    Raises:
        ValueError: there is no such file, it cannot be read, it contains something else, or a library is missing.
    """
    for name, shards, read in ((SAFETENSORS, SHARDS, _read_safetensors), (TORCH, TORCH_SHARDS, _read_torch)):
        if (folder / name).exists():
            return read(folder / name)
        if (folder / shards).exists():
            return {name: tensor for file in _shards(folder / shards) for name, tensor in read(file).items()}
    raise ValueError(f"{folder} has no weights, neither {SAFETENSORS} nor {TORCH}: download one of them")


def not_floating(file: epath.Path, name: str, kind: object) -> str:
    """The error for a tensor of another type than those of weights."""
    return (
        f"{file.name}: the tensor {name} has type {kind}, but must be floating point: quantized weights cannot be "
        "converted, take the original ones"
    )


def _read_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    """Reads a file of the safetensors format: the length of the header in 8 bytes, the header in JSON, the data."""
    try:
        here = not is_remote(str(file))
        content = np.memmap(str(file), np.uint8, "r") if here else np.frombuffer(file.read_bytes(), np.uint8)
        length = int.from_bytes(content[:8].tobytes(), "little")
        if not 0 < length <= min(len(content) - 8, LONGEST_HEADER):
            raise ValueError(f"its header cannot have {length:,} bytes")
        header = dict(json.loads(content[8 : 8 + length].tobytes()))
        header.pop("__metadata__", None)
        data = content[8 + length :]
        stored = {name: _slice(data, **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(file, error) from error
    tensors = {}
    for name, (kind, shape, part) in stored.items():
        if kind not in TYPES:
            raise ValueError(not_floating(file, name, kind))
        if math.prod(shape) * np.dtype(TYPES[kind]).itemsize != len(part):
            raise damaged(file, f"{name} has {len(part):,} bytes for the shape {shape}")
        tensors[name] = part.view(TYPES[kind]).reshape(shape)
    return tensors


def _slice(
    data: UInt8[np.ndarray, "bytes"], dtype: Any, shape: Any, data_offsets: Any
) -> tuple[str, list[int], UInt8[np.ndarray, "part"]]:
    """The type, the shape and the bytes of a tensor, as a header describes it."""
    begin, end = data_offsets
    numbers = [*shape, begin, end]
    fits = all(type(number) is int and 0 <= number <= len(data) for number in numbers) and len(shape) <= 8
    if not fits or begin > end:
        raise ValueError(f"a tensor of shape {str(shape)[:60]} is said to be at {str(data_offsets)[:60]}")
    return str(dtype), list(shape), data[begin:end]


def _shards(file: epath.Path) -> list[epath.Path]:
    """The files in a list of shards; raises ValueError if one is outside the folder."""
    try:
        names = sorted(set(read_json(file)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(file, error) from error
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
        if not is_remote(str(file)) and zipfile.is_zipfile(str(file)):
            loaded = dict(torch.load(str(file), map_location="cpu", weights_only=True, mmap=True))
        else:
            with file.open("rb") as stream:
                loaded = dict(torch.load(stream, map_location="cpu", weights_only=True))
        others = sorted(name for name, tensor in loaded.items() if not tensor.is_floating_point())
    except Exception as error:  # For damaged files, or other objects than tensors, torch raises many kinds of errors.
        raise ValueError(
            f"{file} is damaged, or contains more than tensors ({type(error).__name__}): download it again, and if "
            "that does not help, do not trust it"
        ) from error
    if others:
        raise ValueError(not_floating(file, others[0], loaded[others[0]].dtype))

    def as_array(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:  # a type that torch does not give to NumPy
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return (tensor if tensor.dtype in (torch.float16, torch.float64) else tensor.float()).numpy()

    return {name: as_array(tensor) for name, tensor in loaded.items()}
