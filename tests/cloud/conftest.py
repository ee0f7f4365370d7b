"""Gives cloud/tpu_vm.sh a fake gcloud, whose machines are folders to which it copies files and where it runs
commands."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "NAME": "my-tpu",
    "ZONE": "us-west4-a",
    "PROJECT": "my-project",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "CONFIG": "configs/some.py:small",
    "WORKDIR": "gs://bucket/runs/first",
}
BEGIN = ["scp", "tar", "install", "run"]
TRAIN = ["train.py", "--distributed", "--config=configs/some.py:small", "--workdir=gs://bucket/runs/first"]

# A bucket is a folder. The last words of `cp` and `rsync` say what is copied and where.
STORAGE = """#!/bin/bash
[ "$1" = storage ] || exec {home}/bin/tpus "$@"
words=() keep=
for word in "${{@:3}}"; do
  case $word in
    gs://*) words+=("{home}/buckets/${{word#gs://}}") ;;
    --no-clobber) keep=$word ;;
    --*) ;;
    *) words+=("$word") ;;
  esac
done
[ "$2" != cat ] || exec cat "${{words[0]}}"
mkdir -p "$(dirname "${{words[1]}}")"
cp --recursive --no-target-directory $keep "${{words[@]}}"
"""

# It records each call, fails if `failing` says so, and reports one state after another, the last one forever. While
# there are no machines, after `delete` and as long as NOT_FOUND is the first state, it reports NOT_FOUND.
TPUS = """#!{python} -IS
import contextlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

home = Path("{home}")
_, _, _, verb, subject, *_ = arguments = sys.argv[1:]
with open(home / "calls", "a") as calls:
    print(json.dumps(arguments), file=calls)
failing = json.loads((home / "failing").read_text())
if failing.get(verb):
    status = failing[verb].pop(0)
    (home / "failing").write_text(json.dumps(failing))
    sys.exit(status)
flags = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
machines = sorted((home / "machines").iterdir())
if verb == "describe":
    state, *later = (home / "states").read_text().split()
    if state == "NOT_FOUND":
        sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: {{subject}} was not found.")
    (home / "states").write_text(" ".join(later or [state]))
    print(state)
elif verb == "create":
    (home / "states").write_text((home / "states").read_text().removeprefix("NOT_FOUND "))
