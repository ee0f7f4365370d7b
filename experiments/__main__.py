"""Runs all experiments: `python -m experiments`. Trainings that are done are not made again, so it may be stopped.

With `--processes=2` it first makes the trainings, two at a time, each with its share of the cores: small models gain
little from several cores.
"""

import argparse
import concurrent.futures
import os
import queue
import subprocess
import sys
from pathlib import Path

from experiments.trainings import VARIANTS

SHARED = ("__init__", "__main__", "command", "train_one", "trainings")
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in SHARED)


def run(module: str, *arguments: str) -> None:
    """Runs a program of this folder; raises CalledProcessError if it fails."""
    print("==", module, *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", f"experiments.{module}", *arguments], check=True)


def divided_cores(processes: int) -> list[set[int]]:
    """The cores of each process; empty sets where the system cannot divide them, or there are too few."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[number::processes]) if len(cores) >= processes else set() for number in range(processes)]


def keep_to(cores: set[int]) -> None:
    """Keeps this thread to some cores; to no cores in particular if there are none."""
    if cores:
        os.sched_setaffinity(0, cores)


def main() -> None:
    """Reads the command line and runs everything."""
    parser = argparse.ArgumentParser(prog="python -m experiments")
    parser.add_argument("--workdirs", type=Path, default=Path("runs/experiments"), help="where the trainings are")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    options = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.workdirs.absolute() / "compiled"))
    folder = f"--workdirs={options.workdirs}"
    shares: queue.Queue[set[int]] = queue.Queue()
    for share in divided_cores(options.processes):
        shares.put(share)

    def train(name_and_seed: tuple[str, int]) -> None:
        name, seed = name_and_seed
        run("train_one", name, str(seed), folder)

    with concurrent.futures.ThreadPoolExecutor(
        options.processes,
        initializer=lambda: keep_to(shares.get()),  # this thread, and the programs that it starts
    ) as pool:
        list(pool.map(train, [(name, seed) for name, variant in VARIANTS.items() for seed in variant.seeds]))
    for name in NAMES:
        run(name, folder)


if __name__ == "__main__":
    main()
