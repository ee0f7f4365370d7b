"""Makes paths in which Orbax finds its files even if they contain `[`, `*` or `?`.

Orbax collects the parts of a checkpoint with `path.glob(...)`, and etils treats the whole path as the pattern. These
characters would then match nothing, or another training's files, and the checkpoint could not be read.
"""

import glob
from collections.abc import Iterator

from etils import epath
from etils.epath.gpath import PosixGPath

from flax_transformer.files import is_remote


class LiteralPath(PosixGPath):
    """A local path whose own characters are not part of the pattern in `glob`."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """The files in this folder that match the pattern."""
        found: Iterator[LiteralPath] = PosixGPath.glob(type(self)(glob.escape(str(self))), pattern)
        return found


def literal(path: epath.Path, *, read_only: bool) -> epath.Path:
    """Returns the same path in a form for Orbax.

    Raises:
        ValueError: the path is remote, has such characters, and is not `read_only`; only writing uses a pattern, and
            what it wrote could not be read.
    """
    remote = is_remote(str(path))
    if remote and glob.has_magic(str(path)) and not read_only:
        raise ValueError(f"{path} contains [, * or ?, which Orbax treats as a pattern there: choose another path")
    return LiteralPath(path) if isinstance(path, PosixGPath) and not remote else path
