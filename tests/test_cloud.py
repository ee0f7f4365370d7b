"""Takes cloud/tpu_vm.sh and leaves a verdict: it asks gcloud for the right things, and goes on after a pre-emption.

The gcloud here is pretended: its machines are folders, into which it copies and in which it runs commands.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machines of Cloud TPU are Linux, with /proc")
ROOT = Path(__file__).parents[1]
OPTIONS = {
    "NAME": "my-tpu",
    "ZONE": "us-west4-a",
    "PROJECT": "my-project",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "CONFIG": "configs/some.py:small",
    "WORKDIR": "gs://bucket/runs/first",
}
VERBS = ["create", "copy", "install", "run", "follow", "status", "stop", "delete", "resume", "keep"]
BEGIN = ["scp", "tar", "install", "run"]
TRAIN = ["train.py", "--distributed", "--config=configs/some.py:small", "--workdir=gs://bucket/runs/first"]

# It writes each call down, fails where `failing` says so, and tells one state after another, the last one for good, and
# NOT_FOUND until `create` comes.
GCLOUD = """#!{python} -IS
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

# What curl gets: an installer of a uv that makes a Python that pretends to train, as `trainings` tells, line by line.
CURL = """#!/bin/bash
cat <<'END'
mkdir -p ~/.local/bin
echo 'mkdir -p .venv/bin && cp {home}/python .venv/bin' >~/.local/bin/uv
chmod +x ~/.local/bin/uv
END
"""
PYTHON = """#!/bin/bash
[ "$1" != -m ] || exit 0
{{ printf '%s\\0' "$JAX_PLATFORMS" "$@"; echo; }} >>{home}/trained-$HOSTNAME
how=$(sed -n "$(wc -l <{home}/trained-$HOSTNAME)p" {home}/trainings)
[ "$how" = endless ] || exit "$how"
trap 'sleep 0.2; echo a checkpoint; exit 143' TERM
while :; do sleep 0.02; done
"""


class Cloud:
    """A small repository that holds the script, and two machines."""

    def __init__(self, home):
        self.home, self.repository = home, home / "repository"
        shutil.copytree(ROOT / "cloud", self.repository / "cloud")
        for name in ("train.py", "configs/some.py", "data/text.en", "notes"):
            (self.repository / name).parent.mkdir(exist_ok=True)
            (self.repository / name).write_text(name)
        for command in ("git init --quiet", "git add train.py cloud configs"):
            subprocess.run(command.split(), cwd=self.repository, check=True)
        for worker in range(2):
            (home / f"machines/{worker}").mkdir(parents=True)
        (home / "bin").mkdir()
        for name, text in {"bin/gcloud": GCLOUD, "bin/curl": CURL, "python": PYTHON}.items():
            (home / name).write_text(text.format(home=home, python=sys.executable))
            (home / name).chmod(0o755)
        self.plays()

    def plays(self, states="ACTIVE", trainings="endless", failing=None):
        (self.home / "states").write_text(states)
        (self.home / "trainings").write_text(trainings.replace(" ", "\n"))
        (self.home / "failing").write_text(json.dumps(failing or {}))

    def __call__(self, *arguments, path=f"{{home}}/bin:{os.environ['PATH']}", status=0, **options):
        """What the script prints; `status` is how it ends."""
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
    """What a command does: its verb, or what it has a worker do."""
    remote = re.search(r"--command=.*?(?:worker\.sh (install|run|follow|look|stop)|(tar))", "\n".join(command))
    return (remote[1] or remote[2]) if remote else command[4]


def changes(commands):
    """What commands do, without those that only look."""
    return [verb for verb in map(does, commands) if verb not in ("describe", "look")]


def soon(question):
    end = time.monotonic() + 10
    while not question():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_commands_for_these_machines_and_runs_none(verb, cloud):
    commands = cloud.dry(verb)
    assert commands
    for command in commands:
        assert command[:3] == ["gcloud", "compute", "tpus"] and "my-tpu" in (command[5], command[6].rstrip(":"))
        assert {"--project=my-project", "--zone=us-west4-a", "--quiet"} <= set(command)
    assert cloud.calls == [] and not (cloud.repository / "build").exists()


def test_machines_are_spot_unless_it_is_said(cloud):
    spot, on_demand = (cloud.dry("create", *flags)[0] for flags in ([], ["--on-demand", "--create-flag=--reserved"]))
    assert "--spot" in spot and "--reserved" not in spot
    assert "--spot" not in on_demand and "--reserved" in on_demand


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_is_that_of_the_generation(accelerator, runtime, cloud):
    assert f"--runtime-version={runtime}" in cloud.dry("create", ACCELERATOR_TYPE=accelerator)[0]
    other = cloud.dry("create", f"--accelerator-type={accelerator}", "--runtime-version=other")[0]
    assert {f"--accelerator-type={accelerator}", "--runtime-version=other"} <= set(other)


