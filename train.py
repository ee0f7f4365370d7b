"""Trains a Transformer: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`.

Any value of the config can be changed on the command line, e.g. `--config.training.steps=1000`. Run again, the same
command goes on where it stopped.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: a file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the vocabulary, checkpoints and metrics go; made if missing.")


def main(argv: list[str]) -> None:
    """Trains, and turns what a user can mend into one line instead of a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.ERROR)
    # jax and flax load here, so that --help answers at once.
    from flax_transformer.experiment import Experiment
    from flax_transformer.training.loop import train_and_evaluate

    try:
        experiment = Experiment.from_mapping(CONFIG.value.to_dict())
        train_and_evaluate(experiment, WORKDIR.value)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
