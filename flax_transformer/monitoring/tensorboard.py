"""Writes TensorBoard's event files, locally or in an object store, so that a failed write does not stop training.

tensorboardX writes in a thread of its own. If that thread died, of a full disk or a failed upload, the next measurement
would wait for it forever. So the file objects that this module gives to tensorboardX do not raise errors.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing PyTorch, which takes two seconds and is not needed."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise an ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]


with _without_torch():
    from tensorboardX import SummaryWriter, record_writer

SCHEME = "epath"


def open_events(folder: epath.Path, *, first_step: int | None = None) -> SummaryWriter:
    """Opens a writer of TensorBoard's events; while the folder cannot be written, it warns and keeps the events.

    Args:
        folder: where the files go.
        first_step: the step from which a training goes on, 0 for a new one; TensorBoard forgets the later steps of
            earlier files. `None` forgets nothing.
    """
    record_writer.register_writer_factory(SCHEME, _EventFiles())
    return SummaryWriter(f"{SCHEME}:{folder}", purge_step=None if first_step is None else first_step + 1)


class _EventFiles:
    """The factory with which tensorboardX opens files; it prescribes the names of the methods."""

    def directory_check(self, path: str) -> None:
        """Does nothing: the folder is created together with the file, where errors are handled."""

    def open(self, path: str) -> "_EventFile":
        return _EventFile(epath.Path(path.removeprefix(f"{SCHEME}:")))


class _EventFile:
    """A file that keeps its whole content in memory, some megabytes after days, until it can be written."""

    def __init__(self, path: epath.Path):
        self._path, self._content, self._failed = path, bytearray(), False

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        """Writes the whole file, because object stores cannot append; a write that fails is repeated the next time."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(bytes(self._content))
        except Exception as error:  # Each object store has its own kinds of errors.
            self._warn(error)
        else:
            self._failed = False

    close = flush

    def _warn(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        # If warnings are turned into errors, this one would end the thread.
        with contextlib.suppress(Warning):
            warnings.warn(
                f"{self._path.parent}: TensorBoard lags behind until this folder can be written; metrics.jsonl has the "
                f"same numbers: {' '.join(str(error).split())}",
                stacklevel=1,
            )
