"""Sets up eight CPU devices, a compilation cache, and checks of all types and shapes.

The settings are environment variables, so that the processes that tests start inherit them, and they are set before
jax is imported for the first time.
"""

import gc
import importlib
import os
import sys
from pathlib import Path

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
importlib.import_module("flax_transformer.checking").check_shapes()


# Tracing makes very many objects that live on, and to look through all of them for cycles again and again takes a sixth
# of the tests' time. It is done once after each file instead.
gc.disable()


# A worker takes a whole file at a time. Files of a minute and more come first, so that no worker is left with one at
# the end, while the other has nothing to do.
LONGEST = {
    "test_engine.py",
    "test_inputs.py",
    "test_loop.py",
    "test_notebook.py",
    "test_parallel.py",
    "test_search.py",
    "test_slots.py",
    "test_step_options.py",
    "test_translate.py",
    "test_translator.py",
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


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
