"""Collects what describes a run of training: command, versions, git revision, devices."""

import contextlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

# These make the texts of a corpus that is not in files: the built-in one, and those of TensorFlow Datasets.
OF_TEXTS = ("babel", "tensorflow-datasets")
PACKAGES = (
    "flax_transformer",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "sentencepiece",
    "regex",
    "grain",
    *OF_TEXTS,
    "sacrebleu",
    "libtpu",
)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide data, computation and scores."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def other_versions(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The packages among `names` that are not as when training last started, in words; empty if there are none.

    Args:
        lines: those of `metrics.jsonl`.
        names: the packages.
    """
    before: Mapping[str, str] = next((line["versions"] for line in reversed(lines) if line.get("kind") == "start"), {})
    now = versions()
    changed = [name for name in names if before.get(name, now.get(name)) != now.get(name)]
    return " and ".join(f"{name} was {before[name]} then and is {now.get(name, 'missing')} now" for name in changed)


def provenance() -> dict[str, Any]:
    """Returns what one needs besides the config to repeat this run."""
    return {
        # JSON cannot represent arguments that are not valid text in this locale.
        "command": shlex.join(sys.argv).encode(errors="backslashreplace").decode(),
        "versions": versions(),
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
