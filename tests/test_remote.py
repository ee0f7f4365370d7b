"""Takes a work directory in a pretended bucket and leaves a verdict: all comes back, and nothing is written locally."""

import math
from unittest import mock

import orbax.checkpoint as ocp
import pytest
from etils import epath
from tensorboardX import record_writer

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.training.report import Report
from flax_transformer.workdir import WorkDirectory
from tests.fake_scheme import fake_bucket

# The second holds what Python, though not JSON, takes for the end of a line.
LINES = [{"kind": "train", "step": 1, "loss": 2.5}, {"kind": "test", "signature": "ಕನ್ನಡ\u2028"}]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A work directory `gs://bucket/runs/first`; the test runs in an empty folder, and must leave it so."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_bucket(tmp_path / "bucket"):
        yield WorkDirectory("gs://bucket/runs/first")
    assert list((tmp_path / "here").iterdir()) == []


def test_the_pretended_bucket_is_as_strict_as_a_real_one(workdir):
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


def test_a_config_in_a_bucket_comes_back(workdir):
    assert workdir.is_remote and not workdir.exists
    workdir.write_config({"model": {"d_model": 3}})
    assert workdir.exists and workdir.read_config() == {"model": {"d_model": 3}}
    assert [path.name for path in workdir.path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("joint", [True, False])
def test_vocabularies_in_a_bucket_come_back(joint, workdir):
    source, target = ["one two three", "four five"], ["uno due tre", "quattro cinque"]
    vocabularies = VocabularyPair.train(source, target, VocabularyConfig(size=24, joint=joint, model_type="char"))
    assert not workdir.has_vocabularies()
    workdir.write_vocabularies(vocabularies)
    assert workdir.has_vocabularies()
    assert workdir.read_vocabularies().fingerprint() == vocabularies.fingerprint()


def test_metrics_in_a_bucket_are_added_to(workdir):
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
def test_a_line_that_was_cut_off_takes_no_other_with_it(left, anywhere):
    anywhere.append_metrics(LINES[0])
    file = anywhere.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + left)
    assert anywhere.read_metrics() == LINES[:1]
    for line in LINES:
        anywhere.append_metrics(line)
    assert anywhere.read_metrics() == [LINES[0], *LINES]


def test_a_line_that_lost_no_more_than_its_end_is_kept(anywhere):
    anywhere.append_metrics(LINES[0])
    file = anywhere.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    anywhere.append_metrics(LINES[1])
    assert anywhere.read_metrics() == LINES and file.read_bytes().count(b"\n") == 2


def test_numbers_that_json_does_not_know_are_null(anywhere):
    anywhere.append_metrics({"loss": math.nan, "rate": math.inf, "norms": {"all": [-math.inf, 0.1]}})
    assert anywhere.read_metrics() == [{"loss": None, "rate": None, "norms": {"all": [None, 0.1]}}]
    assert b"N" not in (anywhere.path / "metrics.jsonl").read_bytes()


def test_orbax_gets_the_path_in_the_bucket_as_it_is(workdir, monkeypatch):
    paths = []

    class Manager:
        def __init__(self, directory, *arguments, **options):
            paths.append(directory)

        def close(self):
            pass

    monkeypatch.setattr(ocp, "CheckpointManager", Manager)
    with workdir.open_checkpoints():
        pass
    assert list(map(str, paths)) == ["gs://bucket/runs/first/checkpoints"]


def report_to(workdir, message):
    with pytest.warns(UserWarning, match=message) as caught, Report(workdir, first_step=0, steps=1) as report:
        report.training(1, {"loss": 2.5, "tokens_per_second": math.inf, "skipped": 0})
    (warning,) = caught
    assert "\n" not in str(warning.message)
    (line,) = workdir.read_metrics()
    assert (line["loss"], line["tokens_per_second"]) == (2.5, None)


@pytest.mark.parametrize(
    ("switch", "scheme", "mend"),
    [
        ("GCS_ENABLED", "gs", r'pip install "flax_transformer\[gcs\]"$'),
        ("S3_ENABLED", "s3", "pip install boto3$"),
        (None, "az", "it is written to gs://, s3:// and local folders$"),
    ],
)
def test_without_the_client_training_goes_on_without_tensorboard(switch, scheme, mend, workdir, monkeypatch):
    if switch is not None:
        monkeypatch.setattr(record_writer, switch, False)
    # Metrics still need a store that can be written to.
    monkeypatch.setattr(WorkDirectory, "_metrics_file", epath.Path("gs://bucket/metrics.jsonl"))
    workdir.path = epath.Path(f"{scheme}://bucket/runs/first")
    report_to(workdir, f"^{scheme}://bucket/runs/first/tensorboard: training goes on without TensorBoard, .*{mend}")


def test_without_credentials_training_goes_on_without_tensorboard(workdir, monkeypatch):
    def refuse(path):
        raise OSError("no project\ncould be determined")

    monkeypatch.setattr(record_writer, "GCS_ENABLED", True)
    monkeypatch.setattr(record_writer.GCSRecordWriterFactory, "open", lambda self, path: refuse(path))
    report_to(workdir, "without TensorBoard, .*: no project could be determined$")


def test_with_the_client_tensorboard_gets_its_events_in_the_bucket(workdir, monkeypatch):
    paths, file = [], mock.Mock(spec=["write", "flush", "close"])

    def open_file(self, path):
        paths.append(path)
        return file

    monkeypatch.setattr(record_writer, "GCS_ENABLED", True)
    monkeypatch.setattr(record_writer.GCSRecordWriterFactory, "open", open_file)
    with Report(workdir, first_step=0, steps=1) as report:
        report.training(1, {"loss": 2.5, "tokens_per_second": 1.0, "skipped": 0})
    (path,) = paths
    assert path.startswith("gs://bucket/runs/first/tensorboard/events.out.tfevents.")
    assert b"train/loss" in b"".join(call.args[0] for call in file.write.call_args_list) and file.close.called
