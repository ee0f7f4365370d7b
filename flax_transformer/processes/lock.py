"""Ensures that only one training at a time uses a work directory; where files cannot be locked, it only warns."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import warnings

from etils import epath

from flax_transformer.files import is_remote

LOCK_FILE, HEARTBEAT_FILE = "training.lock", "training.heartbeat"

# In seconds: how often a training writes its heartbeat, and the age at which a heartbeat no longer counts.
HEARTBEAT_INTERVAL, HEARTBEAT_LIFETIME = 60.0, 300.0

# The errors of `flock` on network shares that do not support locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class TrainingLock:
    """Reserves a work directory for one training inside a `with` block.

    On a local path it locks `training.lock`, which the system unlocks when the process ends for whatever reason. The
    file is not removed, because another process might just have locked it. On a remote path, and on a network share
    without locks, it rewrites `training.heartbeat` every minute instead, and a training that finds a recent heartbeat
    of another one warns.
    """

    def __init__(self, path: epath.Path):
        """Stores the folder's path; reads and writes nothing yet."""
        self._path = path
        self._lock: int | None = None
        self._heart: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "TrainingLock":
        """Creates the folder and locks it; raises a ValueError that names the training which holds the lock."""
        if is_remote(str(self._path)) or not self._take_lock():
            self._warn_of_another()
            self._write_heartbeat()
            self._ended.clear()
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)  # this process no longer trains here
            # Closing alone would not unlock the file while a forked child has it open too.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None
        if self._heart is not None:
            self._ended.set()
            self._heart.join(timeout=10)
            self._heart = None
            self._remove_heartbeat()

    def _take_lock(self) -> bool:
        """Locks the folder; returns whether the file system supports locks."""
        self._path.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0)
            os.close(file)
            if error.errno in NO_LOCKS:
                return False
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"{self._path}: {_describe(holder)}: wait until it ends or stop it, or give another --workdir"
            ) from error
        self._lock = file
        # The text only informs, and cannot be written to a full disk; the lock does not depend on it.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, _entry("since"))
        return True

    @property
    def _heartbeat_file(self) -> epath.Path:
        return self._path / HEARTBEAT_FILE

    def _last_heartbeat(self) -> tuple[str, float] | None:
        """The process that wrote the heartbeat, and its age in seconds; `None` if there is none that can be read."""
        try:
            entry = json.loads(self._heartbeat_file.read_bytes())
            age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(entry["time"])
            return _name(entry["host"], entry["process"]), age.total_seconds()
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return None

    def _warn_of_another(self) -> None:
        last = self._last_heartbeat()
        if last is None or last[0] == _own_name() or last[1] >= HEARTBEAT_LIFETIME:
            return
        warnings.warn(
            f"{self._path}: {last[0]} seems to train there, it was seen {max(0.0, last[1]):.0f} seconds ago: stop one "
            "of the two, or give another --workdir; if it was pre-empted and this takes its place, all is well",
            stacklevel=3,
        )

    def _write_heartbeat(self) -> None:
        # The heartbeat only serves to warn, so errors, of which buckets have many kinds, must not end the training.
        with contextlib.suppress(Exception):
            self._heartbeat_file.write_bytes(_entry("time"))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_INTERVAL):
            self._write_heartbeat()

    def _remove_heartbeat(self) -> None:
        with contextlib.suppress(Exception):  # as in _write_heartbeat
            last = self._last_heartbeat()
            if last is not None and last[0] == _own_name():
                self._heartbeat_file.unlink(missing_ok=True)


def _entry(moment: str) -> bytes:
    """A line of JSON with this process and the current time, which has the key `moment`."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), moment: now}).encode() + b"\n"


def _name(host: str, process: int) -> str:
    return f"process {process} on host {host}"


def _own_name() -> str:
    return _name(socket.gethostname(), os.getpid())


def _describe(holder: bytes) -> str:
    try:
        entry = json.loads(holder)
        return f"{_name(entry['host'], entry['process'])} has been training there since {entry['since']}"
    except (KeyError, TypeError, ValueError):  # it has not written its name yet, or could not
        return "another process trains there"
