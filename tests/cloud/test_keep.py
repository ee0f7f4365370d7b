import os
import signal
import subprocess
import sys

import pytest

from tests.cloud.conftest import BEGIN, TRAIN, changes, does, soon

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machines of Cloud TPU are Linux, with /proc")


def test_keep_continues_after_a_pre_emption_with_the_code_that_was_packed_first(cloud):
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


def test_keep_deletes_the_machines_at_the_end_on_request(cloud):
    cloud.plays(trainings="0")
    cloud("keep", "--delete-when-done")
    assert changes(cloud.calls) == [*BEGIN, "delete"]


def test_keep_ends_with_the_status_of_a_training_that_ended_by_itself(cloud):
    cloud.plays(trainings="1")
    assert "the training ended with status 1; my-tpu costs money" in cloud("keep", status=1, PATIENCE="2")
    assert changes(cloud.calls) == BEGIN


def test_keep_restarts_a_training_that_a_signal_ended_at_most_three_times(cloud):
    cloud.plays(trainings="137 134 137 139")
    cloud("keep", status=139, PATIENCE="1")
    assert changes(cloud.calls) == [*BEGIN, *3 * ["stop", "run"]]


def test_keep_starts_the_training_after_a_reboot(cloud):
    cloud.plays(trainings="0")
    for verb in ("copy", "install"):
        cloud(verb)
    with subprocess.Popen(["sleep", "60"]) as other:  # it has this process id now
        for worker in range(2):
            (cloud.home / f"machines/{worker}/my-tpu/train.pid").write_text(str(other.pid))
        cloud("keep", PATIENCE="1")
        other.kill()
    assert changes(cloud.calls[3:]) == ["stop", "run"]


def test_keep_gives_up_after_repeated_failures_of_gcloud(cloud):
    cloud.plays(failing={"describe": 4 * [7]})
    assert "3 attempts in a row failed" in cloud("keep", status=7, PATIENCE="3")
    assert [does(command) for command in cloud.calls] == 4 * ["describe"]


@pytest.mark.parametrize("states", ["NOT_FOUND ACTIVE", "DELETING DELETING NOT_FOUND ACTIVE"])
def test_keep_continues_if_an_earlier_keep_ended_after_delete(states, cloud):
    cloud.plays(f"SUSPENDED SUSPENDED {states}", "0", failing={"create": [8, 8]})
    assert "2 attempts in a row failed" in cloud("keep", status=8, PATIENCE="2")
    assert "my-tpu does not exist: creating it" in cloud("keep")
    assert changes(cloud.calls) == ["delete", *3 * ["create"], *BEGIN]


def test_keep_creates_no_machines_if_somebody_has_deleted_them(cloud):
    cloud.plays("ACTIVE ACTIVE DELETING NOT_FOUND ACTIVE")
    assert "NOT_FOUND" in cloud("keep", status=1)
    assert changes(cloud.calls) == BEGIN


@pytest.mark.parametrize(("lacking", "does_again"), [("", BEGIN), (".venv", BEGIN), ("train.pid", ["run"])])
def test_keep_helps_the_worker_that_is_furthest_behind(lacking, does_again, cloud):
    cloud.plays(trainings="0 0")
    for verb in ("copy", "install", "run"):
        cloud(verb)
    soon(lambda: all((cloud.home / f"machines/{worker}/my-tpu/train.status").exists() for worker in range(2)))
    gone = cloud.home / "machines/1/my-tpu" / lacking
    gone.rename(cloud.home / "gone")
    (cloud.home / "machines/1/my-tpu/train.status").unlink(missing_ok=True)
    assert "the training is done" in cloud("keep")
    assert changes(cloud.calls[4:]) == does_again and len(cloud.trained(1)) == 2


def test_keep_installs_again_if_one_worker_failed(cloud):
    cloud.plays(trainings="0")
    (cloud.home / "machines/1/offline").touch()
    cloud("keep")
    assert changes(cloud.calls) == [*BEGIN[:-1], *BEGIN]
    assert len(cloud.trained(0)) == len(cloud.trained(1)) == 1


def test_keep_restarts_the_training_if_one_worker_is_killed(cloud):
    cloud.plays(trainings="endless 0")
    for verb in ("copy", "install", "run"):
        cloud(verb)
    soon(lambda: cloud.trained(0) and cloud.trained(1))
    os.kill(int((cloud.home / "machines/1/my-tpu/train.pid").read_text()), signal.SIGKILL)
    assert "status 137: starting it again" in cloud("keep", PATIENCE="2")
    assert changes(cloud.calls[4:]) == ["stop", "run"]
    assert "a checkpoint\n" in cloud.log(0)


def test_keep_ends_with_the_error_of_the_worker_that_ended_the_others(cloud):
    for verb in ("copy", "install"):
        cloud(verb)
    for worker, ended in enumerate(["134", "1"]):
        (cloud.home / f"machines/{worker}/my-tpu/train.status").write_text(ended)
    assert "ended with status 1;" in cloud("keep", status=1, PATIENCE="2")


def test_keep_stops_the_training_when_the_time_is_up(cloud):
    for verb in ("copy", "install", "run"):
        cloud(verb)
    soon(lambda: cloud.trained(0) and cloud.trained(1))
    cloud("keep", "--max-hours=2", status=124, HOUR="0")
    assert changes(cloud.calls[4:]) == ["stop"]
    assert cloud.log(0).endswith("a checkpoint\n") and cloud.log(1).endswith("a checkpoint\n")
    cloud("keep", "--max-hours=2", "--delete-when-done", status=124, HOUR="0")
    assert changes(cloud.calls[4:]) == ["stop", "stop", "delete"]
    assert "whole number of hours" in cloud("keep", "--max-hours=0.5", status=2)


def test_machines_after_a_pre_emption_get_the_versions_of_the_first(cloud):
    cloud.plays("ACTIVE ACTIVE ACTIVE SUSPENDED ACTIVE", "endless 0")
    cloud("keep")
    assert cloud.bucket("versions.txt").read_text() == "jax==1\n"
    first, second = (cloud.home / "installed-0").read_text().splitlines()
    assert "--constraint" not in first and second.endswith("--constraint=versions.txt")


def test_keep_gives_up_if_the_machines_cannot_be_deleted(cloud):
    cloud.plays("SUSPENDED", failing={"delete": 9 * [8]})
    assert "2 attempts in a row failed" in cloud("keep", status=8, PATIENCE="2")


def test_keep_goes_on_if_a_deletion_went_through_although_gcloud_reported_an_error(cloud):
    cloud.plays("SUSPENDED SUSPENDED DELETING DELETING NOT_FOUND ACTIVE", "0", failing={"delete": [8]})
    cloud("keep", PATIENCE="1")
    assert changes(cloud.calls) == ["delete", "create", *BEGIN]


def test_keep_tries_again_to_delete_when_the_time_is_up(cloud):
    cloud.plays(trainings="endless", failing={"delete": [8, 8]})
    for verb in ("copy", "install", "run"):
        cloud(verb)
    soon(lambda: cloud.trained(0) and cloud.trained(1))
    cloud("keep", "--max-hours=2", "--delete-when-done", status=124, HOUR="0", PATIENCE="3")
    assert changes(cloud.calls[4:]) == ["stop", "delete", "delete", "delete"]
