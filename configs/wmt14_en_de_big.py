"""The paper's big model on WMT 2014 English-German, with its hyperparameters (sections 5 and 6, table 3).

    python train.py --config=configs/wmt14_en_de_big.py --workdir=runs/wmt14-big

It needs what `wmt14_en_de_base.py` needs, and more memory. The paper reports BLEU 28.4 on newstest2014 after 300,000
steps, 3.5 days on 8 P100 GPUs, from the mean of the last twenty checkpoints (here `training.weights`), with beam 4 and
alpha 0.6.

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
            model=TransformerConfig.big(dtype="bfloat16"),
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
                steps=300_000,
                schedule=ScheduleConfig(name="paper", warmup_steps=4000),
                rng_impl="rbg",
                evaluation=EvaluationConfig(every=5000, beam_size=4),
                checkpoints=CheckpointsConfig(every=1000, keep_latest=20, average_last=20),
                weights="averaged",
            ),
        ).to_mapping()
    )
