"""Reads and writes the files in which Marian keeps a model, `.npz` and `.bin`: named tensors, and its options as YAML.

A `.bin` file begins with two numbers, the format's version and the number of items; then come four numbers for each
item (lengths of its name, type, number of dimensions, bytes of its data), all names, all shapes, padding, and the data
of all items. Numbers are little-endian; shapes have 4 bytes each, the others 8. (Source: `src/common/binary.cpp` of
marian-dev.) A `.npz` file is NumPy's, a zip archive.

Sizes in a file may be wrong, or meant to do harm: each is compared with what is there before memory is reserved.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from flax_transformer.interop.downloaded import damaged, read_file
from flax_transformer.interop.tensor_files import Tensors, not_floating

OPTIONS = "special:model.yml"  # the item that holds the model's options
FLOATS = {0x0404: "<f4", 0x0402: "<f2"}
QUANTIZED = {0x4101: "<i1", 0x4102: "<i2"}  # intgemm's, for any processor
BYTES = 0x0101
PACKED = {0x0802: "packed16", 0x1801: "packed8avx2", 0x2801: "packed8avx512"}
# The scale of a matrix's inputs, which int8 arithmetic needs and float32 arithmetic does not.
OF_ACTIVATIONS = "_QuantMultA"
MAX_DIMENSIONS = 8
# How much larger than the file the unpacked contents of an archive may be; parameters hardly shrink.
MAX_EXPANSION = 32
# What describes an array in a .npy file; NumPy itself would evaluate it as Python.
NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|]?(?:f[248]|[iu][1248]))', 'fortran_order': (True|False), "
    rb"'shape': \((|[0-9]{1,10}(?:, ?[0-9]{1,10}){0,7},?)\),? *\}\s*"
)
DAMAGES = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError, OverflowError)


def read_items(file: epath.Path) -> tuple[dict[str, np.ndarray], bytes]:
    """Reads one model file.

    Returns:
        The tensors by name, float32 whatever they are stored as, and the text of the model's options.

    Raises:
        ValueError: the file is missing, damaged or encrypted, has no options, or has a tensor of a type that only one
            kind of processor can read.
    """
    content = read_file(file)
    read = _read_npz if content[:2] == b"PK" else _read_bin
    try:
        tensors = dict(read(file, content))
    except Refused as error:
        raise ValueError(str(error)) from error
    except DAMAGES as error:
        raise damaged(file, error) from error
    if OPTIONS not in tensors:
        raise ValueError(f"{file} has no options ({OPTIONS}): take a model that Marian saved itself")
    options = tensors.pop(OPTIONS).tobytes().partition(b"\0")[0]
    return tensors, options


class Refused(Exception):
    """A file that is whole, but that cannot be converted."""


def _read_npz(file: epath.Path, content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_EXPANSION * len(content):
            raise ValueError("its parts are much larger than the file")
        seen = set()
        for member in members:
            name = _checked(member.filename.removesuffix(".npy"))
            if name in seen:
                raise ValueError(f"it has {name} twice")
            seen.add(name)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed in a way that NumPy does not write")
            with archive.open(member) as stream:
                # With a length, because without one a small part may unpack to more than its size says.
                array = _read_npy(name, stream.read(member.file_size + 1))
            if name == OPTIONS:
                if array.dtype.itemsize != 1:
                    raise ValueError(f"{OPTIONS} is no text")
            elif array.dtype.kind != "f":
                raise Refused(not_floating(file, name, array.dtype))
            else:
                array = array.astype(np.float32)
            yield name, array


def _checked(name: str) -> str:
    if not re.fullmatch(r"[\w:.-]{1,200}", name):
        raise ValueError(f"{name[:40]!r} is no name of a tensor")
    return name


def _read_npy(name: str, content: bytes) -> np.ndarray:
    begin = 10 if content[:7] == b"\x93NUMPY\x01" else 12
    length = int.from_bytes(content[8:begin], "little")
    header = NPY_HEADER.fullmatch(content[begin : begin + length])
    if not content.startswith(b"\x93NUMPY") or header is None:
        raise ValueError(f"{name} is no array of numbers")
    dtype, shape = np.dtype(header[1].decode()), tuple(int(size) for size in re.findall(rb"[0-9]+", header[3]))
    data = content[begin + length :]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} has {len(data)} bytes, which do not fit its shape {list(shape)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if header[2] == b"True" else "C")


def _read_bin(file: epath.Path, content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    version, count = struct.unpack_from("<2Q", content)
    if version == 2:
        raise Refused(f"{file} is encrypted (version 2 of the format): take the one that is not")
    if version != 1:
        raise ValueError(f"it begins with {version}, not with a version of Marian's format")
    if count > len(content) // 32:
        raise ValueError(f"it names {count} items, which do not fit into {len(content)} bytes")
    headers = [struct.unpack_from("<4Q", content, 16 + 32 * number) for number in range(count)]
    place = 16 + 32 * count
    names = []
    for length, *_ in headers:
        names.append(_checked(content[place : place + length].removesuffix(b"\0").decode()))
        place += length
    if len(set(names)) < count:
        raise ValueError("it has two items of the same name")
    shapes = []
    for _, _, dimensions, _ in headers:
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"an item has {dimensions} dimensions")
        shapes.append(struct.unpack_from(f"<{dimensions}i", content, place))
        place += 4 * dimensions
    (padding,) = struct.unpack_from("<Q", content, place)
    place += 8 + padding
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers, strict=True):
        if place + size > len(content):
            raise ValueError(f"it ends in the middle of {name}")
        data = content[place : place + size]
        place += size
        if not name.endswith(OF_ACTIVATIONS):
            yield name, _read_item(file, name, kind, shape, data)


def _read_item(file: epath.Path, name: str, kind: int, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    if name == OPTIONS and kind == BYTES:
        return np.frombuffer(data, np.int8)
    if kind not in FLOATS | QUANTIZED:
        known = PACKED.get(kind, hex(kind))
        raise Refused(
            f"{file.name}: the tensor {name} has type {known}, which cannot be converted (files for one kind of "
            "processor have such types): take the original .npz file, or a .bin file of type intgemm8"
        )
    dtype = np.dtype((FLOATS | QUANTIZED)[kind])
    count = math.prod(shape)
    if min(shape, default=1) < 0 or count * dtype.itemsize + (4 if kind in QUANTIZED else 0) > len(data):
        raise ValueError(f"{name} has {len(data)} bytes, which do not fit its shape {list(shape)}")
    values = np.frombuffer(data, dtype, count).astype(np.float32)
    if kind in FLOATS:
        return values.reshape(shape)
    (multiplier,) = struct.unpack_from("<f", data, count * dtype.itemsize)
    if not 1e-30 < multiplier < 1e30:
        raise ValueError(f"{name} is quantized with the multiplier {multiplier}")
    values /= np.float32(multiplier)
    # Marian multiplies with the transposed matrices, and keeps the shape as it was; embeddings it also looks up.
    return values.reshape(shape) if name.endswith("Wemb") else values.reshape(shape[::-1]).T


def write_npz(tensors: Tensors, options: str) -> bytes:
    """The bytes of a `.npz` file that Marian reads; `options` is YAML."""
    stream = io.BytesIO()
    # Not numpy.savez: Marian's reader does not know the zip64 headers that it writes.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        text = np.frombuffer(options.encode() + b"\0", np.int8)
        for name, array in [*tensors.items(), (OPTIONS, text)]:
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return stream.getvalue()
