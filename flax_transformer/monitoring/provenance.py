"""Collects what describes a run of training: command, versions, git revision, devices."""

import contextlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "flax_transformer",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "sentencepiece",
    "libtpu",
)


def provenance() -> dict[str, Any]:
    """Returns what one needs besides the config to repeat this run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        # JSON cannot represent arguments that are not valid text in this locale.
        "command": shlex.join(sys.argv).encode(errors="backslashreplace").decode(),
        "versions": versions,
        "revision": _git_revision(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _git_revision() -> str | None:
    """The commit of this code, with "-dirty" if files were changed; `None` if it was installed from a wheel."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        noted = folder / "build" / "revision"  # cloud/tpu_vm.sh writes it on machines that have no git repository
        return (noted.read_text().strip() or None) if noted.is_file() else None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
