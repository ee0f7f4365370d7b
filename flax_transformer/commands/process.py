"""Prepares a process: standard streams that can be written to, errors and warnings in one line, and devices.

jax is imported in `load_jax` and not before, so that programs answer --help at once.
"""

import contextlib
import gc
import io
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

import absl.logging
from tqdm import tqdm

from flax_transformer.errors import is_out_of_memory


def prepare_streams() -> bool:
    """Makes standard input, output and error safe to use; must come before anything that opens files or prints.

    A closed stream becomes /dev/null: otherwise the next file to be opened would get its number, and what is printed
    would go into that file. Characters that the encoding of a stream lacks are escaped. Standard error never fails: an
    error that nobody can see must not become another one.

    Returns:
        Whether standard output was open.
    """
    is_open = sys.stdout is not None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # as Python says of a stream that was closed when it started
            # The system gives the lowest number that is free, which is this stream's.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))
    sys.stdout = _reopen(sys.stdout, _OutputFile)
    sys.stderr = _reopen(sys.stderr, _UnfailingFile)
    return is_open


def let_output_fail() -> None:
    """Drops output that cannot be written, for a program whose work matters more than what it prints."""
    sys.stdout = _reopen(sys.stdout, _UnfailingFile)


class OutputClosed(BrokenPipeError):
    """The reader of standard output has gone, as `head` does after its last line."""


class _OutputFile(io.FileIO):
    """Standard output, whose errors say that it is standard output."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError as error:
            raise OutputClosed(*error.args) from error  # not a failure: see `complete_output`
        except OSError as error:
            raise OSError(
                f"standard output cannot be written ({error.strerror or error}), so some of the output is lost: free "
                "some space, or send it to a file or pipe that can be written"
            ) from error


class _UnfailingFile(io.FileIO):
    """A file that drops what cannot be written to it: its disk is full, its terminal or its reader is gone."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def _reopen(stream: Any, kind: type[io.FileIO]) -> Any:
    """The stream as a file of that kind; one that is not a file, as in a notebook, stays what it is."""
    try:
        file = kind(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError):
        return stream
    stream.flush()
    unbuffered = getattr(stream, "write_through", False)
    return io.TextIOWrapper(
        file if unbuffered else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )


@contextlib.contextmanager
def complete_output(program: str) -> Iterator[None]:
    """Ends the process with status 1 and one line if not all of its standard output could be written.

    Where the reader of a pipe has gone, as `head` does, it ends without a word and with the status of SIGPIPE.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # at the end Python would only say that it ignored the error
    except OutputClosed:
        _discard_output()
        sys.exit(141)
    except OSError as error:
        _discard_output()
        sys.exit(f"{program}: {error}")


def _discard_output() -> None:
    """Sends what is still to be written to standard output nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_jax() -> None:
    """Imports jax; raises ValueError where it cannot be, e.g. because of one of its environment variables."""
    try:
        import jax  # noqa: F401
    except Exception as error:
        raise ValueError(_does_not_start(error)) from error


def start_devices() -> None:
    """Starts jax's devices and uses one, so that their failure is not blamed on a file that is read later.

    Raises:
        ValueError: it fails; says why and what to do.
    """
    load_jax()
    import jax

    try:
        jax.device_put(0.0, jax.local_devices()[0]).block_until_ready()
    except Exception as error:  # Whatever jax raises here, the user's input is not the cause.
        raise ValueError(_does_not_start(error)) from error


def _does_not_start(error: Exception) -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    named = f" with JAX_PLATFORMS={platforms}" if platforms else ""
    return (
        f"jax does not start{named} ({_reason(error)}): set JAX_PLATFORMS=cpu to use the CPU, or unset it to use what "
        "is available; a GPU needs the extra cuda, its driver, and memory that no other process uses (nvidia-smi), "
        "a TPU the extra tpu"
    )


def is_device_error(error: BaseException) -> bool:
    """Whether an error comes from a device or from too little memory, and not from what was read or computed."""
    jax = sys.modules.get("jax")
    kinds = (MemoryError,) if jax is None else (MemoryError, jax.errors.JaxRuntimeError)
    return isinstance(error, kinds) or is_out_of_memory(error)


def exit_for_device_error(program: str, error: BaseException, remedy: str) -> NoReturn:
    """Ends the process with one line about a device that failed, and with `remedy` where it has too little memory."""
    if isinstance(error, MemoryError):
        sys.exit(f"{program}: this machine has too little memory: end other programs, or {remedy}")
    if is_out_of_memory(error):
        sys.exit(f"{program}: the device has too little memory: {remedy}, or end other processes that use it")
    sys.exit(
        f"{program}: the device failed ({_reason(error)}): see whether another process uses it, or set "
        "JAX_PLATFORMS=cpu to do without it"
    )


def _reason(error: BaseException) -> str:
    return textwrap.shorten(f"{error}" or type(error).__name__, 300, placeholder=" ...")


def prepare_libraries() -> None:
    """Makes jax keep compiled programs between runs, and Orbax quiet; environment variables that are set stay.

    It also lets Python look for garbage less often: while a program starts, nearly all new objects are there to stay.
    """
    gc.set_threshold(100_000, 20, 20)
    # The specification wants a relative path to be ignored: https://specifications.freedesktop.org/basedir-spec
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "flax-transformer", "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    absl.logging.set_verbosity(absl.logging.ERROR)
    # When a save fails, Orbax logs a trace for each array in several ways: one error is enough.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook
    sys.unraisablehook = lambda raised: None if _of_storage(raised.exc_traceback) else show(raised)


def _of_storage(trace: TracebackType | None) -> bool:
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return any(part in file for file in files for part in ("orbax", "asyncio"))


@contextlib.contextmanager
def warnings_in_one_line(program: str) -> Iterator[None]:
    """Shows this library's warnings to the user, above a progress bar; those of others are for developers."""

    def show(message: Warning | str, *where: Any, **options: Any) -> None:
        tqdm.write(f"{program}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="flax_transformer|__main__")
        warnings.showwarning = show
        yield
