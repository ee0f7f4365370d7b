"""Writes files and folders as a whole: a reader finds the old content or the new, never half of it.

The content goes to a draft beside its destination, and the draft then takes the destination's place. A draft that
could not be completed is removed; one whose process was killed stays and is ignored. In a bucket this is so of files
alone: a folder there appears file by file, and its config.json last.
"""

import contextlib
import itertools
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from flax_transformer.files import is_remote


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

    In a bucket folders cannot be moved: there the folder is made in this machine's temporary folder and then copied,
    config.json last, since it marks a complete work directory.

    Args:
        path: where the folder will be; nothing, or an empty folder, may be there now.
    """
    if is_remote(str(path)):
        with tempfile.TemporaryDirectory() as local:
            yield epath.Path(local)
            _copy_folder(Path(local), path)
        return
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


def _copy_folder(folder: Path, to: epath.Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    copied: list[epath.Path] = []
    try:
        for path in sorted(files, key=lambda path: path.name == "config.json"):
            copied.append(to.joinpath(*path.relative_to(folder).parts))
            with path.open("rb") as file, copied[-1].open("wb") as made:  # etils cannot copy to another kind of place
                shutil.copyfileobj(file, made)
    except BaseException:
        for path in copied:
            with contextlib.suppress(Exception):  # the first error is the one to report
                path.unlink(missing_ok=True)
        raise


def move_aside(path: epath.Path, folder: epath.Path) -> None:
    """Moves a file or folder into another folder, with a number behind its name; makes that folder if necessary."""
    folder.mkdir(exist_ok=True)
    free = next(free for number in itertools.count(1) if not (free := folder / f"{path.name}-{number}").exists())
    if is_remote(str(path)):
        _move_objects(path, free)
    else:
        path.rename(free)


def _move_objects(path: epath.Path, to: epath.Path) -> None:
    """Moves what a bucket has under a name; etils and fsspec cannot rename folders there."""
    if path.is_dir():
        for inner in list(path.iterdir()):
            _move_objects(inner, to / inner.name)
        with contextlib.suppress(Exception):  # some buckets have folders, too
            path.rmdir()
    else:
        path.copy(to)
        path.unlink()


def _draft_of(path: epath.Path) -> epath.Path:
    """A path beside `path` that no other process uses."""
    # The name is shortened because file systems allow at most 255 bytes.
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}.tmp")
