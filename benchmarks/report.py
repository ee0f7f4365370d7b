"""Writes the results of a benchmark as JSON, with the machine and the versions that gave them."""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import flax_transformer

SEED = 0
THREADS = os.cpu_count() or 1
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Describes the machine, and how busy it is."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    device = jax.devices()[0]
    return {
        "system": platform.platform(),
        "processor": processor,
        "cores": THREADS,
        "device": f"{device.platform}: {device.device_kind}",
        "load_before": os.getloadavg()[0],
    }


def write(path: Path, program: str, packages: tuple[str, ...], measured: dict[str, Any]) -> None:
    """Writes a report.

    Args:
        path: the file to write.
        program: the module that was run, with this process's arguments.
        packages: the packages whose versions to record.
        measured: the other contents, including the result of `machine` from before.
    """
    report = {
        "command": ["python", "-m", program, *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "flax_transformer": flax_transformer.__version__}
        | {name: version(name) for name in packages},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | measured, indent=2) + "\n", "utf-8")
    print(f"written to {path}", file=sys.stderr)
