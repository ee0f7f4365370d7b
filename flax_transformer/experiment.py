"""Takes the settings of one experiment, section by section, and leaves one `Experiment` that every other room reads.

An experiment is four sections: `model` (config.py), `vocabulary`, `data` and `training`. A file in `configs/` builds
one, the command line changes single values of it, and the work directory keeps it as `config.json`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.ranges import (
    ALPHA,
    AT_LEAST_NONE,
    AT_LEAST_ONE,
    BEAM_SIZE,
    COUNT,
    SEED,
    SHARE,
    SIZE,
    Range,
    check,
    setting,
)

# The names of sacrebleu, which is not loaded to check them, and "auto".
TOKENIZERS = (
    "auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none", "spm", "flores101", "flores200", "spBLEU-1K"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """How the SentencePiece vocabulary is trained on first use.

    Attributes:
        size: number of pieces; of each side when they are not joint.
        joint: one vocabulary for both languages (section 5.1), or one a side.
        model_type: "bpe" (the paper's for English-German), "unigram" or "char".
        split_digits: whether each digit is a piece of its own, so that numbers are spelled, not memorised.
        character_coverage: share of the text's characters that get a piece; the rest become the unknown piece.
        max_sentences: how many sentences training reads; a seeded sample where the text has more.
        seed: of that sample.
    """

    size: int = setting(8000, SIZE)
    joint: bool = True
    model_type: str = setting("bpe", ("bpe", "unigram", "char"))
    split_digits: bool = False
    character_coverage: float = setting(1.0, Range(at_least=0.98, at_most=1))
    max_sentences: int = setting(1_000_000, AT_LEAST_ONE)
    seed: int = setting(0, SEED)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "vocabulary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which sentence pairs there are, and how a batch is laid out.

    A corpus is named by a string that `flax_transformer.data.corpus.load_corpus` explains, e.g. `files:a.kn,a.en`.

    Attributes:
        train: the training corpus.
        valid: the corpus that is translated and scored during training; may be empty.
        test: the corpus that is translated and scored at the end; may be empty.
        rows: rows in a global batch, whatever the number of devices.
        source_slots: tokens in a row on the source side; several sentences are packed into one row.
        target_slots: tokens in a row on the target side.
        seed: of the packing and of the order of rows.
    """

    train: str = ""
    valid: str = ""
    test: str = ""
    rows: int = setting(64, SIZE)
    source_slots: int = setting(64, SIZE)
    target_slots: int = setting(64, SIZE)
    seed: int = setting(0, SEED)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the parameters are found, and how often a person hears of it.

    Attributes:
        steps: number of updates.
        start_from: a work directory whose model training begins with, vocabulary and all; empty for a new one.
        freeze: the parts that keep what they begin with, "embeddings", "encoder" or "embeddings,encoder"; empty for
            none.
        seed: of the parameters and of dropout.
        rng_impl: random bits for dropout, a name that `jax.random.key` takes; "rbg" is meant for TPUs.
        schedule: "paper" (section 5.3), "inverse_sqrt", "cosine", "linear" or "constant", all after a linear warm-up.
        learning_rate: the peak; with "paper" a factor on the paper's own rate.
        warmup_steps: updates until the peak.
        beta1: Adam's decay of the mean (section 5.3).
        beta2: Adam's decay of the squares (section 5.3).
        epsilon: Adam's epsilon (section 5.3).
        weight_decay: decoupled (AdamW), on matrices only; the paper has none.
        clip_norm: the gradient's largest global norm; 0 does not clip.
        label_smoothing: the probability spread over the vocabulary (section 5.4).
        parallelism: "auto" (`pmap` on several devices, `jit` on one), "jit" (the first device alone), "pmap", or `jit`
            over a mesh: "data" (parameters whole on each device), "fsdp" (each device keeps a part of them), or the
            sizes of both, e.g. "data=2,fsdp=4".
        rows_per_device: the most rows that a device takes at once; more are taken in micro-batches, whose gradients are
            summed before they are divided, so that the update is the same. 0 takes all at once.
        loss_chunks: into how many parts the target slots are divided for the loss, so that the logits of one part at a
            time are in memory; worth it for a large vocabulary.
        max_skipped: so many updates in a row may be left out because the loss or the gradient is not finite; then
            training stops.
        ema_decay: of an exponential moving average of the parameters, e.g. 0.999; 0 keeps none.
        weights: which of its parameters a model is evaluated and translates with: "trained", "ema" (of
            `ema_decay`) or "averaged" (the mean of checkpoints, made when training ends; until then "trained").
        average_last: with "averaged", the number of newest checkpoints whose mean is taken; this or `average_best`.
        average_best: with "averaged", the number of best checkpoints whose mean is taken.
        log_every: updates between two lines of metrics.
        evaluate_every: updates between two scorings of the validation corpus; 0 never.
        checkpoint_every: updates between two checkpoints; one is written at each evaluation and at the end too.
        keep_latest: how many of the newest checkpoints are kept.
        keep_best: how many of the best checkpoints are kept.
        patience: training ends early after so many evaluations without a better `best_metric`; 0 never.
        best_metric: "bleu", "chrf", "exact_match" (more is better) or "loss" (less), on the validation corpus.
        tokenize: sacrebleu's tokeniser for BLEU, e.g. "13a", "zh", "ja-mecab" or "char"; "auto" chooses it by the
            script of the references, once, and `config.json` keeps what was chosen.
        evaluate_sentences: how many validation sentences are translated; 0 is all.
        beam_size: beam of the translations that are scored; 1 is greedy.
        alpha: exponent of the length penalty (section 6.1).
        samples: how many source, reference and translation triples are shown.
    """

    steps: int = setting(100_000, SIZE)
    start_from: str = ""
    freeze: str = setting("", ("", "embeddings", "encoder", "embeddings,encoder"))
    seed: int = setting(0, SEED)
    rng_impl: str = setting("threefry2x32", ("rbg", "threefry2x32", "unsafe_rbg"))
    schedule: str = setting("paper", ("paper", "inverse_sqrt", "cosine", "linear", "constant"))
    learning_rate: float = setting(1.0, Range(at_least=0, within=Range(at_most=1e6)))
    warmup_steps: int = setting(4000, COUNT)
    beta1: float = setting(0.9, SHARE)
    beta2: float = setting(0.98, SHARE)
    epsilon: float = setting(1e-9, Range(above=0, at_most=1))
    weight_decay: float = setting(0.0, AT_LEAST_NONE)
    clip_norm: float = setting(0.0, AT_LEAST_NONE)
    label_smoothing: float = setting(0.1, SHARE)
    parallelism: str = "auto"
    rows_per_device: int = setting(0, COUNT)
    loss_chunks: int = setting(1, SIZE)
    max_skipped: int = setting(20, AT_LEAST_ONE)
    ema_decay: float = setting(0.0, SHARE)
    weights: str = setting("trained", ("trained", "ema", "averaged"))
    average_last: int = setting(0, AT_LEAST_NONE)
    average_best: int = setting(0, AT_LEAST_NONE)
    log_every: int = setting(50, AT_LEAST_ONE)
    evaluate_every: int = setting(1000, AT_LEAST_NONE)
    checkpoint_every: int = setting(500, AT_LEAST_ONE)
    keep_latest: int = setting(3, AT_LEAST_ONE)
    keep_best: int = setting(1, AT_LEAST_ONE)
    patience: int = setting(0, AT_LEAST_NONE)
    best_metric: str = setting("bleu", ("bleu", "chrf", "exact_match", "loss"))
    tokenize: str = setting("auto", TOKENIZERS)
    evaluate_sentences: int = setting(0, AT_LEAST_NONE)
    beam_size: int = setting(1, BEAM_SIZE)
    alpha: float = setting(0.6, ALPHA)
    samples: int = setting(5, AT_LEAST_NONE)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training")
        if not re.fullmatch(r"auto|jit|pmap|data|fsdp|data=[1-9]\d*|(data=[1-9]\d*,)?fsdp=[1-9]\d*", self.parallelism):
            raise ValueError(
                f"training.parallelism is {self.parallelism!r}: choose auto, jit, pmap, data, fsdp, or the sizes of a "
                'mesh such as "data=2,fsdp=4"'
            )
        self._check_weights()

    def _check_weights(self) -> None:
        if self.weights == "ema" and not self.ema_decay:
            raise ValueError("training.weights is ema, but training.ema_decay is 0: set it, e.g. 0.999")
        counts = {"last": self.average_last, "best": self.average_best}
        if (self.weights == "averaged") != (len([count for count in counts.values() if count]) == 1):
            raise ValueError(
                f"training.weights is {self.weights}, average_last {self.average_last} and average_best "
                f"{self.average_best}: for the mean of checkpoints set weights to averaged and one of the two; "
                "else leave both at 0"
            )
        for kind, kept in (("last", self.keep_latest), ("best", self.keep_best)):
            if counts[kind] > kept:
                setting = "keep_latest" if kind == "last" else "keep_best"
                raise ValueError(
                    f"training.average_{kind} is {counts[kind]}, but only {kept} are kept: raise training.{setting}"
                )


def scored_by(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the validation corpus's scores depend on, of those that a training section holds."""
    names = ("evaluate_sentences", "beam_size", "alpha", "tokenize")
    # A tokeniser that was not chosen yet is none that could differ.
    found = {name: training[name] for name in names if training.get(name, "auto") != "auto"}
    # Before their mean is made, checkpoints are scored with the weights that were trained.
    weights = "ema" if training.get("weights") == "ema" else "trained"
    return found | ({"weights": weights} if "weights" in training else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment: the model, its vocabulary, its data and its training."""

    model: TransformerConfig = TransformerConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self):
        """Checks what no section can check alone; raises ValueError naming the mend."""
        if self.data.target_slots % self.training.loss_chunks:
            raise ValueError(
                f"training.loss_chunks is {self.training.loss_chunks}, which does not divide data.target_slots = "
                f"{self.data.target_slots}: set it to a number that does"
            )
        if self.model.tie_embeddings == "three_way" and not self.vocabulary.joint:
            raise ValueError(
                "model.tie_embeddings is three_way, but vocabulary.joint is false: source and target ids would share "
                'vectors without sharing meaning; set model.tie_embeddings to "decoder" or "none"'
            )

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """The experiment as nested dictionaries, as `config.json` and `ml_collections.ConfigDict` hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Experiment":
        """The inverse of `to_mapping`; raises ValueError for an unknown key, naming the nearest one."""
        sections: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        built = {
            name: from_mapping(sections[name], settings, name) if name in sections else settings
            for name, settings in mapping.items()
        }
        return from_mapping(cls, built, "config")
