import hashlib
import shutil
import signal
import subprocess

import pytest

from tests.faults.conftest import LONG, differences, said

pytestmark = pytest.mark.faults


@pytest.fixture
def disk():
    """Mounts disks of a given size in memory, and makes them larger or smaller."""
    mounted = []

    def mount(folder, size, *options):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk of a size can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    def resize(folder, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    mount.resize = resize
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def contents(folder):
    """What the files of a folder hold, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_of(ended):
    """The one line with which a training ended, without warnings."""
    assert ended.returncode == 1, ended.stderr
    lines = said(ended)
    (line,) = [line for line in lines if "train.py: warning: " not in line]
    assert line.startswith("train.py: "), lines
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        # Too small for the vocabulary; for the config; for the metrics.
        [("4k", "a file in"), ("12k", "a file in"), ("16k", "a file in")],
        # For the cache of the corpus, which only gives a warning; for the first checkpoint, or for what is written
        # meanwhile.
        [("60k", ""), ("250k", "")],
    ],
    ids=["small files", "cache and checkpoint"],
)
def test_a_disk_that_is_full_from_the_start_is_one_line_and_after_cleaning_up_the_same_command_works(
    sizes, disk, unbroken_long, small_training
):
    training = small_training(**LONG)
    disk(training.workdir, sizes[0][0])
    for size, said_so in sizes:
        disk.resize(training.workdir, size)
        (ended,) = training.run()
        line = error_of(ended)
        for words in (said_so, "could not be written", str(training.workdir), "No space left on device"):
            assert words in line
        assert ("npz cannot be written (No space left on device)" in ended.stderr) == (size not in ("4k", "250k"))
        assert training.steps() == []
    disk.resize(training.workdir, "100m")
    training.finish()
    assert differences(training.state(), unbroken_long.state()) == []
    assert training.losses() == unbroken_long.losses()


@pytest.mark.slow
def test_a_disk_that_fills_up_later_keeps_checkpoints_and_after_cleaning_up_training_continues(
    disk, unbroken_long, small_training
):
    training = small_training(**LONG)
    disk(training.workdir, "100m")
    started = training.start()
    training.wait_for_step(50, started)
    started[0].send_signal(signal.SIGTERM)
    training.wait(started)
    steps = training.steps()
    kept = [training.workdir / "checkpoints" / str(step) for step in steps]
    before = [contents(folder) for folder in kept]
    for room in (4, 200):
        used = -(-(shutil.disk_usage(training.workdir).used) // 1024)
        disk.resize(training.workdir, f"{used + room}k")
        (ended,) = training.run()
        line = error_of(ended)
        for words in (str(training.workdir), "No space left on device", f"from step {steps[-1]}"):
            assert words in line
        assert training.steps() == steps
        assert [contents(folder) for folder in kept] == before
    disk.resize(training.workdir, "100m")
    (ended,) = training.finish()
    assert f"steps {steps[-1]} to 96" in ended.stdout
    assert differences(training.state(), unbroken_long.state()) == []
    assert training.losses() == unbroken_long.losses()


@pytest.mark.slow
def test_both_of_two_processes_end_when_the_disk_is_full(disk, small_training):
    training = small_training(**LONG)
    disk(training.workdir, "250k")
    first, second = training.wait(training.start(devices=2, processes=2), seconds=120)
    assert "could not be written" in error_of(first) + error_of(second)
    assert "No space left on device" in error_of(first) + error_of(second)


def test_damaged_and_incomplete_checkpoints_are_skipped(unbroken_long, small_training):
    training = small_training(**LONG)
    shutil.copytree(unbroken_long.workdir, training.workdir)
    folder = training.workdir / "checkpoints"
    half = folder / "97.orbax-checkpoint-tmp"
    shutil.copytree(folder / "96", half)
    largest = max((folder / "96" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    (ended,) = training.finish()
    (line,) = said(ended)
    assert line.startswith("train.py: warning: the checkpoint of step 96 cannot be read (")
    assert f"it was moved to {training.workdir / 'damaged'}" in line
    assert line.endswith(" from step 72")
    assert [path.name for path in (training.workdir / "damaged").iterdir()] == ["96-1"]
    assert not half.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["72", "96"]
    assert differences(training.state(), unbroken_long.state()) == []
    assert training.losses() == unbroken_long.losses()
