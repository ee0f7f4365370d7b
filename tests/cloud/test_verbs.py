import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from flax_transformer.monitoring import provenance
from tests.cloud.conftest import BEGIN, ROOT, TRAIN, does, soon

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machines of Cloud TPU are Linux, with /proc")
VERBS = ["create", "copy", "install", "run", "follow", "status", "stop", "delete", "resume", "keep"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_commands_for_these_machines_and_runs_none(verb, cloud):
    commands = cloud.dry(verb)
    assert commands
    for command in commands:
        assert command[:3] == ["gcloud", "compute", "tpus"] and "my-tpu" in (command[5], command[6].rstrip(":"))
        assert {"--project=my-project", "--zone=us-west4-a", "--quiet"} <= set(command)
    assert cloud.calls == [] and not (cloud.repository / "build").exists()


def test_machines_are_spot_by_default(cloud):
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
def test_the_runtime_version_suits_the_generation(accelerator, runtime, cloud):
    assert f"--runtime-version={runtime}" in cloud.dry("create", ACCELERATOR_TYPE=accelerator)[0]
    other = cloud.dry("create", f"--accelerator-type={accelerator}", "--runtime-version=other")[0]
    assert {f"--accelerator-type={accelerator}", "--runtime-version=other"} <= set(other)


def test_resume_runs_the_commands_of_the_single_verbs_in_order(cloud):
    more = ["--", "--config.training.steps=10"]
    resumed = cloud.dry("resume", *more)
    assert [does(command) for command in resumed] == ["delete", "create", "describe", *BEGIN]
    assert resumed == [
        command for verb in ("delete", "create", "copy", "install", "run") for command in cloud.dry(verb, *more)
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ([], {}, "nothing is not a verb: give create, copy"),
        (["begin"], {}, "begin is not a verb: give create, copy"),
        (["create", "--spot"], {}, "--spot is not an option"),
        (["create", "--zone", "a"], {}, "--flag=VALUE as one word"),
        (["status"], {"NAME": ""}, "NAME is missing: give --name="),
        (["delete", "--zone="], {}, "ZONE is missing: give --zone="),
        (["create"], {"ACCELERATOR_TYPE": ""}, "ACCELERATOR_TYPE is missing: give --accelerator-type="),
        (["create"], {"ACCELERATOR_TYPE": "v5e-16"}, "give --accelerator-type=v5litepod-16"),
        (["create"], {"ACCELERATOR_TYPE": "tpu7x-16"}, "use GKE or Compute Engine"),
        (["create"], {"ACCELERATOR_TYPE": "v9-1"}, "give --runtime-version="),
        (["copy"], {"NAME": "My TPU"}, "--name is My TPU"),
        (["copy", "--data=data/none.en"], {}, "give a file or folder inside this repository"),
        (["copy", "--data=/etc/hosts"], {}, "give a file or folder inside this repository"),
        (["run"], {"WORKDIR": "runs/first"}, "give gs://BUCKET/FOLDER"),
        (["resume"], {"CONFIG": "notes"}, "git add it"),
        (["keep"], {"CONFIG": ""}, "CONFIG is missing: give --config="),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy(arguments, options, said, cloud):
    (line,) = cloud(*arguments, status=2, **options).splitlines()
    assert said in line
    assert cloud.calls == []


def test_without_gcloud_only_a_dry_run_works(cloud):
    tools = cloud.home / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "git", "tr"):
        (tools / tool).symlink_to(shutil.which(tool))
    (line,) = cloud("status", path=str(tools), status=2).splitlines()
    assert "cloud.google.com/sdk/docs/install" in line and "--dry-run" in line
    assert cloud.dry("keep", path=str(tools)) == cloud.dry("keep")


def test_each_worker_trains_with_exactly_the_given_arguments(cloud):
    awkward = ["--config.data.train=files:a b.en,it's.de + 3*tsv:x", '--note=$HOME `id` "*" \\ ; & ಕನ್ನಡ', ""]
    for verb in ("copy", "install", "run"):
        cloud(verb, "--", *awkward)
    for worker in range(2):
        soon(lambda worker=worker: cloud.trained(worker))
        assert cloud.trained(worker) == [["tpu,cpu", *TRAIN, *awkward]]
    assert "already running" in cloud("run", status=1)


def test_the_log_is_in_the_bucket_while_training_runs_and_after_it_has_ended(cloud):
    for verb in ("copy", "install", "run"):
        cloud(verb, LOG_EVERY="0.2")
    soon(lambda: list(cloud.bucket("logs").glob("*-0.log")))
    cloud("stop")
    (log,) = cloud.bucket("logs").glob("*-0.log")
    assert log.read_text() == cloud.log(0) and cloud.log(0).endswith("a checkpoint\n")


def test_a_worker_with_other_versions_than_the_bucket_has_does_not_train(cloud):
    cloud("copy")
    cloud.bucket("versions.txt").parent.mkdir(parents=True)
    cloud.bucket("versions.txt").write_text("jax==1\n")
    (cloud.home / "versions-1").write_text("jax==2\n")
    cloud("install", status=1)
    assert sorted(cloud("status").splitlines()[1:]) == ["0: installed", "1: copied"]


def test_each_worker_copies_the_prepared_data_sets(cloud):
    (cloud.home / "buckets/bucket/tfds/wmt14").mkdir(parents=True)
    (cloud.home / "buckets/bucket/tfds/wmt14/text").write_text("text")
    cloud("copy")
    for _ in range(2):
        cloud("install", "--tfds=gs://bucket/tfds")
        for worker in range(2):
            assert (cloud.home / f"machines/{worker}/tensorflow_datasets/wmt14/text").read_text() == "text"
    assert "gs://BUCKET/FOLDER" in cloud("install", "--tfds=data", status=2)


def test_copy_includes_tracked_files_and_the_given_data(cloud):
    def copied():
        folder = cloud.home / "machines/1/my-tpu"
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    cloud("copy")
    assert copied() == {"train.py", "configs/some.py", "cloud/tpu_vm.sh", "cloud/worker.sh", "build/revision"}
    cloud("copy", "--data=data")
    assert "data/text.en" in copied() and "notes" not in copied()


def test_an_archive_that_was_cut_off_is_not_sent(cloud):
    cloud("copy")
    (cloud.repository / "train.py").unlink()  # git tracks it still, so tar fails
    (cloud.repository / "build/my-tpu.tar.gz").unlink()
    for _ in range(2):
        assert "train.py" in cloud("resume", status=2)
    assert not (cloud.repository / "build/my-tpu.tar.gz").exists()


def test_a_config_may_be_named_as_for_train_and_a_work_directory_may_end_with_slashes(cloud):
    (command,) = cloud.dry("run", "--config=some:tiny", "--workdir=gs://bucket/runs/first//")
    remote = next(word for word in command if word.startswith("--command="))
    assert "--config=some:tiny --workdir=gs://bucket/runs/first" in remote and "first/" not in remote
    assert "a file that git does not track" in cloud("run", "--config=other", status=2)


def test_a_training_on_the_workers_records_the_copied_revision(cloud, monkeypatch):
    there = cloud.home / "machines/1/my-tpu/flax_transformer/monitoring/provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(there))
    command = ["git", "-C", cloud.repository, "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cloud("copy")
    assert provenance.provenance()["revision"] == commit
    (cloud.repository / "train.py").write_text("edited")
    assert provenance.provenance()["revision"] == commit
    cloud("copy")
    assert provenance.provenance()["revision"] == f"{commit}-dirty"


def test_code_without_a_commit_is_copied_too(cloud, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(cloud.home / "machines/1/my-tpu/a/b/provenance.py"))
    subprocess.run(["git", "update-ref", "-d", "HEAD"], cwd=cloud.repository, check=True)
    cloud("copy")
    assert provenance.provenance()["revision"] is None


def test_follow_shows_the_log_without_what_gloo_says(cloud):
    for verb in ("copy", "install", "run"):
        cloud(verb)
    cloud("stop")
    command = ["timeout", "60", "bash", cloud.home / "machines/0/my-tpu/cloud/worker.sh", "follow"]
    assert cloud.log(0).index("[Gloo]") < cloud.log(0).index("a checkpoint")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "a checkpoint\n"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_create_waits_until_the_machines_are_ready(cloud):
    cloud.plays("WAITING_FOR_RESOURCES PROVISIONING PROVISIONING ACTIVE SUSPENDED")
    told = cloud("create").splitlines()
    assert [line.split()[-1] for line in told] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    for end in ("FAILED", "SUSPENDED"):
        cloud.plays(f"WAITING_FOR_RESOURCES {end}")
        assert "delete my-tpu and create it again" in cloud("create", status=1)


@pytest.mark.parametrize(
    ("verb", "fails"), [("create", "create"), ("create", "describe"), ("copy", "scp"), ("run", "ssh")]
)
def test_a_failure_of_gcloud_ends_the_script_with_its_status(verb, fails, cloud):
    cloud.plays(failing={fails: [7]})
    cloud(verb, status=7)
    assert cloud.calls[-1][4] == fails


def test_stop_waits_for_the_checkpoint_and_status_shows_each_worker(cloud):
    for verb in ("copy", "install", "run"):
        cloud(verb)
    soon(lambda: cloud.trained(0) and cloud.trained(1))
    # The signal that the end of a connection may send.
    os.kill(int((cloud.home / "machines/0/my-tpu/train.pid").read_text()), signal.SIGHUP)
    assert {"0: running", "1: running"} <= set(cloud("status").splitlines())
    cloud("stop")
    assert cloud.log(0).endswith("a checkpoint\n") and cloud.log(1).endswith("a checkpoint\n")
    assert "0: ended 143" in cloud("status")
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
