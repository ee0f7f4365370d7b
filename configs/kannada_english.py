"""Kannada to English, and back, from text files: the Bible, children's stories, and the texts of user interfaces.

    python train.py --config=configs/kannada_english.py:five_layer --workdir=runs/kannada
    python train.py --config=configs/kannada_english.py:small --workdir=runs/kannada_small
    python train.py --config=configs/kannada_english.py:small_to_kannada --workdir=runs/to_kannada
    python train.py --config=configs/kannada_english.py:small_with_bt --workdir=runs/kannada_with_bt

`five_layer` is the tutorial's model (5+5 layers, 512, 8 heads, d_ff = 3 * d_model = 1536), for a GPU or TPU; `small`
has four layers of 128 and the norm before each sub-layer, for a CPU, and `small_to_kannada` is the same for the other
direction. `small_with_bt` is `small` with back-translations of English sentences from Tatoeba, `kannada_bt/train.kn`
and `.en` beside the folder, made by `small_to_kannada` as docs/quality.md tells, and with more updates, so that it sees
the other text as often. A folder may follow the name: `kannada_english.py:small,/path/to/kannada`. It holds `bible/`,
`storyweaver/` and `interface/`, each with `train`, `valid` and `test` in `.kn` and `.en`, one sentence a line; the
stories are few and appear three times an epoch. The test at the end of a training is that of the Bible; the others are
scored by

    python -m flax_transformer evaluate --workdir=runs/kannada_small --beam_size=5 --length_penalty=length --alpha=1 \\
        --source=data/kannada/interface/test.kn --reference data/kannada/interface/test.en

The texts are not distributed with this library. The Bible is FreeBiblesIndia's in Kannada (CC BY-SA 4.0) and the World
English Bible (public domain): 29,604 verses to train, and whole books held out. The stories are StoryWeaver's (CC BY
4.0; the repository global-asp/pb-source, commit 9ea530d): 3,839 sentences, and whole stories held out. The 107,177
texts of user interfaces are of Android, Chromium, GNOME, LibreOffice, Mozilla, MediaWiki, CLDR and others, gathered on
2026-11-28 from public repositories and Debian packages, with whole files held out; nobody proof-read them.

The result of `small` (seed 0, one run, 2.9 hours on two cores of an AMD EPYC): BLEU 8.7 and chrF 28.5 on the Bible's
test set (750 verses of books held out), 4.2 and 21.2 on that of the stories (230 sentences of stories held out), and
22.9 and 52.6 on that of the interfaces (1,000 texts), with a beam of 5 and a length penalty of length^1, which were
chosen on the three validation sets together: there BLEU and chrF are 12.7 and 33.9, with length^0.8 12.1 and 32.4, with
length^1.1 12.0 and 34.2, with length^1.4 8.0 and 33.8 (translations become too long), with the paper's penalty and
alpha 1 12.2 and 32.4, and with greedy search 11.3 and 32.5. docs/results.md has the learning curve. The `small` before
this one (3,000 steps on the Bible and the stories alone, a vocabulary of 4,000 without bytes; seed 0, one run) had BLEU
5.5 and chrF 24.6 on the Bible, and 2.0 and 16.5 on the stories.

The result of `small_to_kannada` (seed 0, one run, 1.7 hours on two cores of an Intel Xeon): BLEU 1.9 and chrF 25.7 on
the Bible's test set, 1.8 and 22.1 on that of the stories, and 14.7 and 51.7 on that of the interfaces. A word of
Kannada carries what English says in several, and BLEU counts whole words only, so chrF says more. The search, a beam of
5 and length^1.2, was chosen by chrF on the three validation sets together: there BLEU and chrF are 7.3 and 34.1, with
length^0.8 7.5 and 30.2, with length^1 7.9 and 33.1, with length^1.4 5.3 and 34.2 (no better by chrF and much worse by
BLEU), with the paper's penalty and alpha 1 7.1 and 28.3, and with greedy search 7.1 and 31.8.

The result of `small_with_bt` (seed 0, one run, 2.1 hours on two cores of an Intel Xeon that other programs used too):
BLEU 7.8 and chrF 27.5 on the Bible's test set, 4.9 and 22.3 on that of the stories, and 21.3 and 51.3 on that of the
interfaces, with the search of `small`. There BLEU and chrF are 11.4 and 32.9 on the three validation sets together,
with length^0.8 10.6 and 31.1, with length^1.1 10.8 and 33.3. So the stories gained by the back-translations and the
rest lost: 126,387 sentences of Tatoeba, of which `clean` left 125,636, were translated by `small_to_kannada`, whose
samples often miss the meaning. `five_layer`: not run.
"""

import dataclasses

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


def get_config(choice: str = "five_layer") -> ConfigDict:
    """The experiment.

    Args:
        choice: "five_layer", "small", "small_to_kannada" or "small_with_bt", and after a comma the folder of the text
            files.
    """
    preset, _, folder = choice.partition(",")
    folder = folder or "data/kannada"
    swap = "?swap" if preset == "small_to_kannada" else ""

    def files(part: str, split: str) -> str:
        return f"files:{folder}/{part}/{split}.kn,{folder}/{part}/{split}.en{swap}"

    def all_parts(split: str, stories: str = "") -> str:
        return f"{files('bible', split)} + {stories}{files('storyweaver', split)} + {files('interface', split)}"

    data = DataConfig(
        train=all_parts("train", stories="3*"),
        valid=all_parts("valid"),
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
        model=TransformerConfig.tiny(norm="pre", d_ff=3 * 128, dropout_rate=0.1, max_length=128),
        vocabulary=VocabularyConfig(size=6000),
        # BPE-dropout makes sources longer than their translations.
        data=dataclasses.replace(data, source_slots=160, source_sampling=0.1),
        training=TrainingConfig(
            steps=13_000,
            weights="averaged",
            schedule=ScheduleConfig(name="cosine", learning_rate=2e-3, warmup_steps=800),
            evaluation=EvaluationConfig(every=1000, beam_size=1, best_metric="chrf"),
            checkpoints=CheckpointsConfig(every=250, keep_latest=10, average_last=10),
        ),
    )
    back_translations = f"files:{folder}_bt/train.kn,{folder}_bt/train.en?tag=<bt>"
    with_bt = dataclasses.replace(
        small,
        data=dataclasses.replace(small.data, train=f"{small.data.train} + {back_translations}"),
        training=dataclasses.replace(small.training, steps=17_000),
    )
    experiments = {"five_layer": five_layer, "small": small, "small_to_kannada": small, "small_with_bt": with_bt}
    if preset not in experiments:
        raise ValueError(f"kannada_english.py:{preset} is unknown: choose one of {', '.join(experiments)}")
    return ConfigDict(experiments[preset].to_mapping())
