import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flax_transformer.processes import memory

# Allocates and frees 96 MB as XLA does, and prints how many of them the process still has.
MEGABYTES_KEPT = """
import ctypes, re, sys

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def megabytes_kept():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resident()
    block = libc.malloc(96 << 20)
    libc.memset(block, 1, 96 << 20)
    libc.free(block)
    return resident() - before
"""
TRAIN = """
from flax_transformer.__main__ import main
from flax_transformer.commands import train

def stop():
    print(megabytes_kept())
    sys.exit()

train.load_jax = stop
main(["train", "--config=quickstart", "--workdir=" + sys.argv[1]])
"""
KEEP = """
from flax_transformer.processes.memory import keep_freed_memory

keep_freed_memory()
print(megabytes_kept())
"""
needs_glibc = pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")


def megabytes_kept(program, *arguments, **environment):
    command = [sys.executable, "-c", MEGABYTES_KEPT + program, *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment).stdout
    return float(printed)


@needs_glibc
@pytest.mark.parametrize(("platforms", "keeps"), [("cpu", True), ("tpu,cpu", False)])
def test_freed_memory_is_kept_on_a_cpu(platforms, keeps):
    kept = megabytes_kept(KEEP, JAX_PLATFORMS=platforms)
    assert kept > 80 if keeps else kept < 20


@needs_glibc
def test_a_training_keeps_it(tmp_path):
    assert megabytes_kept(TRAIN, str(tmp_path / "run"), JAX_PLATFORMS="cpu") > 80


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("another C library was asked"))
    memory.keep_freed_memory()


@pytest.mark.parametrize(
    ("plugins", "has_libtpu", "vendor", "keeps"),
    [
        ([], False, "0x10de", True),
        (["cuda"], False, "0x10de", False),
        ([], True, "0x1ae0", False),
        (["xla_cuda12"], True, "0x8086", True),  # of Intel, so no device for them
        (["intel_extension"], False, "0x8086", False),
        ([], True, None, False),  # nobody knows
    ],
)
def test_a_gpu_or_tpu_is_expected_where_it_is_and_has_its_package(
    plugins, has_libtpu, vendor, keeps, monkeypatch, tmp_path
):
    changed = []
    monkeypatch.setattr(memory, "_PCI", tmp_path / "devices")
    if vendor:
        (tmp_path / "devices/0000:00:04.0").mkdir(parents=True)
        (tmp_path / "devices/0000:00:04.0/vendor").write_text(f"{vendor}\n")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(
        memory.importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name=name) for name in plugins]
    )
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: has_libtpu or None)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *set: changed.append(set)))
    memory.keep_freed_memory()
    assert bool(changed) == keeps
