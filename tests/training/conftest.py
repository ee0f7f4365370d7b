"""Provides a tiny experiment, and functions that read what its training has recorded in the work directory."""

import dataclasses
import random

import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import (
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    ParallelismConfig,
    ScheduleConfig,
    TrainingConfig,
    VocabularyConfig,
)
from flax_transformer.workdir import WorkDirectory

DIGITS = "zero one two three four five six seven eight nine".split()
STEPS, EVERY = 12, 5


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """Digits in words to the same words in reverse order, a model that is trained in a moment, and dropout."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for split, pairs in (("train", 40), ("valid", 4), ("test", 4)):
        sentences = [rng.choices(DIGITS, k=rng.randint(1, 2)) for _ in range(pairs)]
        (folder / f"{split}.in").write_text("".join(" ".join(words) + "\n" for words in sentences))
        (folder / f"{split}.out").write_text("".join(" ".join(reversed(words)) + "\n" for words in sentences))
    corpora = {split: f"files:{folder}/{split}.in,{folder}/{split}.out" for split in ("train", "valid", "test")}
    return Experiment(
        model=TransformerConfig(
            d_model=8, num_heads=2, d_ff=12, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.2, max_length=12
        ),
        vocabulary=VocabularyConfig(size=50, byte_fallback=False),
        data=DataConfig(**corpora, rows=4, source_slots=12, target_slots=12),
        training=TrainingConfig(
            steps=STEPS,
            schedule=ScheduleConfig(warmup_steps=4),
            parallelism=ParallelismConfig(layout="jit"),
            log_every=1,
            evaluation=EvaluationConfig(every=0, best_metric="loss", samples=2),
            checkpoints=CheckpointsConfig(every=EVERY),
        ),
    )


def with_training(experiment, **changes):
    """The experiment with other settings of training, named within it: `steps`, or `**{"schedule.name": ...}`."""
    return experiment.changed({f"training.{name}": value for name, value in changes.items()})


def without_held_out(experiment):
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, valid="", test=""))


def lines_of(path, kind):
    return [line for line in WorkDirectory(path).read_metrics() if line["kind"] == kind]


def losses_of(path):
    """The loss of each step; both losses if a step was made twice."""
    return [(line["step"], line["loss"]) for line in lines_of(path, "train")]
