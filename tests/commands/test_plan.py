"""`plan` shows the memory and time of a training step, and reports a mistake in one line."""

import subprocess
import sys

import pytest

from flax_transformer.commands.plan import _hours


def plan(*arguments):
    command = [sys.executable, "-m", "flax_transformer", "plan", "--config=configs/quickstart.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_plan_shows_memory_collectives_and_verdict():
    small = ["model.d_model=16", "model.num_encoder_layers=1", "model.num_decoder_layers=1", "data.rows=10"]
    done = plan("--topology=cpu:4", "--parallel=data=2,fsdp=2", *(f"--config.{change}" for change in small))
    assert done.returncode == 0, done.stderr
    head, what, *lines = [line for line in done.stdout.splitlines() if line]
    assert head == "cpu:4: 4 devices of kind cpu" and what.endswith("rows of 64 source and 64 target slots")
    mesh = "jit over a mesh of 2 data x 2 fsdp on 4 cpu devices"
    assert lines[1] == f"as the config says: {mesh}, 12 rows a step (2 of them empty)"
    for word in ("memory a device", "state and batch", "temporaries", "floating point", "gradient", "all-reduce"):
        assert any(line.strip().startswith(word) for line in lines)
    assert lines[-1].endswith("device memory is unknown, so whether it fits cannot be checked")


def test_hours_and_costs_are_those_of_all_steps():
    assert _hours(300_000, 0.1304, None) == "300,000 steps     at least 10.9 hours"
    assert _hours(36_000, 0.1, 4.8).endswith("at least 1.0 hours, which cost 4.80 at 4.8 an hour")


@pytest.mark.slow
def test_a_known_vocabulary_size_is_kept():
    small = ["model.d_model=16", "model.num_encoder_layers=1", "model.num_decoder_layers=1", "data.rows=2"]
    counts = []
    for sizes in (["vocabulary.size=500"], ["model.source_vocab_size=90", "model.target_vocab_size=90"]):
        done = plan("--topology=cpu:1", *(f"--config.{change}" for change in [*small, *sizes]))
        counts.append(int(done.stdout.splitlines()[1].partition(" ")[0].replace(",", "")))
    assert counts[0] - counts[1] == 16 * (500 - 90)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=cpu:0"], "give cpu:N"),
        (["--topology=cpu:1", "--price_per_hour=-1"], "--price_per_hour: '-1': give a number, at least 0"),
        (["--topology=cpu:4", "--parallel=data=3"], "which needs 3 devices, but there are 4"),
        (["--topology=cpu:2", "--parallel=both"], "choose auto, jit, pmap"),
        (["--topology=cpu:2", "--config.data.row=4"], "data.rows"),
        (["--topology=cpu:2", "--config=configs/none.py"], "configs/none.py"),
        (["--topology=cpu:2", "--config.data.rows=many"], "data.rows is 'many'"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(fail, monkeypatch, arguments, message):
    for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):  # `plan` sets them for its process
        monkeypatch.setenv(name, "3")
    assert message in fail("plan", "--config=configs/quickstart.py", *arguments)
