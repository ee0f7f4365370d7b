"""Takes a path and leaves one in whose folder Orbax finds its files, whatever characters the path holds.

Orbax puts the parts of a checkpoint together by a glob. etils looks for it in the whole path, where `[`, `*` and `?`
then match nothing, or the files of another training, and the checkpoint that is left cannot be read.
"""

import glob
from collections.abc import Iterator

from etils import epath
from etils.epath.gpath import PosixGPath


class LiteralPath(PosixGPath):
    """A local path that `glob` takes as it is written."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """The files in this folder that match."""
        found: Iterator[LiteralPath] = PosixGPath.glob(type(self)(glob.escape(str(self))), pattern)
        return found


def literal(path: epath.Path, *, read_only: bool) -> epath.Path:
    """The same path, to be given to Orbax.

    Raises:
        ValueError: it is not local, and what is written to it could not be read; reading needs no pattern.
    """
    is_remote = "://" in str(path)
    if is_remote and glob.has_magic(str(path)) and not read_only:
        raise ValueError(f"{path} holds one of [, * and ?, which Orbax takes for a pattern there: choose another path")
    return LiteralPath(path) if isinstance(path, PosixGPath) and not is_remote else path
