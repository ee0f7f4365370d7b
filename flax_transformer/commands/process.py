"""Takes a process as it starts and leaves it fit for a user: warnings in one line, compiled programs kept for the next.

It loads no jax, so that whoever uses it still answers at once.
"""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import absl.logging
from tqdm import tqdm


def prepare_libraries() -> None:
    """Lets jax keep what it compiles from run to run, and Orbax be quiet; what the user has set stays."""
    # The specification wants a relative path to be ignored: https://specifications.freedesktop.org/basedir-spec
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "flax-transformer", "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    absl.logging.set_verbosity(absl.logging.ERROR)
    # Of one save that fails Orbax tells the trace of each array, on every way there is: one error stands for them all.
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
