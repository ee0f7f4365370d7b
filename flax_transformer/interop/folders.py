"""Takes the place of a new folder and leaves it whole or not at all."""

import contextlib
import uuid
from collections.abc import Iterator

from etils import epath

from flax_transformer.workdir import WorkDirectory


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to write to, which takes its place when all is written, and is removed when something fails.

    Args:
        path: where; an empty folder may be there.

    Raises:
        ValueError: something is there.
    """
    place = WorkDirectory(path).path  # absolute, as Orbax wants it
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{path} exists and is not empty: name another folder, or remove that one")
    draft = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
        if place.exists():
            place.rmdir()
        draft.rename(place)
    except BaseException:
        draft.rmtree(missing_ok=True)
        raise