def test_resume_does_all_in_order_with_the_commands_of_the_single_verbs(cloud):
    more = ["--", "--config.training.steps=10"]
    resumed = cloud.dry("resume", *more)
    assert [does(command) for command in resumed] == ["delete", "create", "describe", *BEGIN]
    assert resumed == [
        command for verb in ("delete", "create", "copy", "install", "run") for command in cloud.dry(verb, *more)
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ([], {}, "nothing is no verb: give create, copy"),
        (["begin"], {}, "begin is no verb: give create, copy"),
        (["create", "--spot"], {}, "--spot is no option: see --help"),
        (["create", "--zone", "a"], {}, "--flag=VALUE is one word"),
        (["status"], {"NAME": ""}, "NAME is missing: give --name="),
        (["delete", "--zone="], {}, "ZONE is missing: give --zone="),
        (["create"], {"ACCELERATOR_TYPE": ""}, "ACCELERATOR_TYPE is missing: give --accelerator-type="),
        (["create"], {"ACCELERATOR_TYPE": "v5e-16"}, "give --accelerator-type=v5litepod-16"),
        (["create"], {"ACCELERATOR_TYPE": "tpu7x-16"}, "use GKE or Compute Engine"),
        (["create"], {"ACCELERATOR_TYPE": "v9-1"}, "give --runtime-version="),
        (["copy"], {"NAME": "My TPU"}, "take a-z, 0-9 and hyphens"),
        (["copy", "--data=data/none.en"], {}, "give a file or folder of this repository"),
        (["copy", "--data=/etc/hosts"], {}, "give a file or folder of this repository"),
        (["run"], {"WORKDIR": "runs/first"}, "give gs://BUCKET/FOLDER"),
        (["resume"], {"CONFIG": "notes"}, "git add it"),
        (["keep"], {"CONFIG": ""}, "CONFIG is missing: give --config="),
    ],
)
def test_a_mistake_is_one_line_that_names_the_mend(arguments, options, said, cloud):
    (line,) = cloud(*arguments, status=2, **options).splitlines()
    assert said in line
    assert cloud.calls == []


def test_without_gcloud_only_a_dry_run_does_something(cloud):
    tools = cloud.home / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "git", "tr"):
        (tools / tool).symlink_to(shutil.which(tool))
    (line,) = cloud("status", path=str(tools), status=2).splitlines()
    assert "cloud.google.com/sdk/docs/install" in line and "--dry-run" in line
    assert cloud.dry("keep", path=str(tools)) == cloud.dry("keep")


def test_each_worker_trains_with_the_arguments_as_they_were_written(cloud):
    awkward = ["--config.data.train=files:a b.en,it's.de + 3*tsv:x", '--note=$HOME `id` "*" \\ ; & ಕನ್ನಡ', ""]
    for verb in ("copy", "install", "run"):
        cloud(verb, "--", *awkward)
    for worker in range(2):
        soon(lambda worker=worker: cloud.trained(worker))
        assert cloud.trained(worker) == [["tpu,cpu", *TRAIN, *awkward]]
    assert "it runs already: stop it first" in cloud("run", status=1)


def test_what_git_knows_is_copied_and_the_text_that_is_named(cloud):
    def copied():
        folder = cloud.home / "machines/1/my-tpu"
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    cloud("copy")
    assert copied() == {"train.py", "configs/some.py", "cloud/tpu_vm.sh", "cloud/worker.sh"}
    cloud("copy", "--data=data")
    assert "data/text.en" in copied() and "notes" not in copied()


def test_create_waits_until_the_machines_are_there(cloud):
    cloud.plays("WAITING_FOR_RESOURCES PROVISIONING PROVISIONING ACTIVE SUSPENDED")
    told = cloud("create").splitlines()
    assert [line.split()[-1] for line in told] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    for end in ("FAILED", "SUSPENDED"):
        cloud.plays(f"WAITING_FOR_RESOURCES {end}")
        assert "delete my-tpu and create it again" in cloud("create", status=1)


@pytest.mark.parametrize(
    ("verb", "fails"), [("create", "create"), ("create", "describe"), ("copy", "scp"), ("run", "ssh")]
)
def test_a_gcloud_that_fails_ends_the_script_with_its_status(verb, fails, cloud):
    cloud.plays(failing={fails: [7]})
    cloud(verb, status=7)
    assert cloud.calls[-1][4] == fails


