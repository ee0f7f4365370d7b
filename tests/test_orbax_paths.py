"""Saves under all kinds of paths and checks that everything can be read again, or that the save is an error."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils

from flax_transformer.workdir import WorkDirectory

TREES = {"params": {"a": jnp.arange(5.0)}, "training": {"rng": jax.random.key(3)}}


def save(workdir, step=1):
    with workdir.open_checkpoints() as checkpoints:
        checkpoints.save(step, TREES, {"seconds": 7})


@pytest.mark.parametrize(
    "name",
    ["run[1]", "[!a]", "a*", "a?b", "{a,b}", "sp ace", "50%", "a#b", "'\"", "a\nb", "ಕ", "cafe\u0301", "x" * 255],
)
def test_a_checkpoint_can_be_read_whatever_characters_its_path_has(name, tmp_path):
    for workdir in (WorkDirectory(tmp_path / name), WorkDirectory(tmp_path / name / "run")):
        save(workdir)
        with workdir.open_checkpoints() as checkpoints:
            step, trees, notes = checkpoints.restore(TREES)
        assert (step, notes) == (1, {"seconds": 7})
        assert np.array_equal(trees["params"]["a"], np.arange(5.0))
        assert trees["training"]["rng"] == TREES["training"]["rng"]


def test_a_relative_path_includes_the_characters_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "old [2]").mkdir()
    monkeypatch.chdir(tmp_path / "old [2]")
    save(WorkDirectory("run"))
    with WorkDirectory("run").open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.restore_params(1, TREES["params"])["a"][4] == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [("a\\b", "backslash"), ("a\udcffb", "not UTF-8"), ("", "empty"), (" ", "empty")],
)
def test_a_path_that_cannot_be_stored_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        WorkDirectory(path)


def test_a_pattern_on_a_remote_path_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="Orbax treats as a pattern"):
        WorkDirectory("gs://bucket/run[1]").open_checkpoints()


async def merge_nothing(*arguments, **options):
    """Behaves like Orbax if it finds no parts of a checkpoint: it only logs this."""


def remove_notes(monkeypatch):
    from orbax.checkpoint._src.handlers.json_checkpoint_handler import JsonCheckpointHandler

    async def save_nothing(self, directory, *arguments, **options):
        return []

    monkeypatch.setattr(JsonCheckpointHandler, "async_save", save_nothing)


def merge_none(monkeypatch):
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge_nothing)


def check(checkpoints):
    deadline = time.monotonic() + 60
    while checkpoints.is_writing:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    checkpoints.check()


def save_the_next(checkpoints):
    checkpoints.save(3, TREES, {})


@pytest.mark.parametrize("break_it", [merge_none, remove_notes])
@pytest.mark.parametrize("find_out", [check, save_the_next, lambda checkpoints: None])
def test_a_save_with_missing_files_is_an_error(break_it, find_out, tmp_path, monkeypatch):
    workdir = WorkDirectory(tmp_path / "run")
    save(workdir)
    break_it(monkeypatch)
    failed = r"^the checkpoint of step 2 could not be written .* is missing or empty .* from step 1$"
    with pytest.raises(OSError, match=failed), workdir.open_checkpoints() as checkpoints:
        checkpoints.save(2, TREES, {})
        find_out(checkpoints)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="step 2 cannot be read"), workdir.open_checkpoints() as checkpoints:
        assert checkpoints.restore(TREES)[0] == 1


def test_an_average_with_missing_files_is_an_error(tmp_path, monkeypatch):
    workdir = WorkDirectory(tmp_path / "run")
    workdir.write_config({"model": {}})
    save(workdir)
    merge_none(monkeypatch)
    with pytest.raises(OSError, match="could not be written to .*averaged .*manifest.ocdbt is missing"):
        workdir.average_checkpoints(last=1)


def block(path, name, kind):
    path.mkdir(exist_ok=True)
    (path / name).mkdir() if kind == "folder" else (path / name).write_text("mine")


@pytest.mark.parametrize(
    ("name", "kind"), [("checkpoints", "file"), ("tensorboard", "file"), ("metrics.jsonl", "folder")]
)
def test_a_file_in_the_way_is_named_before_anything_is_written(name, kind, tmp_path):
    block(tmp_path / "run", name, kind)
    with pytest.raises(ValueError, match=rf"run/{name} is in the way of the"):
        WorkDirectory(tmp_path / "run").check_place()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    os.symlink("nowhere", tmp_path / "broken")
    for name in ("file", "file/run", "broken", "broken/run"):
        with pytest.raises(ValueError, match=rf"the folder .*/{name} cannot be made: .* is not a folder"):
            WorkDirectory(tmp_path / name).check_place()
    WorkDirectory(tmp_path / "new" / "run").check_place()
    assert sorted(os.listdir(tmp_path)) == ["broken", "file"]


def test_a_name_that_is_too_long_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="longer than 255 bytes"):
        WorkDirectory(tmp_path / ("ಕ" * 86)).check_place()


def test_a_folder_inside_another_work_directory_is_refused(tmp_path):
    save(WorkDirectory(tmp_path / "run"))
    (tmp_path / "run" / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="belongs to the work directory"):
        WorkDirectory(tmp_path / "run" / "averaged" / "mine").check_place()
    WorkDirectory(tmp_path / "run" / "finetuned").check_place()
