"""Takes arrays that are slow to make and leaves them in a file, from which the next start reads them.

The file is `NAME-KEY.npz`, plain numpy. Its key is a hash of everything that decides the arrays, so a file is right or
is not looked at. The folder may lie in a bucket: files are read and written whole.
"""

import contextlib
import io
import re
import time
import uuid
import warnings
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

KEY_LENGTH = 16
ABANDONED_AFTER = 24 * 60 * 60  # seconds; no writing of a living process takes as long


def cached_arrays(
    folder: epath.Path, name: str, key: str, build: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `build` makes, read from the folder where they lie there already.

    Any number of processes may ask for them at once: each that finds none builds them, and no one sees half a file.
    A damaged file is built again. One that cannot be written is a warning and no more. A new file takes the place of
    those of the same name and another key.

    Args:
        folder: holds the files; made if it is not there.
        name: tells apart what the folder keeps side by side.
        key: hexadecimal, a hash of everything that decides the arrays.
        build: makes the arrays, none of them of objects.
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
    """The file's arrays, or None where there is no file or a damaged one."""
    try:
        # A checksum stands in the file for each array and is compared as it is read. Nothing in it can run as code.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return dict(file)
    except Exception:  # Bytes may be damaged in as many ways as numpy and zipfile have errors; the mend is the same.
        return None


def _write(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Writes the file, whole or not at all; says whether it could."""
    draft = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # zipfile goes back to write its headers, which a file in a bucket does not allow
        np.savez(content, allow_pickle=False, **arrays)
        draft.write_bytes(content.getvalue())
        draft.replace(path)
        return True
    except Exception as error:  # Buckets have errors of their own, which are no OSError.
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"{path} cannot be written ({reason}): this run goes on without it, and the next one makes the same again; "
            "free room there, or make the folder writable",
            stacklevel=3,
        )
        return False
    finally:
        with contextlib.suppress(Exception):
            draft.unlink(missing_ok=True)


def _clear(path: epath.Path, name: str) -> None:
    """Deletes the name's files with another key, and drafts so old that whoever wrote them must be gone."""
    file_name = re.compile(rf"{re.escape(name)}-[0-9a-f]{{{KEY_LENGTH}}}\.npz(?P<draft>\.[0-9a-f]{{32}}\.tmp)?")
    with contextlib.suppress(Exception):  # what stays takes room and does no harm
        for other in path.parent.iterdir():
            match = file_name.fullmatch(other.name)
            if match and other != path:
                abandoned = match["draft"] and other.stat().mtime < time.time() - ABANDONED_AFTER
                if abandoned or not match["draft"]:
                    other.unlink(missing_ok=True)
