"""Writes files and folders as a whole: a reader finds the old content or the new, never half of it.

The content goes to a draft beside its destination, and the draft then takes the destination's place. A draft that
could not be completed is removed; one whose process was killed stays and is ignored.
"""

import contextlib
import itertools
import uuid
from collections.abc import Iterator

from etils import epath


def write_file(path: epath.Path, content: bytes) -> None:
    """Writes a file, replacing the one that is there; makes its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(path)
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_folder(path: epath.Path) -> Iterator[epath.Path]:
    """Gives an empty folder to write to, which moves to `path` when the `with` block ends without an error.

    Args:
        path: where the folder will be; nothing, or an empty folder, may be there now.
    """
    draft = _draft_of(path)
    draft.mkdir(parents=True)
    try:
        yield draft
        if path.exists():
            path.rmdir()
        draft.rename(path)
    except BaseException:
        draft.rmtree(missing_ok=True)
        raise


def free_name(folder: epath.Path, name: str) -> epath.Path:
    """A path in a folder that nothing has yet: the name with a number, from 1 on."""
    return next(path for number in itertools.count(1) if not (path := folder / f"{name}-{number}").exists())


def _draft_of(path: epath.Path) -> epath.Path:
    """A path beside `path` that no other process uses."""
    # The name is shortened because file systems allow at most 255 bytes.
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}.tmp")
