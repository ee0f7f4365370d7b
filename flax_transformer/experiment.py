"""The settings of one experiment, `Experiment`, which the rest of the library uses.

An experiment has four sections: `model` (config.py), `vocabulary`, `data` and `training`. A file in `configs/` creates
one, the command line changes single settings of it, and the work directory stores it in `config.json`.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax_transformer.config import TransformerConfig, from_mapping
from flax_transformer.moved_settings import MOVED, by_new_names
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
from flax_transformer.text.symbols import SPECIAL_SYMBOLS, is_free_symbol

# The names of sacrebleu, which is not loaded to check them, and "auto".
TOKENIZERS = (
    "auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none", "spm", "flores101", "flores200", "spBLEU-1K"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """How the SentencePiece vocabulary is trained on first use.

    Attributes:
        size: number of pieces; if not joint, each side has this many.
        joint: whether both languages share one vocabulary (section 5.1).
        model_type: "bpe" (the paper's for English-German), "unigram" or "char".
        split_digits: whether each digit is a piece of its own, so that numbers are spelled, not memorised.
        character_coverage: share of the text's characters that get a piece; others are spelled in bytes, or become the
            unknown piece.
        byte_fallback: whether there are 256 pieces for single bytes, in which a character without a piece is spelled,
            so that every visible character can be read and written.
        user_symbols: texts that are always one piece, e.g. "<br>", beside the tags that `data.train` names.
        normalize: whether composed and decomposed spellings of a character become the same (NFC).
        max_sentences: how many sentences training reads; a random sample if there are more.
        seed: seed of that sample.
    """

    size: int = setting(8000, SIZE)
    joint: bool = True
    model_type: str = setting("bpe", ("bpe", "unigram", "char"))
    split_digits: bool = False
    character_coverage: float = setting(1.0, Range(at_least=0.98, at_most=1))
    byte_fallback: bool = True
    user_symbols: Sequence[str] = ()
    normalize: bool = True
    max_sentences: int = setting(1_000_000, AT_LEAST_ONE)
    seed: int = setting(0, SEED)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "vocabulary")
        for symbol in self.user_symbols:
            if not is_free_symbol(symbol):
                raise ValueError(
                    f"vocabulary.user_symbols has {symbol!r}: give texts without white space and ▁ and ▅, other than "
                    f"{', '.join(SPECIAL_SYMBOLS)} and bytes such as <0x41>"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which sentence pairs there are, and how a batch is laid out.

    A corpus is named by a string that `flax_transformer.data.corpus.load_corpus` explains, e.g. `files:a.kn,a.en`.

    Attributes:
        train: the training corpus.
        valid: the corpus that is translated and scored during training; may be empty.
        test: the corpus that is translated and scored at the end; may be empty.
        source_language: for models of many languages, such as NLLB: that of the source, e.g. "kan_Knda".
        target_language: that of the target.
        new_language_like: if the initial model does not know a language of this training, the new language's embedding
            begins as a copy of this language's embedding, or as the mean of all with "mean".
        temperature: how much of an epoch small corpora of `train` make up. With temperature T, the share of a corpus is
            proportional to (its size times its weight) to the power of 1/T: 1 leaves the shares as they are, and
            larger values make them more equal.
        source_sampling: how much the segmentation of training sources into pieces varies from epoch to epoch; 0 not at
            all. With a "bpe" vocabulary the share of merges that are left out (BPE-dropout), e.g. 0.1. With "unigram"
            the power to which the probabilities of segmentations are raised, e.g. 0.2; the smaller, the more they vary.
        target_sampling: the same of targets.
        rows: number of rows in a global batch, for any number of devices.
        source_slots: tokens in a row on the source side; several sentences are packed into one row. Training leaves out
            pairs with a side that does not fit into a row.
        target_slots: tokens in a row on the target side.
        seed: seed of the packing and of the order of rows.
    """

    train: str = ""
    valid: str = ""
    test: str = ""
    source_language: str = ""
    target_language: str = ""
    new_language_like: str = ""
    temperature: float = setting(1.0, Range(at_least=1, at_most=1000))
    source_sampling: float = setting(0.0, Range(at_least=0, at_most=1))
    target_sampling: float = setting(0.0, Range(at_least=0, at_most=1))
    rows: int = setting(64, SIZE)
    source_slots: int = setting(64, SIZE)
    target_slots: int = setting(64, SIZE)
    seed: int = setting(0, SEED)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate of each update.

    Attributes:
        name: "paper" (section 5.3), "inverse_sqrt", "cosine", "linear" or "constant", all after a linear warm-up.
        learning_rate: the peak; with "paper" the factor by which the paper's own rate is multiplied.
        warmup_steps: updates until the peak.
    """

    name: str = setting("paper", ("paper", "inverse_sqrt", "cosine", "linear", "constant"))
    learning_rate: float = setting(1.0, Range(at_least=0, within=Range(at_most=1e6)))
    warmup_steps: int = setting(4000, COUNT)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training.schedule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a gradient becomes an update, apart from the learning rate.

    Attributes:
        beta1: Adam's decay of the mean (section 5.3).
        beta2: Adam's decay of the squares (section 5.3).
        epsilon: Adam's epsilon (section 5.3).
        weight_decay: decoupled (AdamW), on matrices only; the paper has none.
        clip_norm: the gradient's largest global norm; 0 does not clip.
        ema_decay: decay of an exponential moving average of the parameters, e.g. 0.999; 0 keeps no average.
    """

    beta1: float = setting(0.9, SHARE)
    beta2: float = setting(0.98, SHARE)
    epsilon: float = setting(1e-9, Range(above=0, at_most=1))
    weight_decay: float = setting(0.0, AT_LEAST_NONE)
    clip_norm: float = setting(0.0, AT_LEAST_NONE)
    ema_decay: float = setting(0.0, SHARE)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training.optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How devices share a batch, and in how many parts each processes its share; the result stays the same.

    Attributes:
        layout: "auto" (`pmap` on several devices, `jit` on one), "jit" (the first device alone), "pmap", or `jit`
            over a mesh: "data" (parameters whole on each device), "fsdp" (each device keeps a part of them), or the
            sizes of both, e.g. "data=2,fsdp=4".
        rows_per_device: the largest number of rows that a device processes at once. More rows are processed in
            micro-batches, whose gradients are summed, so that the update is the same. 0 means all at once.
        loss_chunks: the number of parts into which the target slots are divided for the loss, so that only the logits
            of one part are in memory; useful with a large vocabulary.
    """

    layout: str = "auto"
    rows_per_device: int = setting(0, COUNT)
    loss_chunks: int = setting(1, SIZE)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training.parallelism")
        if not re.fullmatch(r"auto|jit|pmap|data|fsdp|data=[1-9]\d*|(data=[1-9]\d*,)?fsdp=[1-9]\d*", self.layout):
            raise ValueError(
                f"training.parallelism.layout is {self.layout!r}: choose auto, jit, pmap, data, fsdp, or the sizes of "
                'a mesh such as "data=2,fsdp=4"'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """When checkpoints are written, which of them are kept, and which are averaged.

    Attributes:
        every: updates between two checkpoints; one is written at each evaluation and at the end too.
        keep_latest: how many of the newest are kept.
        keep_best: how many of the best are kept.
        average_last: with "averaged" weights, the number of newest checkpoints whose mean is taken; set either this or
            `average_best`.
        average_best: with "averaged" weights, the number of best checkpoints whose mean is taken.
    """

    every: int = setting(500, AT_LEAST_ONE)
    keep_latest: int = setting(3, AT_LEAST_ONE)
    keep_best: int = setting(1, AT_LEAST_ONE)
    average_last: int = setting(0, AT_LEAST_NONE)
    average_best: int = setting(0, AT_LEAST_NONE)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training.checkpoints")
        for average, keep in (("average_last", "keep_latest"), ("average_best", "keep_best")):
            wanted, kept = getattr(self, average), getattr(self, keep)
            if wanted > kept:
                raise ValueError(
                    f"training.checkpoints.{average} is {wanted}, but only {kept} are kept: raise "
                    f"training.checkpoints.{keep}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how held-out corpora are translated and scored.

    Attributes:
        every: updates between two scorings of the validation corpus; 0 means that it is never scored.
        sentences: how many validation sentences are translated; 0 means all.
        beam_size: beam size of the search whose translations are scored; 1 is greedy search.
        alpha: exponent of the length penalty (section 6.1).
        tokenize: sacrebleu's tokeniser for BLEU, e.g. "13a", "zh", "ja-mecab" or "char"; "auto" chooses it by the
            script of the references, once, and `config.json` keeps what was chosen.
        best_metric: "bleu", "chrf", "exact_match" (more is better) or "loss" (less), on the validation corpus.
        patience: training ends early after this many evaluations in a row without a better `best_metric`; 0 means that
            it does not end early.
        samples: how many source, reference and translation triples are shown.
    """

    every: int = setting(1000, AT_LEAST_NONE)
    sentences: int = setting(0, AT_LEAST_NONE)
    beam_size: int = setting(1, BEAM_SIZE)
    alpha: float = setting(0.6, ALPHA)
    tokenize: str = setting("auto", TOKENIZERS)
    best_metric: str = setting("bleu", ("bleu", "chrf", "exact_match", "loss"))
    patience: int = setting(0, AT_LEAST_NONE)
    samples: int = setting(5, AT_LEAST_NONE)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training.evaluation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        steps: number of updates.
        start_from: the work directory of a model with which training starts, vocabulary included; empty for a new
            model.
        freeze: the parts that do not change, "embeddings", "encoder" or "embeddings,encoder"; empty for none.
        seed: seed of the initial parameters and of dropout.
        rng_impl: the generator of random bits, by its name in `jax.random.key`; "rbg" is meant for TPUs.
        label_smoothing: the probability spread over the vocabulary (section 5.4).
        max_skipped: how many updates in a row may be skipped because the loss or the gradient is not finite before
            training stops.
        weights: the parameters with which a model is evaluated and translates: "trained", "ema" (the moving average
            of `optimizer.ema_decay`) or "averaged" (the mean of checkpoints, made when training ends; until then
            "trained").
        log_every: number of updates between two lines of metrics.
        schedule: the learning rate.
        optimizer: Adam, weight decay, clipping and the moving average.
        parallelism: how devices share a batch.
        checkpoints: when they are written, and which are kept.
        evaluation: when and how held-out corpora are scored.
    """

    steps: int = setting(100_000, SIZE)
    start_from: str = ""
    freeze: str = setting("", ("", "embeddings", "encoder", "embeddings,encoder"))
    seed: int = setting(0, SEED)
    rng_impl: str = setting("threefry2x32", ("rbg", "threefry2x32", "unsafe_rbg"))
    label_smoothing: float = setting(0.1, SHARE)
    max_skipped: int = setting(20, AT_LEAST_ONE)
    weights: str = setting("trained", ("trained", "ema", "averaged"))
    log_every: int = setting(50, AT_LEAST_ONE)
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __new__(cls, **settings: Any) -> "TrainingConfig":
        """Makes the object that `__init__` fills; raises ValueError for an old name, with the new one."""
        for old in MOVED.keys() & settings.keys():
            if not dataclasses.is_dataclass(settings[old]):
                section, key = MOVED[old].split(".")
                kind = next(field.type for field in dataclasses.fields(cls) if field.name == section)
                raise ValueError(
                    f"TrainingConfig's {old} is {section}.{key} now: write "
                    f"TrainingConfig({section}={getattr(kind, '__name__', kind)}({key}={settings[old]!r}))"
                )
        return super().__new__(cls)

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self, "training")
        if self.weights == "ema" and not self.optimizer.ema_decay:
            raise ValueError("training.weights is ema, but training.optimizer.ema_decay is 0: set it, e.g. 0.999")
        last, best = self.checkpoints.average_last, self.checkpoints.average_best
        if (last > 0) + (best > 0) != (self.weights == "averaged"):
            raise ValueError(
                f"training.weights is {self.weights}, checkpoints.average_last {last} and checkpoints.average_best "
                f"{best}: for the mean of checkpoints set weights to averaged and one of the two; else leave both at 0"
            )

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, 0 for never, and after the last one, is done after this step."""
        return every > 0 and (step % every == 0 or step == self.steps)


def scored_by(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a training section on which the scores of the validation corpus depend.

    `scores.json` stores them under these names, which are older than the sections.
    """
    evaluation = training.get("evaluation", {})
    names = {"evaluate_sentences": "sentences", "beam_size": "beam_size", "alpha": "alpha", "tokenize": "tokenize"}
    # A tokeniser that has not been chosen yet cannot differ.
    found = {name: evaluation[key] for name, key in names.items() if evaluation.get(key, "auto") != "auto"}
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
        """Checks settings of different sections against each other; raises ValueError with a remedy."""
        check(self)
        loss_chunks = self.training.parallelism.loss_chunks
        if self.data.target_slots % loss_chunks:
            raise ValueError(
                f"training.parallelism.loss_chunks is {loss_chunks}, which does not divide data.target_slots = "
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
        """The inverse of `to_mapping`, which accepts old names too; raises ValueError for any other unknown key."""
        sections: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        built = {
            name: from_mapping(sections[name], settings, name) if name in sections else settings
            for name, settings in by_new_names(mapping).items()
        }
        return from_mapping(cls, built, "config")

    def changed(self, settings: Mapping[str, Any]) -> "Experiment":
        """The experiment with some settings changed, each by its full name, e.g. "training.schedule.warmup_steps"."""
        mapping = self.to_mapping()
        for name, value in settings.items():
            *sections, key = name.split(".")
            functools.reduce(operator.getitem, sections, mapping)[key] = value
        return self.from_mapping(mapping)
