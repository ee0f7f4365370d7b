"""Takes a folder, local or in an object store, and leaves in it what tensorboardX writes, with no harm to training.

tensorboardX writes on a thread of its own. Where that thread dies, of a full disk or an upload that failed, the next
measurement waits for it for ever; so the file that it is given here does not fail.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Inside, PyTorch is not loaded: tensorboardX wants it, two seconds at each start, for what is not used."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way of saying that there is none
    try:
        yield
    finally:
        del sys.modules["torch"]


with _without_torch():
    from tensorboardX import SummaryWriter, record_writer

SCHEME = "epath"


def open_events(folder: epath.Path) -> SummaryWriter:
    """A writer of TensorBoard's events, which lag behind, with a warning, while the folder cannot be written to."""
    record_writer.register_writer_factory(SCHEME, _EventFiles())
    return SummaryWriter(f"{SCHEME}:{folder}")


class _EventFiles:
    """What tensorboardX opens its files with; the names of its methods are those it asks for."""

    def directory_check(self, path: str) -> None:
        """Nothing: the folder is made with the file, where a failure is known what to do with."""

    def open(self, path: str) -> "_EventFile":
        return _EventFile(epath.Path(path.removeprefix(f"{SCHEME}:")))


class _EventFile:
    """A file that keeps all that it was given, some megabytes after days, until it could be written."""

    def __init__(self, path: epath.Path):
        self._path, self._content, self._failed = path, bytearray(), False

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        """Writes the whole file, since an object store cannot append; what fails now is tried again the next time."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(bytes(self._content))
        except Exception as error:  # Each store has its own kinds.
            self._warn(error)
        else:
            self._failed = False

    close = flush

    def _warn(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        # Where warnings are made errors, this one would end the thread.
        with contextlib.suppress(Warning):
            warnings.warn(
                f"{self._path.parent}: TensorBoard lags behind until it can be written, metrics.jsonl holds the same "
                f"numbers: {' '.join(str(error).split())}",
                stacklevel=1,
            )
