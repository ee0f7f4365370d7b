"""Trains a Transformer. Run the same command again, or give only --workdir, to continue
from the last checkpoint.

It writes a checkpoint and ends when it receives SIGTERM, Ctrl-C, SIGHUP (the terminal
is closed), or one of SIGUSR1, SIGUSR2 and SIGXCPU, which clusters send before they end
a job.
"""

import argparse
import contextlib
import faulthandler
import logging
import sys

from flax_transformer.commands.config import add_config_option, config_of, read_config
from flax_transformer.commands.options import count, filled, path, positive, true_or_false
from flax_transformer.commands.process import load_jax, start_devices
from flax_transformer.processes.interruption import Interrupted, Interruption
from flax_transformer.processes.memory import keep_freed_memory

USAGE = "[--config CONFIG] --workdir FOLDER [OPTIONS] [--config.SECTION.KEY=VALUE ...]"
EXAMPLES = """\
Every setting of the config can be changed with --config.SECTION.KEY=VALUE;
--list_settings lists and explains them all.

examples:
  flax-transformer train --config=quickstart --workdir=runs/quickstart
  flax-transformer train --config=quickstart --workdir=runs/short --config.training.steps=300
  flax-transformer train --workdir=runs/quickstart     goes on with the settings of that folder
  flax-transformer train --config=finetune:runs/opus --workdir=runs/finetuned
  python train.py --config=configs/quickstart.py --workdir=runs/quickstart

A training uses all devices of its host. On several hosts, run the same command on each:
with --distributed if the cluster gives the processes their addresses (Cloud TPU, Slurm),
otherwise with --coordinator, --num_processes and --process_id.
"""
MEMORY_REMEDY = (
    "set training.parallelism.rows_per_device, e.g. to 4, or lower it; or give a smaller data.rows in another --workdir"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `train`."""
    parser.set_defaults(mistake_status=1, needs_output=False)
    add_config_option(parser, otherwise="if it is not given, the training in --workdir goes on with its own settings")
    parser.add_argument(
        "--workdir",
        type=path,
        required=True,
        metavar="FOLDER",
        help="the folder for vocabulary, checkpoints and metrics; it is created if it does not exist",
    )
    _add_switch(parser, "accept_changed_corpus", "continue although a corpus file was edited since the last start")
    parser.add_argument(
        "--profile", default="", metavar="FIRST:LAST", help="the steps that jax's profiler records, e.g. 20:25"
    )
    hosts = parser.add_argument_group("several hosts")
    _add_switch(hosts, "distributed", "get the addresses of the other hosts from the cluster, and connect to them")
    hosts.add_argument(
        "--coordinator", type=filled, metavar="HOST:PORT", help="address of process 0, e.g. 10.0.0.1:8476"
    )
    hosts.add_argument("--num_processes", type=positive, metavar="N", help="number of processes, with --coordinator")
    hosts.add_argument(
        "--process_id",
        type=count,
        metavar="N",
        help="number of this process, counted from 0, with --coordinator",
    )
    hosts.add_argument(
        "--connect_timeout",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other processes (default 300)",
    )


def _add_switch(parser: argparse._ActionsContainer, name: str, text: str) -> None:
    """Declares an option that is on or off: --NAME, --NAME=true, --NAME=false or --noNAME."""
    parser.add_argument(
        f"--{name}", nargs="?", type=true_or_false, const=True, default=False, metavar="true|false", help=text
    )
    parser.add_argument(f"--no{name}", dest=name, action="store_false", default=False, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    """Trains; raises ValueError or OSError, with what to do, where a user can correct what is wrong."""
    keep_freed_memory()  # while there is no other thread yet, which would have a heap of its own
    # Before anything heavy is imported, so that a signal is noticed from the start.
    with Interruption(options.program) as interruption:
        with contextlib.suppress(OSError, ValueError):  # where standard error is not a file
            faulthandler.enable()  # a crash inside jax then shows where it was
        logging.getLogger().setLevel(logging.ERROR)  # without jax's notes on backends that are not there
        try:
            _train(options, interruption)
        except Interrupted as interrupted:
            print(f"{options.program}: {interrupted}", file=sys.stderr)
            sys.exit(interrupted.exit_status)


def _train(options: argparse.Namespace, interruption: Interruption) -> None:
    settings = read_config(options.config or config_of(options.workdir), options.changes)
    # jax and flax load here, so that --help answers at once.
    load_jax()
    from flax_transformer.experiment import Experiment
    from flax_transformer.processes.hosts import Cluster, Peers, cluster_of_environment, ending_together
    from flax_transformer.training.loop import train_and_evaluate

    named = (options.coordinator, options.num_processes, options.process_id)
    asked = options.distributed or any(value is not None for value in named)
    cluster = Cluster(*named) if asked else cluster_of_environment()
    interruption.expect_peers(cluster is not None)
    if cluster is not None:
        cluster.connect(options.connect_timeout)
        interruption.meet(Peers())
    with ending_together(options.program, unless=Interrupted):
        start_devices()
        train_and_evaluate(
            Experiment.from_mapping(settings),
            options.workdir,
            accept_changed_corpus=options.accept_changed_corpus,
            profile=options.profile,
            interruption=interruption,
        )
