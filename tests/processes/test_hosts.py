import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from flax_transformer.processes import hosts
from flax_transformer.processes.hosts import Cluster, cluster_of_environment
from tests.xla_flags import QUICK_COMPILING

ROOT = Path(__file__).parents[2]
THREE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}, None),
        (THREE, Cluster("10.0.0.1:8476", 3, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}, Cluster("10.0.0.1:8476", None, None)),
        ({"TPU_WORKER_HOSTNAMES": ""}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, Cluster()),
        (THREE | {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, Cluster("10.0.0.1:8476", 3, 0)),
    ],
)
def test_an_environment_names_a_cluster_or_none(environment, expected):
    assert cluster_of_environment(environment) == expected


@pytest.mark.parametrize("value", ["two", "-1", "1.5", ""])
@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_an_invalid_number_is_an_error_that_names_the_variable(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}: set it to a number$"):
        cluster_of_environment(THREE | {name: value})


@pytest.fixture
def not_connected(monkeypatch):
    """What is asked of jax, which does nothing."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: asked.append((arguments, options)))
    return asked


@pytest.mark.parametrize(
    ("address", "num_processes", "process_id"),
    [("a:1", None, None), ("a:1", 2, None), ("a:1", None, 0), (None, 2, 0), (None, 2, None), (None, None, 0)],
)
def test_a_partly_described_cluster_is_an_error_that_lists_what_is_given(
    address, num_processes, process_id, not_connected
):
    message = (
        f"^coordinator address {address}, num_processes {num_processes}, process_id {process_id}: give all three, or"
    )
    with pytest.raises(ValueError, match=message):
        Cluster(address, num_processes, process_id).connect(3)
    assert not not_connected


def test_the_wait_for_other_processes_is_announced(not_connected, monkeypatch, capsys):
    Cluster("a:1", 3, 0).connect(7)
    assert capsys.readouterr().out == "connecting as process 0 of 3 to a:1, for at most 7 s\n"
    Cluster().connect(8)
    assert capsys.readouterr().out == "connecting to the other processes of this cluster, for at most 8 s\n"
    assert not_connected == [
        (("a:1", 3, 0), {"initialization_timeout": 7}),
        ((None, None, None), {"initialization_timeout": 8}),
    ]


def test_one_process_is_the_first_and_waits_for_nobody(capsys):
    value = {"a": [1, "ಕನ್ನಡ"]}
    assert hosts.gather(value) == [value]
    assert (hosts.index(), hosts.count(), hosts.is_first()) == (0, 1, True)
    hosts.wait("nobody")
    hosts.say("heard")
    assert capsys.readouterr().out == "heard\n"


# Each process passes values of different lengths and scripts, waits for the slow one, and prints.
TOGETHER = """
import json, os, sys, time
from flax_transformer.processes import hosts

process, folder = int(sys.argv[2]), sys.argv[3]
hosts.Cluster(sys.argv[1], 2, process).connect(60)
gathered = [hosts.gather(value[process]) for value in json.loads(sys.argv[4])]
if process:
    time.sleep(0.5)
open(f"{folder}/{process}", "w").close()
hosts.wait("both have written")
seen = [os.path.exists(f"{folder}/{number}") for number in range(2)]
hosts.say("only the first says this")
print(json.dumps([gathered, seen, hosts.index(), hosts.count(), hosts.is_first()]))
"""


# Each process shows a progress bar; one fails, the other would wait for it.
FAILING = """
import sys, time
from tqdm import tqdm
from flax_transformer.processes import hosts

process, failing = int(sys.argv[2]), int(sys.argv[3])
hosts.Cluster(sys.argv[1], 2, process).connect(60)
with hosts.ending_together("train.py", unless=KeyboardInterrupt), tqdm(total=2) as bar:
    bar.update()
    hosts.wait("both show a bar")
    if process == failing:
        raise SystemExit("train.py: the disk is full")
    time.sleep(600)
"""


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        # Buffered, as into a pipe by default, what is not flushed is lost when jax ends the process.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILING, "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_gather_values_wait_for_each_other_and_print_once(tmp_path):
    # Pairs of the values of the two processes.
    pairs = [[0, 1], ["short", "a much longer text"], ["ಕನ್ನಡ 😀", ""], [{"a": [1.5, None]}, {}], ["same", "same"]]
    address = free_address()
    processes = [start("-c", TOGETHER, address, number, tmp_path, json.dumps(pairs)) for number in range(2)]
    try:
        ended = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for number, (process, (out, error)) in enumerate(zip(processes, ended, strict=True)):
        assert process.returncode == 0, error
        # The library that transfers values between CPUs prints something too.
        connecting, *said, last = [line for line in out.splitlines() if "Gloo" not in line and "peer ranks" not in line]
        assert connecting == f"connecting as process {number} of 2 to {address}, for at most 60 s"
        assert said == ([] if number else ["only the first says this"])
        assert json.loads(last) == [pairs, [True, True], number, 2, number == 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_ends_because_of_another_says_so_on_its_own_line(failing):
    address = free_address()
    processes = [start("-c", FAILING, address, number, failing) for number in range(2)]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], errors
    other = f"train.py: process {failing} failed: train.py: the disk is full; this process ends with it"
    # A carriage return overwrites the bar; it is not drawn again below the reason.
    lines = [error.replace("\r", "\n").splitlines() for error in errors]
    assert lines[failing][-1] == "train.py: the disk is full"
    assert lines[1 - failing][-1] == other


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_peer_does_not_connect_ends_after_saying_what_it_waited_for(number, tmp_path):
    address, began = free_address(), time.monotonic()
    flags = [f"--coordinator={address}", "--num_processes=2", f"--process_id={number}", "--connect_timeout=2"]
    process = start("train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *flags)
    try:
        out, error = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - began < 75, error
    assert out.splitlines()[0] == f"connecting as process {number} of 2 to {address}, for at most 2 s"
    assert not (tmp_path / "run").exists()
