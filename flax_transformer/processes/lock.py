"""Takes a work directory and leaves one training in it: a second one is refused, or warned where there are no locks."""

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

LOCK_FILE, HEARTBEAT_FILE = "training.lock", "training.heartbeat"

# In seconds: how often a training shows that it lives, and the silence after which it counts as ended.
HEARTBEAT_INTERVAL, HEARTBEAT_LIFETIME = 60.0, 300.0

# What `flock` answers on a network share that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class TrainingLock:
    """Keeps a work directory for one training while it is entered.

    Locally it locks `training.lock`, and the system frees it when the process ends, however that comes. The file stays:
    removing it could take it from a process that has just locked it. On a remote path, and on a network share without
    locks, `training.heartbeat` is written again every minute instead, and whoever finds a young one is warned.
    """

    def __init__(self, path: epath.Path):
        """Names the folder; nothing is read or written yet."""
        self._path = path
        self._lock: int | None = None
        self._heart: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "TrainingLock":
        """Makes the folder and takes the lock; ValueError names the training that has it."""
        if "://" in str(self._path) or not self._take_lock():
            self._warn_of_another()
            self._write_heartbeat()
            self._ended.clear()
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)  # names nobody who no longer trains
            # Closing would not free it while a forked child has the file open too.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None
        if self._heart is not None:
            self._ended.set()
            self._heart.join(timeout=10)
            self._heart = None
            self._remove_heartbeat()

    def _take_lock(self) -> bool:
        """Whether the folder is locked now, which it cannot be on a file system without locks."""
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
        # The lock holds without the text, which does not fit on a full disk.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, _entry("since"))
        return True

    @property
    def _heartbeat_file(self) -> epath.Path:
        return self._path / HEARTBEAT_FILE

    def _last_heartbeat(self) -> tuple[str, float] | None:
        """Whose it is and how many seconds old; `None` where there is none, or something else."""
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
        # It warns others and no more: a bucket out of reach for a while, whose errors are of many kinds, ends nothing.
        with contextlib.suppress(Exception):
            self._heartbeat_file.write_bytes(_entry("time"))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_INTERVAL):
            self._write_heartbeat()

    def _remove_heartbeat(self) -> None:
        with contextlib.suppress(Exception):  # as above
            last = self._last_heartbeat()
            if last is not None and last[0] == _own_name():
                self._heartbeat_file.unlink(missing_ok=True)


def _entry(moment: str) -> bytes:
    """This process and the time, under the name `moment`, as a line of JSON."""
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
    except (KeyError, TypeError, ValueError):  # it is writing its name just now, or could not
        return "another process trains there"
