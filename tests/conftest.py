"""Sets up eight CPU devices, a compilation cache, and checks of all types and shapes.

The settings are environment variables, so that the processes that tests start inherit them, and they are set before
jax is imported for the first time.
"""

import gc
import importlib
import os
import sys
from pathlib import Path

import jaxtyping
import pytest

from tests.xla_flags import QUICK_COMPILING

for flag in (*QUICK_COMPILING.split(), "--xla_force_host_platform_device_count=8"):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The processes that tests start need not compile the library's Python again each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Compiling is most of the tests' time; the second run, and a second worker, read what the first one compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Where in the source each operation comes from is left out of programs, which takes time to write down.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Half of XLA's optimising is more than tests gain from it; whoever measures a program sets this to 0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# While jaxtyping imports the library, Python ignores the compiled files of all that is imported with it; so this comes
# first, which makes the start twice as fast.
for name in ("jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "beartype"):
    importlib.import_module(name)

# From here on every call of the library is held against its signature, shapes included.
CHECKER = "importlib.import_module('tests.checker').check"  # jaxtyping wants text; jax is imported with the library
jaxtyping.install_import_hook("flax_transformer", CHECKER)


# Tracing makes very many objects that live on, and to look through all of them for cycles again and again takes a sixth
# of the tests' time. It is done once after each file instead.
gc.disable()


@pytest.fixture(scope="module", autouse=True)
def tidy_memory():
    """Lets go of what a file has left behind. Of compiled programs too, where they are many: each has memory mappings,
    and Linux gives a process 65,530 of them at most."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > 20_000:
        gc.unfreeze()
        sys.modules["jax"].clear_caches()
    gc.collect()
    gc.freeze()  # what is still there will be looked at no more
