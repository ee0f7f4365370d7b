"""Continues to train a converted model (OPUS-MT, M2M100, NLLB), or any work directory's, on two text files of your own.

    flax-transformer convert from-marian downloads/opus-mt-en-de runs/opus
    python train.py --config=configs/finetune.py:runs/opus --workdir=runs/finetuned

The texts are `data/train.source` and `data/train.target`, and in the same folder those of `valid` and `test`. To use
others, give e.g. `--config.data.train=files:mine.en,mine.de --config.data.valid= --config.data.test=`. Model and
vocabulary are those of the work directory after the colon; the schedule starts from the beginning.
`--config.training.freeze=embeddings`, `=encoder` or `=embeddings,encoder` leaves these parameters unchanged. The
learning rate is much lower than for a new model; a batch has about 4,000 tokens on each side.

M2M100 and NLLB need the languages: `--config.data.source_language=kan_Knda --config.data.target_language=eng_Latn`. For
a language that the model does not know, also name a similar one that it knows, whose embedding its token begins with:
`--config.data.source_language=tcy_Knda --config.data.new_language_like=kan_Knda`.
"""

import dataclasses

from ml_collections import ConfigDict

from flax_transformer.experiment import (
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from flax_transformer.workdir import WorkDirectory


def get_config(folder: str = "runs/opus") -> ConfigDict:
    """The experiment; its model is the one in the folder."""
    model = dataclasses.replace(WorkDirectory(folder).read_model_config(), dropout_rate=0.1)
    corpora = {name: f"files:data/{name}.source,data/{name}.target" for name in ("train", "valid", "test")}
    return ConfigDict(
        Experiment(
            model=model,
            data=DataConfig(**corpora, rows=32, source_slots=128, target_slots=128),
            training=TrainingConfig(
                start_from=folder,
                steps=2000,
                schedule=ScheduleConfig(name="linear", learning_rate=1e-4, warmup_steps=100),
                optimizer=OptimizerConfig(clip_norm=1.0),
                evaluation=EvaluationConfig(every=500, beam_size=1),
                checkpoints=CheckpointsConfig(every=250),
            ),
        ).to_mapping()
    )
