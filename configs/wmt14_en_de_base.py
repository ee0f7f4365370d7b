"""The paper's base model on WMT 2014 English-German, with its hyperparameters (sections 5 and 6, table 3).

    python train.py --config=configs/wmt14_en_de_base.py --workdir=runs/wmt14-base

It needs the TFDS data set `wmt14_translate/de-en` (prepared on first use where there is a network), and TPUs or GPUs,
on one host or more, with room for 25,000 source and 25,000 target tokens a batch. The paper reports BLEU 27.3 on
newstest2014 after 100,000 steps, 12 hours on 8 P100 GPUs, from the mean of the last five checkpoints (here
`training.weights`), with beam 4 and alpha 0.6.

Not run.
"""

from ml_collections import ConfigDict

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import (
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    ScheduleConfig,
    TrainingConfig,
    VocabularyConfig,
)

CORPUS = "tfds:wmt14_translate/de-en:{split}?source=en&target=de"


def get_config() -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        Experiment(
            model=TransformerConfig.base(dtype="bfloat16"),
            vocabulary=VocabularyConfig(size=37_000, max_sentences=2_000_000),
            data=DataConfig(
                train=CORPUS.format(split="train"),
                valid=CORPUS.format(split="validation"),
                test=CORPUS.format(split="test"),
                # About 25,000 tokens on each side (section 5.1).
                rows=104,
                source_slots=256,
                target_slots=256,
            ),
            training=TrainingConfig(
                steps=100_000,
                schedule=ScheduleConfig(name="paper", warmup_steps=4000),
                rng_impl="rbg",
                evaluation=EvaluationConfig(every=5000, beam_size=4),
                checkpoints=CheckpointsConfig(every=1000, keep_latest=5, average_last=5),
                weights="averaged",
            ),
        ).to_mapping()
    )
