"""Lets a training on the CPU use the memory of one step again in the next."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

# The parameters of mallopt(3), from malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1
_PCI = Path("/sys/bus/pci/devices")
_VENDORS = {"0x1002", "0x10de", "0x1ae0"}  # AMD, NVIDIA and Google, who make the devices of jax's own packages


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, instead of giving it back to the system and asking for it again.

    On a CPU, XLA allocates the intermediate results of each step and frees them after it. The GNU C library gives
    blocks of that size back to the system at once, which has to clear memory anew for the next step. That took from a
    tenth to a quarter of the time of a step (benchmarks/README.md). With this the process is as large as its largest
    step until it ends. Call it while there is no second thread, so before numpy is imported, which starts some: a
    thread that has allocated already keeps a heap of its own, and blocks of this size do not fit into such a heap.

    It does nothing where jax will use a GPU or TPU, as far as that can be told beforehand, or where the system has
    another C library, as macOS and Alpine Linux have.
    """
    if platform.libc_ver()[0] == "glibc" and _jax_will_use_cpu():
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)  # one heap, so that any thread can use what another has freed
        mallopt(_MMAP_MAX, 0)  # large blocks come from that heap too
        mallopt(_TRIM_THRESHOLD, _LARGEST)  # and it does not shrink


def _jax_will_use_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    plugins = [plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")]
    if any(not re.search("cuda|rocm", name) for name in plugins):
        return False  # for devices of other vendors
    installed = plugins or importlib.util.find_spec("libtpu")
    return not (installed and _may_have_accelerator())


def _may_have_accelerator() -> bool:
    """Whether this machine may have a GPU or TPU; libtpu and the packages for GPUs can be installed without one."""
    if not _PCI.exists():
        return True
    vendors = {path.read_text().strip() for path in _PCI.glob("*/vendor")}
    return bool(vendors & _VENDORS) or Path("/dev/dxg").exists()  # the GPU of Windows under its Linux
