"""Takes the place of a new folder and leaves it whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator

from etils import epath

from flax_transformer.files import work_directory_of
from flax_transformer.workdir import WorkDirectory


def check_new_folder(path: epath.PathLike) -> epath.Path:
    """The absolute path of a folder that can be made; raises ValueError where it cannot be, or something is there."""
    workdir = WorkDirectory(path)
    place = workdir.path
    if os.path.islink(place):
        raise ValueError(f"{path} is a symbolic link, which a folder cannot take the place of: name another folder")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{path} exists and is not empty: name another folder, or remove that one")
    if owner := work_directory_of(str(place)):
        raise ValueError(f"{path} belongs to the work directory {owner}: name another folder")
    workdir.check_place()
    return place


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to write to, which takes its place when all is written, and is removed when something fails.

    Args:
        path: where; an empty folder may be there.

    Raises:
        ValueError: something is there, or it cannot be made.
    """
    place = check_new_folder(path)
    draft = place.with_name(f"{place.name[:40]}.{uuid.uuid4().hex}.tmp")  # a name has 255 bytes at most
    draft.mkdir(parents=True)
    try:
        yield draft
        if place.exists():
            place.rmdir()
        draft.rename(place)
    except BaseException:
        draft.rmtree(missing_ok=True)
        raise
