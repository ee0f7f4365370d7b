"""Finds out, before a command writes anything, whether its output would overwrite an input or part of a work directory.

Files are compared by device and inode rather than by name, because hard links, symbolic links, bind mounts and
case-insensitive file systems give one file several names, and `-`, `/dev/stdin` and `/dev/fd/0` are one stream.
"""

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Means standard input as the name of an input, and standard output as the name of an output.
STANDARD = "-"
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")

# What training, averaging and converting write to a work directory, except `not_finite_N.tsv` and drafts of all these.
OWN_FILES = (
    *("config.json", "fingerprints.json", "scores.json", "metrics.jsonl", "training.lock", "training.heartbeat"),
    *("joint.model", "source.model", "target.model"),
    *("source.spm", "target.spm", "vocab.json", "target_vocab.json", "shortlist.bin"),
    *("sentencepiece.bpe.model", "languages.json"),
)
OWN_FOLDERS = ("checkpoints", "averaged", "cache", "damaged", "profile", "tensorboard")
_OWN = re.compile(
    rf"({'|'.join(map(re.escape, OWN_FILES))})(\.[0-9a-f]+)?(\.tmp)?|{'|'.join(OWN_FOLDERS)}|not_finite_\d+\.tsv",
    re.IGNORECASE,
)
_DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d+)|(stdin)|(stdout)|(stderr))|/proc/(?:self|thread-self)/fd/(\d+)")

# An option, and the file name that it was given.
Named = tuple[str, str]


def expand(path: str) -> str:
    """Replaces `~` by the home folder, which a shell does only at the beginning of a word."""
    return path if path == STANDARD else os.path.expanduser(path)


def shown(path: str) -> str:
    """The path for a message, in quotes if it has unprintable characters or spaces at its ends."""
    if path == STANDARD:
        return "standard input"
    return path if path == path.strip() and path.isprintable() and path else repr(path)


def is_remote(path: str) -> bool:
    """Whether a path is in an object store such as gs://, where a file has only one name and no permissions."""
    return "://" in path


def is_stream(path: str) -> bool:
    """Whether a file can be read only once: standard input, a pipe or a terminal."""
    if _descriptor(path) is not None:  # on macOS opening /dev/stdin twice goes on where the first reader stopped
        return True
    found = _status(path)
    return found is not None and (stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode))


def is_standard_output(path: str) -> bool:
    """Whether the name of an output means standard output: "-", or a name such as /dev/stdout."""
    return path == STANDARD or _descriptor(path) == 1  # as an input, "-" has descriptor 0


def same_file(path: str, other: str) -> bool:
    """Whether both paths name the same file or folder; if it does not exist, whether they resolve to the same path."""
    first, second = _status(path), _status(other)
    if first is not None and second is not None:
        return os.path.samestat(first, second)
    if is_remote(path) or is_remote(other):
        return path == other
    return first is second is None and os.path.realpath(expand(path)) == os.path.realpath(expand(other))


def check_inputs(inputs: Sequence[Named], *, instead: str = "") -> None:
    """Raises ValueError if two inputs are the same stream, from which each would read only a part.

    Args:
        inputs: all files that a command reads, with the options that name them.
        instead: an alternative that the message mentions.
    """
    for number, (option, path) in enumerate(inputs):
        for earlier, other in inputs[:number]:
            if _same_stream(path, other):
                names = f"{earlier} is {other} and {option} is {path}"
                raise ValueError(
                    f"{names}: standard input can be only one of them; put the other in a file{instead}"
                    if _descriptor(path) == 0
                    else f"{names}: this is one stream, which can be read only once; put one of them in a file{instead}"
                )


def check_output(option: str, path: str, inputs: Sequence[Named], workdirs: Sequence[str] = ()) -> None:
    """Raises ValueError unless a file can be written at `path` without overwriting anything that is read.

    Args:
        option: the option that names the output, for the message.
        path: the output; "-" is standard output, which a shell may have redirected to a file.
        inputs: all files that the command reads, with the options that name them.
        workdirs: the work directories that it reads.
    """
    if path == STANDARD:
        _check_standard_output(inputs, workdirs)
        return
    path = expand(path)
    if os.path.isdir(path):
        raise ValueError(f"{option} is {path}, a folder: name a file in it")
    if path.endswith(COMPRESSED):
        raise ValueError(f"{option} is {path}, but outputs are not compressed: name it without that end")
    folder = os.path.dirname(path) or "."
    # In a bucket, folders do not exist until there is a file in them.
    if not is_remote(path):
        if not os.path.isdir(folder):
            raise ValueError(f"{option} is {path}, but there is no folder {folder}: create it, or name another")
        if not os.access(path if os.path.lexists(path) else folder, os.W_OK) and not os.path.islink(path):
            raise ValueError(f"{option} is {path}, which you may not write to: name another file")
    for reader, name in inputs:
        if same_file(path, name) and not _is_terminal_or_null(path):
            raise ValueError(f"{option} is {path}, which {reader} reads: name another file")
    if workdir := work_directory_of(path, workdirs):
        raise ValueError(
            f"{option} is {path}, which belongs to the work directory {workdir} and would be overwritten: name another "
            "file"
        )