def test_keep_goes_on_after_a_pre_emption_with_the_code_that_it_began_with(cloud):
    states = "ACTIVE ACTIVE ACTIVE SUSPENDING SUSPENDED WAITING_FOR_RESOURCES ACTIVE"
    cloud.plays(states, "endless 0", failing={"describe": [1, 1], "ssh": [255, 255]})
    cloud("copy", "--data=data", status=255)
    (cloud.repository / "train.py").write_text("edited")
    told = cloud("keep", "--", "--config.training.steps=10")
    assert changes(cloud.calls[2:]) == [*BEGIN, "delete", "create", *BEGIN]
    first, second = (command for command in cloud.calls if does(command) == "run")
    assert first == second
    for worker in range(2):
        soon(lambda worker=worker: len(cloud.trained(worker)) == 2)
        assert cloud.trained(worker) == 2 * [["tpu,cpu", *TRAIN, "--config.training.steps=10"]]
    assert (cloud.home / "machines/0/my-tpu/train.py").read_text() == "train.py"
    assert (cloud.home / "machines/0/my-tpu/data/text.en").exists()
    assert "my-tpu is SUSPENDED" in told and "costs money until you delete it" in told


def test_keep_deletes_the_machines_at_the_end_if_it_is_asked_to(cloud):
    cloud.plays(trainings="0")
    cloud("keep", "--delete-when-done")
    assert changes(cloud.calls) == [*BEGIN, "delete"]


def test_keep_ends_with_the_status_of_a_training_that_ended_by_itself(cloud):
    cloud.plays(trainings="1")
    assert "the training ended with status 1; my-tpu costs money" in cloud("keep", status=1, PATIENCE="2")
    assert changes(cloud.calls) == BEGIN


def test_keep_starts_a_training_again_that_a_signal_ended_three_times_at_most(cloud):
    cloud.plays(trainings="137 134 137 139")
    cloud("keep", status=139, PATIENCE="1")
    assert changes(cloud.calls) == [*BEGIN, *3 * ["stop", "run"]]


def test_keep_starts_the_training_when_a_machine_was_started_anew(cloud):
    cloud.plays(trainings="0")
    for verb in ("copy", "install"):
        cloud(verb)
    with subprocess.Popen(["sleep", "60"]) as other:  # it has the number now
        (cloud.home / "machines/0/my-tpu/train.pid").write_text(str(other.pid))
        cloud("keep", PATIENCE="1")
        other.kill()
    assert changes(cloud.calls[3:]) == ["stop", "run"]


def test_keep_gives_up_when_gcloud_fails_for_long(cloud):
    cloud.plays(failing={"describe": 4 * [7]})
    assert "3 tries in a row failed" in cloud("keep", status=7, PATIENCE="3")
    assert [does(command) for command in cloud.calls] == 4 * ["describe"]


@pytest.mark.parametrize("states", ["NOT_FOUND ACTIVE", "DELETING DELETING NOT_FOUND ACTIVE"])
def test_keep_finds_its_way_when_the_one_before_ended_behind_delete(states, cloud):
    cloud.plays(f"SUSPENDED SUSPENDED {states}", "0", failing={"create": [8, 8]})
    assert "2 tries in a row failed" in cloud("keep", status=8, PATIENCE="2")
    assert "my-tpu is not there: creating it" in cloud("keep")
    assert changes(cloud.calls) == ["delete", *3 * ["create"], *BEGIN]


def test_keep_creates_no_machines_when_somebody_deletes_them_meanwhile(cloud):
    cloud.plays("ACTIVE ACTIVE DELETING NOT_FOUND ACTIVE")
    assert "NOT_FOUND" in cloud("keep", status=1)
    assert changes(cloud.calls) == BEGIN


def test_stop_waits_for_the_checkpoint_and_status_tells_of_each_worker(cloud):
    for verb in ("copy", "install", "run"):
        cloud(verb)
    soon(lambda: cloud.trained(0) and cloud.trained(1))
    # What a connection that ends may send.
    os.kill(int((cloud.home / "machines/0/my-tpu/train.pid").read_text()), signal.SIGHUP)
    assert {"0: running", "1: running"} <= set(cloud("status").splitlines())
    cloud("stop")
    assert cloud.log(0) == cloud.log(1) == "a checkpoint\n"
    soon(lambda: "0: ended 143" in cloud("status"))
    assert "status 143" in cloud("keep", status=143, PATIENCE="1")


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs/cloud.md").read_text()
    exports = shlex.split(" ".join(re.findall(r"^    export (.*)", page, re.MULTILINE)))
    environment = {"PATH": os.environ["PATH"]} | dict(export.split("=", 1) for export in exports)
    shown = re.findall(r"^    \$ cloud/tpu_vm\.sh (.*)\n((?:    .*\n)+)", page, re.MULTILINE)
    assert {arguments.split()[0] for arguments, _ in shown} == set(VERBS)
    for arguments, output in shown:
        command = ["bash", "cloud/tpu_vm.sh", *shlex.split(arguments)]
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ended.stdout == textwrap.dedent(output)
