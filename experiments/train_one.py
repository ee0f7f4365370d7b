"""Makes one of the trainings that experiments share: `python -m experiments.train_one base 0`.

It is a program of its own because it must ask the C library to keep freed memory before jax and NumPy are imported.
"""

import argparse
from pathlib import Path

from flax_transformer.processes.memory import keep_freed_memory


def main() -> None:
    """Reads the command line and trains, or returns at once if that training is done."""
    keep_freed_memory()
    from experiments.trainings import VARIANTS, trained

    parser = argparse.ArgumentParser(prog="python -m experiments.train_one")
    parser.add_argument("name", choices=VARIANTS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--workdirs", type=Path, default=Path("runs/experiments"))
    options = parser.parse_args()
    trained(VARIANTS[options.name], options.seed, options.workdirs)


if __name__ == "__main__":
    main()
