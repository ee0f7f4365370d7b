"""Trains a Transformer: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`.

Any value of the config can be changed on the command line, e.g. `--config.training.steps=1000`. Run again, the same
command goes on where it stopped; SIGTERM, Ctrl-C, a closed terminal (SIGHUP), and SIGUSR1, SIGUSR2 and SIGXCPU, which
clusters send before they end a job, write a checkpoint first. On several hosts the same command runs on
each, with `--distributed` where the cluster tells them apart (Cloud TPU, Slurm), else with three flags:
`--coordinator=HOST:PORT --num_processes=2 --process_id=0`.
"""

import functools
import re
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from flax_transformer.commands.options import explain_flag
from flax_transformer.commands.process import (
    exit_for_device_error,
    is_device_error,
    let_output_fail,
    load_jax,
    prepare_libraries,
    prepare_streams,
    start_devices,
    warnings_in_one_line,
)
from flax_transformer.processes.interruption import Interrupted, Interruption

MOST = 2**31 - 1  # what jax takes of processes and of seconds
CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: a file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the vocabulary, checkpoints and metrics go; made if missing.")
ACCEPT = flags.DEFINE_bool("accept_changed_corpus", False, "Goes on with a text that was edited since the last run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Joins the other hosts of a cluster that tells their addresses.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "Host and port of process 0, e.g. 10.0.0.1:8476.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes, with --coordinator.", 1, MOST)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "The number of this process, from 0, with --coordinator.", 0, MOST
)
PROFILE = flags.DEFINE_string("profile", "", "The first and the last step that jax's profiler watches, e.g. 20:25.")
CONNECT_TIMEOUT = flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for the other processes.", 1, MOST)


def main(argv: list[str], *, interruption: Interruption) -> None:
    """Trains; what a user can mend ends in one line and exit status 1."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    prepare_libraries()
    try:
        _train(interruption)
    except Interrupted as interrupted:
        print(f"train.py: {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {' '.join(str(error).split())}")
    except (RuntimeError, MemoryError) as error:
        if not is_device_error(error):
            raise
        exit_for_device_error("train.py", error, "lower training.rows_per_device, or data.rows")


def _train(interruption: Interruption) -> None:
    # jax and flax load here, so that --help answers at once.
    load_jax()
    from flax_transformer.experiment import Experiment
    from flax_transformer.processes.hosts import Cluster, Peers, cluster_of_environment, ending_together
    from flax_transformer.training.loop import train_and_evaluate

    named = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    asked = DISTRIBUTED.value or any(value is not None for value in named)
    cluster = Cluster(*named) if asked else cluster_of_environment()
    interruption.expect_peers(cluster is not None)
    if cluster is not None:
        cluster.connect(CONNECT_TIMEOUT.value)
        interruption.meet(Peers())
    with ending_together("train.py", unless=Interrupted), warnings_in_one_line("train.py"):
        start_devices()
        experiment = Experiment.from_mapping(CONFIG.value.to_dict())
        train_and_evaluate(
            experiment,
            WORKDIR.value,
            accept_changed_corpus=ACCEPT.value,
            profile=PROFILE.value,
            interruption=interruption,
        )


def parse_flags(argv: list[str]) -> Any:
    """Parses the flags; a config that is missing or has no such setting ends in one line and exit status 1."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # Of what a config file raises absl hands on the whole traceback, whose last line is the error.
        *_, last = (line for line in str(error).splitlines() if line.strip())
        reason = explain_flag(re.sub(r"^\s*\w+Error: ", "", last))
        sys.exit(f"train.py: {reason} (see train.py --help)")
    except (AttributeError, KeyError, ValueError, OSError) as error:
        # ml_collections hands on the KeyError of a mistyped name inside the AttributeError that it raises.
        cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
        sys.exit(f"train.py: --config: {' '.join(str(part) for part in cause.args).replace(chr(10), ': ')}")


if __name__ == "__main__":
    prepare_streams()
    let_output_fail()  # a log that cannot be written must not end a training
    flags.mark_flags_as_required(["config", "workdir"])
    for name in ("config", "workdir", "coordinator"):
        flags.register_validator(
            name,
            lambda value: value is None or not isinstance(value, str) or value.strip() != "",
            "the name is empty (a shell variable that is not set?): give one, or leave it out",
        )
    with Interruption("train.py") as interruption:
        app.run(functools.partial(main, interruption=interruption), flags_parser=parse_flags)
