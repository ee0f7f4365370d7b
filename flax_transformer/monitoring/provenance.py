"""Takes the process that trains and leaves what it was: command, versions, revision, devices."""

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
    """What somebody needs who wants to train the same again, beside the config."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        # An argument that is not text in this locale has bytes that JSON cannot hold.
        "command": shlex.join(sys.argv).encode(errors="backslashreplace").decode(),
        "versions": versions,
        "revision": _git_revision(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _git_revision() -> str | None:
    """The commit that this code is of, with "-dirty" where it was changed; `None` where it was installed as a wheel."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        noted = folder / "build" / "revision"  # cloud/tpu_vm.sh brings it to machines where there is no git
        return (noted.read_text().strip() or None) if noted.is_file() else None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
