"""Takes the settings of one experiment, section by section, and leaves one `Experiment` that every other room reads.

An experiment is four sections: `model` (config.py), `vocabulary`, `data` and `training`. A file in `configs/` builds
one, the command line changes single values of it, and the work directory keeps it as `config.json`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax_transformer.config import TransformerConfig, from_mapping


def _check_choice(section: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{section}.{name} is {value!r}: choose one of {', '.join(allowed)}")


def _check_at_least(section: str, settings: Any, least: float, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{section}.{name} is {getattr(settings, name)}: it must be at least {least}")


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

    size: int = 8000
    joint: bool = True
    model_type: str = "bpe"
    split_digits: bool = False
    character_coverage: float = 1.0
    max_sentences: int = 1_000_000
    seed: int = 0

    def __post_init__(self):
        """Checks each field; raises ValueError naming the mend."""
        _check_choice("vocabulary", "model_type", self.model_type, ("bpe", "unigram", "char"))
        _check_at_least("vocabulary", self, 1, "size", "max_sentences")


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
    rows: int = 64
    source_slots: int = 64
    target_slots: int = 64
    seed: int = 0

    def __post_init__(self):
        """Checks each field; raises ValueError naming the mend."""
        _check_at_least("data", self, 1, "rows", "source_slots", "target_slots")


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
        evaluate_sentences: how many validation sentences are translated; 0 is all.
        beam_size: beam of the translations that are scored; 1 is greedy.
        alpha: exponent of the length penalty (section 6.1).
        samples: how many source, reference and translation triples are shown.
    """

    steps: int = 100_000
    start_from: str = ""
    freeze: str = ""
    seed: int = 0
    rng_impl: str = "threefry2x32"
    schedule: str = "paper"
    learning_rate: float = 1.0
    warmup_steps: int = 4000
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    label_smoothing: float = 0.1
    parallelism: str = "auto"
    rows_per_device: int = 0
    loss_chunks: int = 1
    max_skipped: int = 20
    ema_decay: float = 0.0
    weights: str = "trained"
    average_last: int = 0
    average_best: int = 0
    log_every: int = 50
    evaluate_every: int = 1000
    checkpoint_every: int = 500
    keep_latest: int = 3
    keep_best: int = 1
    patience: int = 0
    best_metric: str = "bleu"
    evaluate_sentences: int = 0
    beam_size: int = 1
    alpha: float = 0.6
    samples: int = 5

    def __post_init__(self):
        """Checks each field; raises ValueError naming the mend."""
        _check_choice("training", "schedule", self.schedule, ("paper", "inverse_sqrt", "cosine", "linear", "constant"))
        if not re.fullmatch(r"auto|jit|pmap|data|fsdp|data=[1-9]\d*|(data=[1-9]\d*,)?fsdp=[1-9]\d*", self.parallelism):
            raise ValueError(
                f"training.parallelism is {self.parallelism!r}: choose auto, jit, pmap, data, fsdp, or the sizes of a "
                'mesh such as "data=2,fsdp=4"'
            )
        _check_choice("training", "freeze", self.freeze, ("", "embeddings", "encoder", "embeddings,encoder"))
        _check_choice("training", "best_metric", self.best_metric, ("bleu", "chrf", "exact_match", "loss"))
        _check_choice("training", "rng_impl", self.rng_impl, ("rbg", "threefry2x32", "unsafe_rbg"))
        _check_choice("training", "weights", self.weights, ("trained", "ema", "averaged"))
        at_least_one = (
            "steps",
            "loss_chunks",
            "max_skipped",
            "log_every",
            "checkpoint_every",
            "keep_latest",
            "keep_best",
            "beam_size",
        )
        _check_at_least("training", self, 1, *at_least_one)
        at_least_none = ("warmup_steps", "clip_norm", "rows_per_device", "average_last", "average_best")
        _check_at_least("training", self, 0, *at_least_none)
        _check_at_least("training", self, 0, "evaluate_every", "evaluate_sentences", "patience", "samples")
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it must be at least 0 and below 1")
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