def work_directory_of(path: str, workdirs: Iterable[str] = ()) -> str | None:
    """The work directory to which a file belongs, whether or not the file exists yet; `None` if it belongs to none.

    Args:
        path: the file. A file that this library does not write is the user's own, even inside a work directory.
        workdirs: folders that count as work directories whatever is in them.
    """
    if is_remote(path):
        folders = [workdir for workdir in workdirs if path.startswith(f"{workdir.rstrip('/')}/")]
        return next((each for each in folders if _OWN.fullmatch(path[len(each.rstrip("/")) + 1 :].split("/")[0])), None)
    workdirs = [expand(workdir) for workdir in workdirs if not is_remote(workdir)]
    child = os.path.realpath(expand(path))
    while (folder := os.path.dirname(child)) != child:
        if _OWN.fullmatch(os.path.basename(child)):
            if _is_work_directory(folder) or any(same_file(folder, workdir) for workdir in workdirs):
                return folder
        child = folder
    # The file may have another name, through a hard link or a mount.
    found = _status(path)
    if found is not None and stat.S_ISREG(found.st_mode):
        for workdir in workdirs:
            others = map(_status, _own_files(workdir))
            if any(other is not None and os.path.samestat(found, other) for other in others):
                return workdir
    return None


def _own_files(workdir: str) -> Iterator[str]:
    """The files that belong to the work directory, if this folder is one."""
    for name in os.listdir(workdir) if os.path.isdir(workdir) else []:
        if _OWN.fullmatch(name):
            path = os.path.join(workdir, name)
            yield path
            for folder, _, names in os.walk(path):
                yield from (os.path.join(folder, each) for each in names)


def _check_standard_output(inputs: Sequence[Named], workdirs: Sequence[str]) -> None:
    found = _status_of_stream(sys.stdout)
    if found is None or not stat.S_ISREG(found.st_mode):
        return
    names = [(reader, name) for reader, name in inputs]
    names += [("--workdir", file) for each in workdirs for file in _own_files(expand(each))]
    for reader, name in names:
        other = _status(name)
        if other is not None and os.path.samestat(found, other):
            raise ValueError(
                f"standard output goes to the file that {reader} reads ({shown(name)}), and the shell has already "
                "emptied it if you redirected with >: restore the file, and send the output to another one"
            )


def _is_work_directory(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(os.path.join(folder, "checkpoints"))


def _is_terminal_or_null(path: str) -> bool:
    """Whether this is a terminal or /dev/null, which may be both input and output."""
    found = _status(path)
    return found is not None and stat.S_ISCHR(found.st_mode)


def _same_stream(path: str, other: str) -> bool:
    if _descriptor(path) is not None and _descriptor(path) == _descriptor(other):
        return True
    first, second = _status(path), _status(other)
    if first is None or second is None or not os.path.samestat(first, second):
        return False
    is_null = first.st_rdev == os.stat(os.devnull).st_rdev and stat.S_ISCHR(first.st_mode)
    return not (stat.S_ISREG(first.st_mode) or stat.S_ISDIR(first.st_mode) or is_null)


def _descriptor(path: str) -> int | None:
    """The file descriptor that a name such as /dev/stdin stands for; `None` for other names."""
    if path == STANDARD:
        return 0
    found = _DESCRIPTOR.fullmatch(os.path.normpath(expand(path)))
    if found is None:
        return None
    number = found[1] or found[5]
    return int(number) if number else 0 if found[2] else 1 if found[3] else 2


def _status(path: str) -> os.stat_result | None:
    """The result of `os.stat`; `None` if there is no such file."""
    if path == STANDARD:
        return _status_of_stream(sys.stdin)
    if is_remote(path):
        return None
    try:
        return os.stat(expand(path))
    except (OSError, ValueError):
        return None


def _status_of_stream(stream: Any) -> os.stat_result | None:
    try:
        return os.fstat(stream.fileno()) if stream is not None else None
    except (OSError, ValueError):  # the stream is closed, or has no file
        return None
