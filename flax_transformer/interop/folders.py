"""Checks that a new folder can be made for an exported or imported model, and writes it as a whole or not at all."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from flax_transformer.atomic_files import write_folder
from flax_transformer.files import work_directory_of
from flax_transformer.workdir import WorkDirectory


def check_new_folder(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path of a folder that does not exist yet or is empty, and that can be made.

    Raises:
        ValueError: something else is at that path, or it cannot be made.
    """
    workdir = WorkDirectory(path)
    place = workdir.path
    if os.path.islink(place):
        raise ValueError(f"{path} is a symbolic link, which a folder cannot replace: give another folder")
    if os.path.ismount(place):
        raise ValueError(f"{path} is where a disk is mounted, which a folder cannot replace: give a folder inside it")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{path} exists and is not empty: give another folder, or remove that one")
    if owner := work_directory_of(str(place)):
        raise ValueError(f"{path} belongs to the work directory {owner}: name another folder")
    workdir.check_place()
    if place.exists() and not os.access(place.parent, os.W_OK):
        raise ValueError(f"{place.parent}, where {path} is to be made, cannot be written to: name another folder")
    return place


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a folder to write to, which moves to `path` when the `with` block ends without an error.

    Raises:
        ValueError: as `check_new_folder`.
    """
    with write_folder(check_new_folder(path)) as draft:
        yield draft