elif verb == "delete":
    states = (home / "states").read_text()
    (home / "states").write_text(states if "NOT_FOUND" in states else f"NOT_FOUND {{states}}")
    for machine in machines:
        gone = machine.rename(home / f"gone-{{machine.name}}-{{time.time_ns()}}")
        for process in gone.glob("*/train.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.read_text()), signal.SIGKILL)
        machine.mkdir()
elif verb in ("scp", "ssh"):
    chosen = machines if flags["--worker"] == "all" else [machines[int(flags["--worker"])]]
    if verb == "scp":
        for machine in chosen:
            shutil.copy(subject, machine)
        sys.exit()
    remote = [
        subprocess.Popen(
            ["bash", "-c", flags["--command"]],
            cwd=machine,
            env=os.environ | {{"HOME": str(machine), "HOSTNAME": machine.name}},
        )
        for machine in chosen
    ]
    sys.exit(max(process.wait() for process in remote))
"""

# What curl downloads: an installer of a fake uv, whose fake Python pretends to train as the lines of `trainings` say.
# On a machine that is `offline` only the second installation works.
CURL = """#!/bin/bash
! rm ~/offline 2>/dev/null || exit 6
cat <<'END'
mkdir -p ~/.local/bin
echo 'mkdir -p .venv/bin && cp {home}/python .venv/bin' >~/.local/bin/uv
chmod +x ~/.local/bin/uv
END
"""
PYTHON = """#!/bin/bash
[ "$3" != install ] || echo "${{@:5}}" >>{home}/installed-$HOSTNAME
[ "$3" != freeze ] || cat {home}/versions-$HOSTNAME 2>/dev/null || echo jax==1
[ "$1" != -m ] || exit 0
echo "[Gloo] Rank 0 is connected to 1 peer ranks."
{{ printf '%s\\0' "$JAX_PLATFORMS" "$@"; echo; }} >>{home}/trained-$HOSTNAME
how=$(sed -n "$(wc -l <{home}/trained-$HOSTNAME)p" {home}/trainings)
[ "$how" = endless ] || exit "$how"
trap 'sleep 0.2; echo a checkpoint; exit 143' TERM
while :; do sleep 0.02; done
"""


class Cloud:
    """A small repository with the script, and two machines."""

    def __init__(self, home):
        self.home, self.repository = home, home / "repository"
        shutil.copytree(ROOT / "cloud", self.repository / "cloud")
        for name in ("train.py", "configs/some.py", "data/text.en", "notes"):
            (self.repository / name).parent.mkdir(exist_ok=True)
            (self.repository / name).write_text(name)
        commit = "git -c user.name=me -c user.email=me commit --quiet --message=first"
        for command in ("git init --quiet", "git add train.py cloud configs", commit):
            subprocess.run(command.split(), cwd=self.repository, check=True)
        for worker in range(2):
            (home / f"machines/{worker}").mkdir(parents=True)
        (home / "bin").mkdir()
        for name, text in {"bin/gcloud": STORAGE, "bin/tpus": TPUS, "bin/curl": CURL, "python": PYTHON}.items():
            (home / name).write_text(text.format(home=home, python=sys.executable))
            (home / name).chmod(0o755)
        self.plays()

    def plays(self, states="ACTIVE", trainings="endless", failing=None):
        (self.home / "states").write_text(states)
        (self.home / "trainings").write_text(trainings.replace(" ", "\n"))
        (self.home / "failing").write_text(json.dumps(failing or {}))

    def __call__(self, *arguments, path=f"{{home}}/bin:{os.environ['PATH']}", status=0, **options):
        """Runs the script and returns what it prints; `status` is the expected exit status."""
        environment = {"PATH": path.format(home=self.home), "POLL": "0.01"} | OPTIONS | options
        command = ["bash", self.repository / "cloud/tpu_vm.sh", *arguments]
        ended = subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True, timeout=60)
        assert ended.returncode == status, ended.stdout + ended.stderr
        return ended.stdout if status == 0 else ended.stderr

    def dry(self, *arguments, **options):
        """The commands of a dry run."""
        return [shlex.split(line) for line in self(arguments[0], "--dry-run", *arguments[1:], **options).splitlines()]

    @property
    def calls(self):
        """The commands that were run."""
        path = self.home / "calls"
        return [["gcloud", *json.loads(line)] for line in path.read_text().splitlines()] if path.exists() else []

    def trained(self, worker=0):
        """JAX_PLATFORMS and the arguments of each training."""
        path = self.home / f"trained-{worker}"
        return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []

    def bucket(self, name):
        """A file or folder of the work directory."""
        return self.home / "buckets/bucket/runs/first" / name

    def log(self, worker=0):
        path = self.home / f"machines/{worker}/my-tpu/train.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    for pid in tmp_path.glob("**/train.pid"):
        with contextlib.suppress(OSError):
            if b"--distributed" in Path(f"/proc/{int(pid.read_text())}/cmdline").read_bytes():
                os.kill(int(pid.read_text()), signal.SIGKILL)


def does(command):
    """The action of a command: its verb, or what it makes a worker do."""
    remote = re.search(r"--command=.*?(?:worker\.sh (install|run|follow|look|stop)|(tar))", "\n".join(command))
    return (remote[1] or remote[2]) if remote else command[4]


def changes(commands):
    """The actions of commands, without those that only check the state."""
    return [verb for verb in map(does, commands) if verb not in ("describe", "look")]


def soon(question):
    end = time.monotonic() + 10
    while not question():
        assert time.monotonic() < end
        time.sleep(0.01)
