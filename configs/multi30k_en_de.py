"""English to German on Multi30k."""

from ml_collections import ConfigDict

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import DataConfig, Experiment, TrainingConfig, VocabularyConfig


def get_config(folder: str = "data/multi30k/raw") -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        Experiment(
            model=TransformerConfig.tiny(norm="pre"),
            vocabulary=VocabularyConfig(size=4000),
            data=DataConfig(
                train=f"files:{folder}/train.en,{folder}/train.de",
                valid=f"files:{folder}/val.en,{folder}/val.de",
                test=f"files:{folder}/test_2016_flickr.en,{folder}/test_2016_flickr.de",
                rows=32,
                source_slots=64,
                target_slots=64,
            ),
            training=TrainingConfig(
                steps=5000,
                schedule="cosine",
                learning_rate=2e-3,
                warmup_steps=400,
                evaluate_every=500,
                checkpoint_every=250,
                beam_size=1,
            ),
        ).to_mapping()
    )
