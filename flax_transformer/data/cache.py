"""Caches arrays that take long to compute in files, so that the next run only reads them.

A file is `NAME-KEY.npz`, in numpy's format. The key is a hash of everything that the arrays depend on, so a file with
the right key has the right arrays. The folder may be in a bucket: files are read and written as a whole.
"""

import contextlib
import io
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from flax_transformer.atomic_files import write_file

KEY_LENGTH = 16
ABANDONED_AFTER = 24 * 60 * 60  # seconds; no process takes that long to write a file


def cached_arrays(
    folder: epath.Path, name: str, key: str, build: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays that `build` computes, from the cache if they are there.

    Several processes may ask for the same arrays at once: each process that finds no file builds them. A damaged file
    is built again. If a file cannot be written, a warning says so. A new file replaces those of the same name with
    another key.

    Args:
        folder: where the files are; created if necessary.
        name: distinguishes the arrays that one folder caches.
        key: a hash, in hexadecimal, of everything that the arrays depend on.
        build: computes the arrays, none of which may have dtype object.
    """
    assert re.fullmatch(rf"[0-9a-f]{{{KEY_LENGTH},}}", key), f"key is {key!r}: give a hexadecimal hash"
    path = folder / f"{name}-{key[:KEY_LENGTH]}.npz"
    found = _read(path)
    if found is not None:
        return found
    arrays = dict(build())
    if _write(path, arrays):
        _clear(path, name)
    return arrays


def _read(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The file's arrays, or `None` if it is missing or damaged."""
    try:
        # zipfile compares each array with its checksum; without pickles, nothing in the file can run as code.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return dict(file)
    except Exception:  # numpy and zipfile raise many kinds of errors; the remedy is always to build again.
        return None


def _write(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Writes the file and returns whether that was possible; warns if not."""
    try:
        content = io.BytesIO()  # zipfile seeks back to write its headers, which a file in a bucket does not allow
        named: dict[str, Any] = dict(arrays)
        np.savez(content, **named)
        write_file(path, content.getvalue())
        return True
    except Exception as error:  # Errors of buckets are not OSErrors.
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"{path} cannot be written ({reason}): this run continues without it, and the next one computes it again; "
            "free some space there, or make the folder writable",
            stacklevel=3,
        )
        return False


def _clear(path: epath.Path, name: str) -> None:
    """Deletes files of the same name with another key, and drafts of processes that must have ended long ago."""
    file_name = re.compile(rf"{re.escape(name)}-[0-9a-f]{{{KEY_LENGTH}}}\.npz(?P<draft>\.[0-9a-f]{{32}}\.tmp)?")
    with contextlib.suppress(Exception):  # a file that stays takes space and does no harm
        for other in path.parent.iterdir():
            match = file_name.fullmatch(other.name)
            if match and other != path:
                abandoned = match["draft"] and other.stat().mtime < time.time() - ABANDONED_AFTER
                if abandoned or not match["draft"]:
                    other.unlink(missing_ok=True)
