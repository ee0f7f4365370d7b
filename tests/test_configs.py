import ast
import dataclasses
import operator
import re
import runpy
from pathlib import Path

import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import EvaluationConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainingConfig
from flax_transformer.workdir import WorkDirectory

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
COMMAND = re.compile(r"python train\.py --config=(configs/\w+\.py)(?::(\S+))? --workdir=\S+")


def commands_of(file):
    """The launch commands in a config's docstring: the file that each names, and what follows its colon."""
    return COMMAND.findall(ast.get_docstring(ast.parse(file.read_text())))


def experiments_of(file):
    """The experiment of each launch command."""
    get_config = runpy.run_path(str(file))["get_config"]
    configs = [get_config(choice) if choice else get_config() for _, choice in commands_of(file)]
    return [Experiment.from_mapping(config.to_dict()) for config in [get_config(), *configs]]


@pytest.fixture(autouse=True)
def converted(tmp_path, monkeypatch):
    """The work directory that a config may start from, under its name in the docstrings."""
    monkeypatch.chdir(tmp_path)
    model = TransformerConfig(source_vocab_size=50, target_vocab_size=50, max_length=512)
    WorkDirectory("runs/opus").write_config({"model": dataclasses.asdict(model)})


every_config = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@every_config
def test_the_docstring_of_a_config_has_the_command_that_runs_it(file):
    assert commands_of(file), "no line `python train.py --config=configs/NAME.py --workdir=...` in the docstring"
    assert {name for name, _ in commands_of(file)} == {f"configs/{file.name}"}


@every_config
def test_a_config_is_a_complete_experiment(file):
    for experiment in experiments_of(file):
        assert experiment.data.train and experiment.data.valid and experiment.data.test
        assert experiment.training.schedule.warmup_steps < experiment.training.steps
        assert 0 < experiment.training.evaluation.every <= experiment.training.steps
        assert experiment.model.max_length >= experiment.data.target_slots  # a sentence may fill its row


@pytest.mark.parametrize(
    ("name", "preset", "steps", "checkpoints"),
    [("wmt14_en_de_base", "base", 100_000, 5), ("wmt14_en_de_big", "big", 300_000, 20)],
)
def test_wmt14_has_the_paper_s_hyperparameters(name, preset, steps, checkpoints):
    (file,) = (file for file in FILES if file.stem == name)
    for experiment in experiments_of(file):
        assert experiment.model == getattr(TransformerConfig, preset)(dtype=experiment.model.dtype)
        assert experiment.vocabulary.joint and experiment.vocabulary.size == 37_000  # section 5.1
        data, training = experiment.data, experiment.training
        for slots in (data.source_slots, data.target_slots):  # about 25,000 tokens on each side (section 5.1)
            assert 20_000 < data.rows * slots < 30_000
        paper = TrainingConfig(
            steps=steps,
            schedule=ScheduleConfig(name="paper", learning_rate=1.0, warmup_steps=4000),
            optimizer=OptimizerConfig(beta1=0.9, beta2=0.98, epsilon=1e-9),
            label_smoothing=0.1,
            evaluation=EvaluationConfig(beam_size=4, alpha=0.6),
        )
        assert training.schedule == paper.schedule and training.optimizer == paper.optimizer
        for field in ("steps", "label_smoothing", "evaluation.beam_size", "evaluation.alpha"):
            assert operator.attrgetter(field)(training) == operator.attrgetter(field)(paper), field
        assert training.checkpoints.keep_latest == checkpoints  # those that are averaged (section 6.1)
