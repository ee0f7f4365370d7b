import contextlib
import math
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from flax_transformer.atomic_files import write_folder
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.monitoring.report import Report
from flax_transformer.workdir import WorkDirectory
from tests.fake_scheme import fake_bucket

# The second contains what Python, but not JSON, treats as the end of a line.
LINES = [{"kind": "train", "step": 1, "loss": 2.5}, {"kind": "test", "signature": "ಕನ್ನಡ\u2028"}]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A work directory `gs://bucket/runs/first`; the test runs in an empty folder, and must leave it so."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_bucket(tmp_path / "bucket"):
        yield WorkDirectory("gs://bucket/runs/first")
    assert list((tmp_path / "here").iterdir()) == []


def test_the_fake_bucket_is_as_strict_as_a_real_one(workdir):
    path = epath.Path("gs://bucket/some/name")
    with pytest.raises(NotImplementedError, match="mode 'ab'"):
        path.open("a")
    path.parent.mkdir(parents=True)
    assert not path.parent.exists()  # a folder is no more than the names in it
    with path.open("wb") as file:
        file.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half" and path.parent.is_dir() and not path.is_dir()
    assert [child.name for child in epath.Path("gs://bucket").iterdir()] == ["some"]
    path.unlink()
    assert not path.parent.exists()


