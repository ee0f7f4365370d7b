import pytest

from flax_transformer.monitoring.report import Report, format_score, record_test
from flax_transformer.workdir import WorkDirectory

SCORES = {"loss": 1.23456, "bleu": 31.44, "chrf": 55.06, "exact_match": 97.2}
SPEED = {"fill_rate": 0.94, "input_wait": 0.02, "step_seconds_p50": 0.1, "step_seconds_p95": 0.25}
METRICS = {"loss": 2.5, "cross_entropy": 2.25, "tokens_per_second": 1234.5, "learning_rate": 1e-3, "skipped": 0} | SPEED


def report_to(path, **options):
    workdir = WorkDirectory(path)
    with Report(workdir, first_step=3, steps=9, **options) as report:
        report.step_done()
        report.training(4, METRICS)
        report.checkpoint(4, 0.25)
        report.validation(4, SCORES, 61.4)
        report.validation(8, SCORES, 122.6)
    return workdir


def test_every_measurement_becomes_a_line_of_metrics(tmp_path):
    train, checkpoint, first, second = report_to(tmp_path).read_metrics()
    assert train == {"kind": "train", "step": 4} | METRICS
    assert checkpoint == {"kind": "checkpoint", "step": 4, "blocked_seconds": 0.25}
    assert first == {"kind": "valid", "step": 4, "seconds": 61.4} | SCORES
    assert (second["step"], second["seconds"]) == (8, 122.6)


def test_every_measurement_reaches_tensorboard(tmp_path):
    (events,) = (report_to(tmp_path).path / "tensorboard").glob("events.out.tfevents.*")
    written = events.read_bytes()
    names = ["checkpoint/blocked_seconds", *(f"train/{name}" for name in METRICS if name != "cross_entropy")]
    # The cross-entropy, which can be compared with that of validation; beside it what training minimises.
    assert written.count(b"train/loss") == written.count(b"train/smoothed_loss") == 1
    names += [f"valid/{name}" for name in ("loss", "bleu", "chrf", "exact_match", "seconds")]
    for name in names:
        assert name.encode() in written


def test_scores_and_samples_of_the_test_reach_tensorboard(tmp_path):
    workdir = WorkDirectory(tmp_path)
    record_test(workdir, 8, SCORES | {"sentences": 2}, [("ein | Hund", "a dog", "a\ndog"), ("rot", "red", "read")])
    assert workdir.read_metrics() == [{"kind": "test", "step": 8, "sentences": 2} | SCORES]
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    for name in (
        *(f"test/{name}" for name in SCORES),
        "test/samples",
        "| rot | red | read |",
        r"| ein \| Hund | a dog",
    ):
        assert name.encode() in written


def test_a_silent_report_writes_and_prints_nothing(tmp_path, capfd):
    workdir = report_to(tmp_path / "run", silent=True)
    assert not workdir.path.exists() and capfd.readouterr() == ("", "")


def test_skipped_updates_are_shown(tmp_path, capfd):
    for skipped, told in ((0, False), (3, True)):
        with Report(WorkDirectory(tmp_path), first_step=0, steps=1) as report:
            report.training(1, METRICS | {"skipped": skipped})
            report.step_done()
        assert ("3 updates skipped" in capfd.readouterr().err) == told


def test_the_progress_line_has_no_nan_if_all_updates_were_skipped(tmp_path, capfd):
    nothing = {name: float("nan") for name in ("loss", "tokens_per_second", "fill_rate")}
    with Report(WorkDirectory(tmp_path), first_step=0, steps=1) as report:
        report.training(1, METRICS | nothing | {"skipped": 7})
        report.step_done()
    said = capfd.readouterr().err
    assert "nan" not in said and "7 updates skipped" in said and "step 100 ms" in said


def test_the_progress_line_shows_the_speed_and_the_utilization(tmp_path, capfd):
    with Report(WorkDirectory(tmp_path), first_step=0, steps=1) as report:
        report.training(1, METRICS | {"model_flops_utilization": 0.41, "memory_bytes": 3.14e9})
        report.step_done()
    told = "94% full, 1,234 target tokens/s, 2% waiting for input, step 100 ms, p95 250 ms, 41% of peak, 3.1 GB"
    assert told in capfd.readouterr().err


def test_a_window_without_timed_steps_shows_the_loss_but_no_speed(tmp_path, capfd):
    metrics = {name: METRICS[name] for name in ("loss", "fill_rate", "learning_rate", "skipped")}
    with Report(WorkDirectory(tmp_path), first_step=0, steps=1) as report:
        report.training(1, metrics)
        report.step_done()
    assert "loss 2.500, 94% full]" in capfd.readouterr().err
    assert WorkDirectory(tmp_path).read_metrics() == [{"kind": "train", "step": 1} | metrics]


@pytest.mark.parametrize("failure", [None, KeyError("what ended the training")])
def test_a_closed_terminal_does_not_hide_the_error_that_ended_the_training(failure, tmp_path, monkeypatch):
    def refuse(bar):
        raise BrokenPipeError

    report = Report(WorkDirectory(tmp_path), first_step=0, steps=1)
    monkeypatch.setattr(report._bar, "close", lambda: refuse(report._bar))
    with pytest.raises(BrokenPipeError if failure is None else KeyError), report:
        report.training(1, METRICS)
        if failure is not None:
            raise failure
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_validations_are_rows_of_a_table_with_one_header(tmp_path, capsys):
    report_to(tmp_path)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "time", "loss", "BLEU", "chrF", "exact", "match"]
    assert [row.split() for row in rows] == [
        ["4", "61s", "1.235", "31.4", "55.1", "97.2", "%"],
        ["8", "123s", "1.235", "31.4", "55.1", "97.2", "%"],
    ]
    assert len({len(row) for row in (head, *rows)}) == 1  # columns are aligned with their titles


@pytest.mark.parametrize(
    ("name", "shown"), [("loss", "0.123"), ("bleu", "0.1"), ("chrf", "0.1"), ("exact_match", "0.1 %")]
)
def test_each_score_is_shown_in_its_own_unit(name, shown):
    assert format_score(name, 0.12345) == shown
