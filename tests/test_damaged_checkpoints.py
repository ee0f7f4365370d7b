"""Damages checkpoints and fills disks, and checks what is restored and what is said."""

import shutil
import subprocess
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.workdir import WorkDirectory
from tests.test_checkpoints import params_of, same, steps_of, trees_of, write

# A failed read or write leaves Orbax tasks whose errors are never retrieved.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def complete_trees_of(seed):
    return trees_of(seed) | {"ema": params_of(seed + 100)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The work directory of a training with the checkpoints 3 and 5."""
    path = tmp_path_factory.mktemp("sound")
    with WorkDirectory(path).open_checkpoints() as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, complete_trees_of(step), {"seconds": step / 2})
    return path


def restore_from(path, *, then_save=None):
    """Restores a checkpoint, returns it with the warnings, and may then save a checkpoint 5 made from `then_save`."""
    with warnings.catch_warnings(record=True) as caught, WorkDirectory(path).open_checkpoints() as checkpoints:
        warnings.simplefilter("always")
        restored = checkpoints.restore(complete_trees_of(0))
        assert restored[0] == checkpoints.latest_step
        if then_save:
            checkpoints.save(5, complete_trees_of(then_save), {"seconds": then_save / 2})
    return restored, [str(warning.message) for warning in caught if "checkpoint of step" in str(warning.message)]


DAMAGES = {
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize(
    "damage",
    [DAMAGES["cut in half"], *(pytest.param(DAMAGES[kind], marks=pytest.mark.slow) for kind in ("gone", "empty"))],
    ids=["cut in half", "gone", "empty"],
)
def test_with_any_damaged_file_this_or_the_previous_checkpoint_is_restored_to_the_bit(damage, sound, tmp_path):
    names = files_in(sound / "checkpoints" / "5")
    ended = []
    for number, name in enumerate(names):
        path = shutil.copytree(sound, tmp_path / str(number))
        newest, aside = path / "checkpoints" / "5", path / "damaged" / "5-1"
        damage(newest / name)
        left = files_in(newest)
        (step, trees, notes), told = restore_from(path, then_save=7)
        assert same(trees, complete_trees_of(step)) and notes == {"seconds": step / 2}, name
        ended.append(step)
        if step == 5:
            assert not told and files_in(newest) == left and not (path / "damaged").exists(), name
            continue
        (line,) = told
        assert line.startswith("the checkpoint of step 5 cannot be read (") and "\n" not in line
        assert f"it was moved to {path}/damaged" in line
        assert line.endswith(" from step 3")
        assert files_in(aside) == left, name
        (step, trees, _), told = restore_from(path)
        assert (step, told) == (5, []) and same(trees, complete_trees_of(7)), name
        shutil.rmtree(path)
    assert set(ended) == {3, 5}  # there are files that nothing depends on, and others


def damage_params(path, step):
    (path / "checkpoints" / str(step) / "params" / "manifest.ocdbt").write_bytes(b"")


def test_several_damaged_checkpoints_are_skipped_and_all_copies_are_kept(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    write(WorkDirectory(path), {6: None})
    shutil.rmtree(path / "checkpoints" / "6" / "ema", ignore_errors=True)  # it has none
    damage_params(path, 5)
    (step, _, _), told = restore_from(path, then_save=5)
    assert step == 3 and [line.split()[4] for line in told] == ["6", "5"]
    damage_params(path, 5)
    restore_from(path)
    assert sorted(folder.name for folder in (path / "damaged").iterdir()) == ["5-1", "5-2", "6-1"]


def test_if_all_checkpoints_are_damaged_none_is_moved(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    for step in (3, 5):
        damage_params(path, step)
    left = files_in(path)
    message = r"^none of the checkpoints \[3, 5\] in .*/run/checkpoints can be read"
    with pytest.raises(ValueError, match=message) as caught:
        restore_from(path)
    assert "\n" not in str(caught.value) and files_in(path) == left


def large_params_of(seed):
    """A quarter of a megabyte that cannot be compressed."""
    return {"params": {"kernel": jnp.asarray(np.random.default_rng(seed).normal(size=(250, 250)), "float32")}}


@pytest.fixture
def small_disk(tmp_path):
    """A full disk that holds a work directory with the checkpoint 1: there is room for notes, not for parameters."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is refused here: it needs root")
    with WorkDirectory(folder).open_checkpoints() as checkpoints:
        checkpoints.save(1, large_params_of(1), {})
    (folder / "other").write_bytes(bytes(shutil.disk_usage(folder).free - 150_000))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


FAILED = r"^the checkpoint of step 2 could not be written to .*/disk/checkpoints \(.*\): .* from step 1$"


def check_goes_on(disk, before):
    """Checks that the previous checkpoint is unchanged and that training continues from it when there is room again."""
    assert files_in(disk / "checkpoints" / "1") == before and steps_of(WorkDirectory(disk)) == {1}
    (disk / "other").unlink()
    for newest in (1, 2):
        with WorkDirectory(disk).open_checkpoints() as checkpoints:
            step, trees, _ = checkpoints.restore(large_params_of(0))
            assert step == newest and same(trees, large_params_of(newest))
            checkpoints.save(2, large_params_of(2), {})


def check_until_it_fails(checkpoints):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.01)


def save_the_next(checkpoints):
    checkpoints.save(3, large_params_of(3), {})


@pytest.mark.parametrize("find_out", [check_until_it_fails, save_the_next])
def test_a_failed_save_is_reported_once_and_keeps_the_previous_checkpoint(find_out, small_disk):
    before = files_in(small_disk / "checkpoints" / "1")
    with WorkDirectory(small_disk).open_checkpoints() as checkpoints:
        checkpoints.save(2, large_params_of(2), {})
        with pytest.raises(OSError, match=FAILED) as caught:
            find_out(checkpoints)
    assert "\n" not in str(caught.value)
    check_goes_on(small_disk, before)


def test_a_failed_save_is_reported_at_the_end_at_the_latest(small_disk):
    before = files_in(small_disk / "checkpoints" / "1")
    with pytest.raises(OSError, match=FAILED), WorkDirectory(small_disk).open_checkpoints() as checkpoints:
        checkpoints.save(2, large_params_of(2), {})
    check_goes_on(small_disk, before)
