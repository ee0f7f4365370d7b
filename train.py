"""Trains a Transformer: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`.

Any value of the config can be changed on the command line, e.g. `--config.training.steps=1000`. Run again, the same
command goes on where it stopped; SIGTERM and Ctrl-C write a checkpoint first.
"""

import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: a file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the vocabulary, checkpoints and metrics go; made if missing.")


def main(argv: list[str]) -> None:
    """Trains; what a user can mend ends in one line and exit status 1."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.ERROR)
    # jax and flax load here, so that --help answers at once.
    from flax_transformer.experiment import Experiment
    from flax_transformer.training.interruption import Interrupted
    from flax_transformer.training.loop import train_and_evaluate

    try:
        train_and_evaluate(Experiment.from_mapping(CONFIG.value.to_dict()), WORKDIR.value)
    except Interrupted as interrupted:
        print(f"train.py: {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {' '.join(str(error).split())}")


def parse_flags(argv: list[str]) -> Any:
    """Parses the flags; a config that is missing or has no such setting ends in one line and exit status 1."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, ValueError, OSError) as error:
        # ml_collections hands on the KeyError of a mistyped name inside the AttributeError that it raises.
        cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
        sys.exit(f"train.py: --config: {' '.join(str(part) for part in cause.args).replace(chr(10), ': ')}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
