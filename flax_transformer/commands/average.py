"""Averages the weights of several checkpoints of one training, as the paper did with
the last 5 checkpoints of its base models (section 6.1). The result replaces an
earlier average; the checkpoints are kept.
"""

import argparse
import shlex

from flax_transformer.commands.options import explain_damage, path, positive
from flax_transformer.commands.process import start_devices

EXAMPLES = """\
examples:
  flax-transformer average --workdir=runs/mine --last=5
  flax-transformer translate --workdir=runs/mine --checkpoint=averaged --input=letters.en
"""
MEMORY_REMEDY = "average on a machine that has more"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `average`."""
    parser.add_argument(
        "--workdir",
        type=path,
        required=True,
        metavar="FOLDER",
        help="the work directory of the training, in which the average is written",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--last", type=positive, metavar="N", help="average the N newest checkpoints; give this or --best"
    )
    which.add_argument(
        "--best", type=positive, metavar="N", help="average the N best checkpoints by training.evaluation.best_metric"
    )


def run(options: argparse.Namespace) -> None:
    """Averages and says how to use it; raises ValueError or OSError that says what to do."""
    # jax loads here, so that --help answers at once.
    start_devices()
    from flax_transformer.workdir import WorkDirectory

    with explain_damage(options.workdir):
        steps = WorkDirectory(options.workdir).average_checkpoints(last=options.last, best=options.best)
    print(
        f"averaged {len(steps)} of the checkpoints, step {', '.join(map(str, steps))}; to translate with the average:"
    )
    print(f"  flax-transformer translate --workdir={shlex.quote(options.workdir)} --checkpoint=averaged")
