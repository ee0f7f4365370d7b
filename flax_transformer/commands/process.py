"""Takes a process as it starts and leaves it fit for a user: warnings in one line, compiled programs kept for the next.

It loads no jax, so that whoever uses it still answers at once.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from absl import logging
from tqdm import tqdm


def prepare_libraries() -> None:
    """Lets jax keep what it compiles from run to run, and Orbax be quiet; what the user has set stays."""
    # The specification wants a relative path to be ignored: https://specifications.freedesktop.org/basedir-spec
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "flax-transformer", "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Of a save that fails Orbax logs hundreds of lines; what it means is told in one.
    logging.set_verbosity(logging.FATAL)


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