def test_a_config_in_a_bucket_can_be_read_back(workdir):
    assert workdir.is_remote and not workdir.exists
    workdir.write_config({"model": {"d_model": 3}})
    assert workdir.exists and workdir.read_config() == {"model": {"d_model": 3}}
    assert [path.name for path in workdir.path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("joint", [True, False])
def test_vocabularies_in_a_bucket_can_be_read_back(joint, workdir):
    source, target = ["one two three", "four five"], ["uno due tre", "quattro cinque"]
    vocabularies = VocabularyPair.train(
        source, target, VocabularyConfig(size=24, byte_fallback=False, joint=joint, model_type="char")
    )
    assert not workdir.has_vocabularies()
    workdir.write_vocabularies(vocabularies)
    assert workdir.has_vocabularies()
    assert workdir.read_vocabularies().fingerprint() == vocabularies.fingerprint()


def test_a_folder_comes_to_a_bucket_as_a_whole_and_its_config_last(workdir, monkeypatch):
    copied, copy = [], shutil.copyfileobj

    def note(file, made):
        copied.append(Path(file.name).name)
        copy(file, made)

    def fail(file, made):
        raise OSError("the bucket is full")

    monkeypatch.setattr(shutil, "copyfileobj", note)
    with write_folder(workdir.path) as draft:
        for name in ("a", "config.json", "inner/z"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(name)
        assert not workdir.path.exists()
    assert (workdir.path / "inner" / "z").read_text() == "inner/z"
    assert len(copied) == 3 and copied[-1] == "config.json"
    second = workdir.path.parent / "second"
    with pytest.raises(OSError, match="full"), write_folder(second) as draft:
        (draft / "a").write_text("a")
        monkeypatch.setattr(shutil, "copyfileobj", fail)
    assert not second.exists()


def test_metrics_are_appended_in_a_bucket(workdir):
    assert workdir.read_metrics() == []
    for line in LINES:
        workdir.append_metrics(line)
    assert workdir.read_metrics() == LINES
    assert [path.name for path in workdir.path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture(params=["bucket", "folder"])
def anywhere(request, workdir, tmp_path):
    """The one in the bucket, and one in a folder."""
    if request.param == "bucket":
        return workdir
    local = WorkDirectory(tmp_path / "runs" / "first")
    local.path.mkdir(parents=True)
    assert not local.is_remote
    return local


@pytest.mark.parametrize("left", [b"{", '{"signature": "ಕ'.encode()[:-1], b'{"loss": 2.5', b"\0\0\0\0"])
def test_a_line_that_was_cut_off_does_not_affect_others(left, anywhere):
    anywhere.append_metrics(LINES[0])
    file = anywhere.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + left)
    assert anywhere.read_metrics() == LINES[:1]
    for line in LINES:
        anywhere.append_metrics(line)
    assert anywhere.read_metrics() == [LINES[0], *LINES]


def test_a_line_that_lost_only_its_line_end_is_kept(anywhere):
    anywhere.append_metrics(LINES[0])
    file = anywhere.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    anywhere.append_metrics(LINES[1])
    assert anywhere.read_metrics() == LINES and file.read_bytes().count(b"\n") == 2


def test_numbers_that_json_cannot_represent_become_null(anywhere):
    anywhere.append_metrics({"loss": math.nan, "rate": math.inf, "norms": {"all": [-math.inf, 0.1]}})
    assert anywhere.read_metrics() == [{"loss": None, "rate": None, "norms": {"all": [None, 0.1]}}]
    assert b"N" not in (anywhere.path / "metrics.jsonl").read_bytes()


def test_orbax_gets_the_path_in_the_bucket_unchanged(workdir, monkeypatch):
    paths = []

    class Manager:
        def __init__(self, directory, *arguments, **options):
            paths.append(directory)

        def all_steps(self):
            return []

        def close(self):
            pass

    monkeypatch.setattr(ocp, "CheckpointManager", Manager)
    with workdir.open_checkpoints():
        pass
    assert list(map(str, paths)) == ["gs://bucket/runs/first/checkpoints"]


SPEED = {"fill_rate": 0.9, "input_wait": 0.0, "step_seconds_p50": 0.1, "step_seconds_p95": 0.1}
METRICS = {"loss": 2.5, "tokens_per_second": 1.0, "skipped": 0} | SPEED


def events_of(workdir):
    """The bytes of TensorBoard's one file."""
    (file,) = (workdir.path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    return file.read_bytes()


def test_tensorboard_events_are_written_to_local_and_remote_work_directories(anywhere):
    with Report(anywhere, first_step=0, steps=1) as report:
        report.training(1, METRICS)
        report.checkpoint(1, 0.5)
    assert b"train/smoothed_loss" in events_of(anywhere) and b"checkpoint/blocked_seconds" in events_of(anywhere)


@pytest.fixture
def allow_events(anywhere, monkeypatch):
    """Prevents events from being written until the returned function is called."""
    write_bytes, allowed = type(anywhere.path).write_bytes, threading.Event()

    def refuse(path, content):
        if "tensorboard" in path.parts and not allowed.is_set():
            raise OSError("No space\nleft")
        return write_bytes(path, content)

    monkeypatch.setattr(type(anywhere.path), "write_bytes", refuse)
    return allowed.set


def report_many(report):
    """Writes more than tensorboardX's queue holds, on its own thread, which must finish."""
    thread = threading.Thread(target=lambda: [report.training(step, METRICS) for step in range(1, 41)], daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"


def test_events_that_cannot_be_written_do_not_block_and_are_written_later(anywhere, allow_events):
    with pytest.warns(UserWarning, match="TensorBoard lags behind .* No space left$") as caught:
        with Report(anywhere, first_step=0, steps=40) as report:
            report_many(report)
            for _ in range(2):
                report._events.flush()
            allow_events()
    assert len(caught) == 1 and str(caught[0].message).startswith(f"{anywhere.path}/tensorboard: ")
    assert events_of(anywhere).count(b"train/smoothed_loss") == 40 and len(anywhere.read_metrics()) == 40


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_events_that_can_never_be_written_do_not_end_training(action, anywhere, allow_events):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with Report(anywhere, first_step=0, steps=40) as report:
            report_many(report)
    assert len(anywhere.read_metrics()) == 40


def test_lines_that_could_not_be_written_to_a_bucket_come_with_the_next_one(workdir, monkeypatch):
    workdir.append_metrics(LINES[0])
    with monkeypatch.context() as failing:
        failing.setattr(type(workdir.path), "write_bytes", lambda path, content: 1 / 0)
        with pytest.warns(UserWarning, match=r"metrics.jsonl cannot be written \(ZeroDivisionError: .*goes on"):
            workdir.append_metrics({"step": 2})
        workdir.append_metrics({"step": 3})  # no second warning
    assert workdir.read_metrics() == LINES[:1]
    workdir.append_metrics(LINES[1])
    assert workdir.read_metrics() == [LINES[0], {"step": 2}, {"step": 3}, LINES[1]]


def test_lines_that_could_not_be_written_at_all_are_an_error_at_the_end(workdir, monkeypatch):
    with monkeypatch.context() as failing:
        failing.setattr(type(workdir.path), "write_bytes", lambda path, content: 1 / 0)
        for line in LINES:
            with contextlib.suppress(UserWarning):
                workdir.append_metrics(line)
        with pytest.raises(OSError, match=r"the last 2 lines of gs://.*metrics.jsonl could not be written"):
            workdir.finish_metrics()
    workdir.finish_metrics()
    assert workdir.read_metrics() == LINES
    workdir.finish_metrics()
    assert workdir.read_metrics() == LINES


def test_an_average_whose_notes_cannot_be_read_may_be_of_later_steps(tmp_path):
    workdir = WorkDirectory(tmp_path)
    with workdir._open_averages(read_only=False) as averages:
        averages.save(1, {"params": {"kernel": np.zeros(3, np.float32)}}, {"steps": [2, 1]})
    assert workdir.averages_after(1) and not workdir.averages_after(2)
    (tmp_path / "averaged" / "1" / "notes" / "metadata").write_bytes(b"")
    assert workdir.averages_after(2)


def test_something_damaged_in_a_bucket_is_moved_aside(workdir):
    for content in (b"first", b"second"):
        (workdir.path / "averaged" / "1" / "notes").write_bytes(content)
        with pytest.warns(UserWarning, match="it was moved to gs://bucket/runs/first/damaged"):
            workdir.set_average_aside(3)
        assert not (workdir.path / "averaged").exists()
    moved = [workdir.path / "damaged" / f"averaged-{number}" / "1" / "notes" for number in (1, 2)]
    assert [path.read_bytes() for path in moved] == [b"first", b"second"]
