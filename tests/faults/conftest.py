"""Runs a small version of the quick start in other processes, which tests kill and whose files they then read."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_transformer.workdir import WorkDirectory
from tests.xla_flags import QUICK_COMPILING

ROOT = Path(__file__).parents[2]
SMALL = {
    "data.train": "locale_phrases:kn:en:train?pairs=600&parts=1",
    "data.valid": "",
    "data.test": "",
    "data.rows": 8,
    "data.source_slots": 32,
    "data.target_slots": 32,
    "vocabulary.size": 250,
    "vocabulary.byte_fallback": False,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
    "model.d_ff": 64,
    "training.steps": 30,
    "training.schedule.warmup_steps": 10,
    "training.log_every": 1,
    "training.checkpoints.every": 4,
    "training.checkpoints.keep_latest": 2,
}


class SmallTraining:
    """The quick start's command in one work directory, with a model and a corpus that take seconds.

    Attributes:
        workdir: the work directory.
        observed: a file with a line for each step and process, which names the sentences.
    """

    def __init__(self, folder: Path, changes: dict):
        self.workdir, self.observed = folder / "run", folder / "observed.jsonl"
        self._settings = SMALL | changes

    def start(
        self,
        *,
        devices: int = 1,
        processes: int = 1,
        flags: tuple[str, ...] = (),
        environment: dict | None = None,
        shell: str = "",
    ) -> list[subprocess.Popen]:
        """Starts the command, on so many processes with so many devices each, with redirections of `shell`."""
        settings = [f"--config.{name}={value}" for name, value in self._settings.items()]
        command = [sys.executable, ROOT / "tests" / "faults" / "observed_train.py", "--config=configs/quickstart.py"]
        command += [f"--workdir={self.workdir}", *settings, *flags]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", "--connect_timeout=60"]
        if shell:
            command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
        environment = (
            os.environ
            | (environment or {})
            | {
                "OBSERVED": str(self.observed),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{QUICK_COMPILING} --xla_force_host_platform_device_count={devices}",
            }
        )
        return [
            subprocess.Popen(
                command + ([f"--process_id={number}"] if processes > 1 else []),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]

    def run(self, **layout) -> list[subprocess.CompletedProcess]:
        """Runs the command to its end."""
        return self.wait(self.start(**layout))

    def wait(self, started: list[subprocess.Popen], seconds: float = 240) -> list[subprocess.CompletedProcess]:
        """The output and exit status of each process."""
        deadline = time.monotonic() + seconds
        ended = []
        try:
            for process in started:
                out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        finally:
            for process in started:
                process.kill()
        return ended

    def finish(self, **layout) -> list[subprocess.CompletedProcess]:
        """Runs the command to its end; it must succeed."""
        ended = self.run(**layout)
        assert [process.returncode for process in ended] == [0] * len(ended), "\n".join(
            process.stdout + process.stderr for process in ended
        )
        return ended

    def kill(self, started: list[subprocess.Popen]) -> None:
        """Kills processes as a power cut would."""
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()

    def steps(self) -> list[int]:
        """The complete checkpoints' steps."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []

    def wait_for_step(self, step: int, started: list[subprocess.Popen], seconds: float = 120) -> None:
        """Waits until a step has started."""
        deadline = time.monotonic() + seconds
        while step > max((line["step"] for line in self.lines()), default=0):
            assert time.monotonic() < deadline and all(process.poll() is None for process in started)
            time.sleep(0.02)

    def lines(self) -> list[dict]:
        """The observed lines, in order, without one that is still being written."""
        text = self.observed.read_text() if self.observed.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def sentences(self) -> dict[int, list[str]]:
        """The sentences of each step, those of all processes together; where a step was made again, the last time."""
        made: dict[int, dict[int, list[str]]] = {}
        processes: dict[int, int] = {}
        for line in self.lines():
            made.setdefault(line["step"], {})[line["process"]] = line["pairs"]
            processes[line["step"]] = line["processes"]
        return {
            step: [pair for process in range(processes[step]) for pair in parts[process]]
            for step, parts in sorted(made.items())
        }

    def losses(self) -> dict[int, float]:
        """The loss of each step; where a step was made again, the last one."""
        lines = WorkDirectory(self.workdir).read_metrics()
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    def state(self) -> dict:
        """All arrays of the newest checkpoint, by name."""
        leaves = {}
        # What several processes wrote names devices that this process does not have.
        anywhere = ocp.args.StandardRestore(fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        with ocp.CheckpointManager(self.workdir / "checkpoints") as manager:
            step = manager.latest_step()
            for name in ("params", "training"):
                restored = manager.restore(step, args=ocp.args.Composite(**{name: anywhere}))[name]
                for path, leaf in jax.tree.leaves_with_path(restored):
                    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                        leaf = jax.random.key_data(leaf)
                    leaves[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
        return leaves


def differences(first: dict, second: dict) -> list[str]:
    """The names of the arrays that are not the same to the bit."""
    names = first.keys() | second.keys()
    return sorted(
        name
        for name in names
        if name not in first or name not in second or first[name].tobytes() != second[name].tobytes()
    )


@pytest.fixture
def small_training(tmp_path):
    """Makes small trainings, each in its own folder."""

    def make(name: str = "training", **changes) -> SmallTraining:
        folder = tmp_path / name
        folder.mkdir()
        return SmallTraining(folder, {key.replace("__", "."): value for key, value in changes.items()})

    return make


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves this folder out of a run of all tests: it is run where it, a file of it or its marker is named."""
    named = any("faults" in argument for argument in [*config.args, config.option.markexpr])
    return None if named else True


def said(process: subprocess.CompletedProcess) -> list[str]:
    """The lines of a process's stderr, without the progress bar and the notes of jax's C++ code and of gloo."""
    lines = [line.strip() for line in process.stderr.replace("\r", "\n").splitlines()]
    return [
        line
        for line in lines
        if line and "%|" not in line and not re.match(r"[IWE]\d{4} |WARNING: All log|\[external/gloo/", line)
    ]


@pytest.fixture(scope="session", autouse=True)
def hearing_sighup():
    """Trainings hear SIGHUP even if the tests were started by nohup, whose ignoring they would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# Long enough for something to happen between two checkpoints, and yet over in seconds.
LONG = {"training__steps": 96, "training__checkpoints__every": 24}


def _unbroken(folder: Path, **layout) -> SmallTraining:
    training = SmallTraining(folder, {key.replace("__", "."): value for key, value in LONG.items()})
    training.finish(**layout)
    return training


@pytest.fixture(scope="session")
def unbroken_long(tmp_path_factory):
    """A training of `LONG` on one device that nothing interrupts; do not write to it."""
    return _unbroken(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture(scope="session")
def unbroken_long_pair(tmp_path_factory):
    """The same on two processes of two devices."""
    return _unbroken(tmp_path_factory.mktemp("unbroken_pair"), devices=2, processes=2)
