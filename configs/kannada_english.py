"""Kannada to English from text files: the Bible and children's stories, as the tutorial's five-layer model has it.

    python train.py --config=configs/kannada_english.py:five_layer --workdir=runs/kannada
    python train.py --config=configs/kannada_english.py:small --workdir=runs/kannada-small

`five_layer` is the tutorial's model (5+5 layers, 512, 8 heads, d_ff = 3 * d_model = 1536), for a GPU or TPU; `small`
is the `tiny` preset, for a CPU. A folder may follow the name: `kannada_english.py:small,/path/to/kannada`. It holds
`bible/` and `storyweaver/`, each with `train`, `valid` and `test` in `.kn` and `.en`, one sentence a line; the stories
are few and appear three times an epoch.

`five_layer`: not run.

`small`, seed 0, one run: 3,000 steps (4.3 epochs) in 3,288 s on 2 CPU cores, most of that time
shared with another training; jax 0.10.2, flax 0.12.8, Python 3.11. Greedy search, cased, signature
nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0: BLEU 5.5 and chrF 24.6 on the Bible's test set (750 verses
of books held out), BLEU 2.0 and chrF 16.5 on the stories' (230 sentences of stories held out). It has learned the tone
of the texts and little of their meaning; validation loss was still falling.
The second set was translated from the work directory:

    python -m flax_transformer translate --workdir=runs/kannada-small --beam_size=1 \\
        --input=data/kannada/storyweaver/test.kn > stories.en
    sacrebleu data/kannada/storyweaver/test.en -i stories.en -m bleu chrf
"""

import dataclasses

from ml_collections import ConfigDict

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    ScheduleConfig,
    TrainingConfig,
    VocabularyConfig,
)


def get_config(choice: str = "five_layer") -> ConfigDict:
    """The experiment.

    Args:
        choice: "five_layer" or "small", and after a comma the folder of the text files.
    """
    preset, _, folder = choice.partition(",")
    folder = folder or "data/kannada"

    def files(part: str, split: str) -> str:
        return f"files:{folder}/{part}/{split}.kn,{folder}/{part}/{split}.en"

    data = DataConfig(
        train=f"{files('bible', 'train')} + 3*{files('storyweaver', 'train')}",
        valid=f"{files('bible', 'valid')} + {files('storyweaver', 'valid')}",
        test=files("bible", "test"),
        rows=16,
        source_slots=128,
        target_slots=128,
    )
    five_layer = Experiment(
        model=TransformerConfig.five_layer(dropout_rate=0.3),
        vocabulary=VocabularyConfig(size=8000),
        data=dataclasses.replace(data, rows=64),
        training=TrainingConfig(
            steps=30_000, schedule=ScheduleConfig(warmup_steps=4000), evaluation=EvaluationConfig(every=1000)
        ),
    )
    small = Experiment(
        model=TransformerConfig.tiny(norm="pre"),
        vocabulary=VocabularyConfig(size=4000, byte_fallback=False),  # as when its result was measured
        data=data,
        training=TrainingConfig(
            steps=3000,
            schedule=ScheduleConfig(name="cosine", learning_rate=2e-3, warmup_steps=400),
            evaluation=EvaluationConfig(every=1000),
        ),
    )
    experiments = {"five_layer": five_layer, "small": small}
    if preset not in experiments:
        raise ValueError(f"kannada_english.py:{preset} is unknown: choose one of {', '.join(experiments)}")
    return ConfigDict(experiments[preset].to_mapping())
