"""Makes `epath.Path("gs://...")` read and write a local folder that behaves like an object store.

It replaces the file system that etils gets from fsspec, so that the code of etils for remote paths runs. As in a
bucket, there are names and no folders, an object appears as a whole when its file is closed, and nothing can be
appended to it.
"""

import contextlib
import io
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import fsspec
from etils.epath import backend, gpath


@contextlib.contextmanager
def fake_bucket(folder: Path) -> Iterator[None]:
    """While entered, `gs://BUCKET/NAME` is the file `objects/BUCKET%2FNAME` in `folder`."""
    store = _Store(folder)
    with (
        mock.patch.object(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: store),
        mock.patch.object(gpath, "_is_tf_installed", lambda: False),  # etils would prefer it
    ):
        yield


class _Store(fsspec.AbstractFileSystem):
    """The few operations from which fsspec builds the others; its `mkdir` does nothing, as a bucket's."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, root: Path):
        super().__init__()
        self.objects, self.drafts = root / "objects", root / "drafts"
        for folder in (self.objects, self.drafts):
            folder.mkdir(parents=True, exist_ok=True)

    def _file(self, path):
        return self.objects / urllib.parse.quote(self._strip_protocol(path), safe="")

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            return io.BytesIO(self._file(path).read_bytes())
        if mode == "wb":
            return _Upload(self.drafts / uuid.uuid4().hex, self._file(path))
        raise NotImplementedError(f"{path} cannot be opened with mode {mode!r} in an object store")

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path)
        entries = {}
        for file in self.objects.iterdir():
            name = urllib.parse.unquote(file.name)
            if name == path:
                entries[name] = {"name": name, "size": file.stat().st_size, "type": "file"}
            elif not path or name.startswith(f"{path}/"):
                inside, slash, _ = name[len(path) :].lstrip("/").partition("/")
                child = f"{path}/{inside}".lstrip("/")
                size, kind = (0, "directory") if slash else (file.stat().st_size, "file")
                entries[child] = {"name": child, "size": size, "type": kind}
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def cp_file(self, path1, path2, **options):
        with self.open(path2, "wb") as file:
            file.write(self._file(path1).read_bytes())

    def _rm(self, path):
        self._file(path).unlink()


class _Upload(io.BytesIO):
    def __init__(self, draft: Path, target: Path):
        super().__init__()
        self._draft, self._target = draft, target

    def close(self):
        if not self.closed:
            self._draft.write_bytes(self.getvalue())
            self._draft.replace(self._target)
        super().close()
