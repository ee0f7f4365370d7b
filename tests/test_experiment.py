"""Takes experiments as nested mappings and leaves a verdict: they come back unchanged, and mistakes are named."""

import json

import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    ParallelismConfig,
    ScheduleConfig,
    TrainingConfig,
    VocabularyConfig,
    scored_by,
)

CHANGED = Experiment(
    model=TransformerConfig.tiny(norm="pre", source_vocab_size=300, target_vocab_size=300),
    vocabulary=VocabularyConfig(size=300, model_type="unigram"),
    data=DataConfig(train="files:a.kn,a.en", rows=7),
    training=TrainingConfig(steps=11, schedule=ScheduleConfig(name="cosine", learning_rate=1e-3)),
)


@pytest.mark.parametrize("experiment", [Experiment(), CHANGED], ids=["defaults", "changed"])
def test_an_experiment_survives_its_mapping_and_json(experiment):
    mapping = experiment.to_mapping()
    assert Experiment.from_mapping(mapping) == experiment
    assert Experiment.from_mapping(json.loads(json.dumps(mapping))) == experiment


def test_a_mapping_tells_experiments_apart():
    assert CHANGED.to_mapping() != Experiment().to_mapping()
    assert list(CHANGED.to_mapping()) == ["model", "vocabulary", "data", "training"]


def test_sections_and_settings_left_out_keep_their_defaults():
    experiment = Experiment.from_mapping({"model": {"d_model": 64}, "data": {}})
    assert experiment == Experiment(model=TransformerConfig(d_model=64))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"modle": {}}, r"config.modle is not a setting: did you mean config.model\?"),
        ({"model": {"d_modle": 64}}, r"model.d_modle is not a setting: did you mean model.d_model\?"),
        ({"vocabulary": {"sizes": 1}}, r"vocabulary.sizes is not a setting: did you mean vocabulary.size\?"),
        ({"data": {"row": 1}}, r"data.row is not a setting: did you mean data.rows\?"),
        ({"training": {"warmup": 1}}, r"training.warmup is not a setting: did you mean training.warmup_steps\?"),
        ({"training": {"xyz": 1}}, "training.xyz is not a setting: it has steps, .*, samples"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(mapping, message):
    with pytest.raises(ValueError, match=message):
        Experiment.from_mapping(mapping)


@pytest.mark.parametrize(
    ("settings", "name", "wrong", "message"),
    [
        (VocabularyConfig, "model_type", "words", "vocabulary.model_type is 'words': choose one of bpe, unigram, char"),
        (VocabularyConfig, "size", 0, "vocabulary.size is 0: it must be at least 1"),
        (VocabularyConfig, "max_sentences", 0, "vocabulary.max_sentences is 0: it must be at least 1"),
        (DataConfig, "rows", 0, "data.rows is 0: it must be at least 1"),
        (DataConfig, "source_slots", 0, "data.source_slots is 0"),
        (DataConfig, "target_slots", 0, "data.target_slots is 0"),
        (TrainingConfig, "schedule", "step", "training.schedule is 'step': choose one of paper, "),
        *[
            (
                TrainingConfig,
                "parallelism",
                kind,
                f"training.parallelism is '{kind}': choose auto, jit, pmap, data, fsdp",
            )
            for kind in ("tpu", "fsdp=2,data=4", "data=0", "data=2,", "model=2")
        ],
        (TrainingConfig, "best_metric", "rouge", "training.best_metric is 'rouge': choose one of bleu, "),
        (TrainingConfig, "rng_impl", "dice", "training.rng_impl is 'dice': choose one of rbg, "),
        *[
            (TrainingConfig, name, 0, f"training.{name} is 0: it must be at least 1")
            for name in (
                "steps",
                "loss_chunks",
                "log_every",
                "checkpoint_every",
                "keep_latest",
                "keep_best",
                "beam_size",
            )
        ],
        *[
            (TrainingConfig, name, -1, f"training.{name} is -1: it must be at least 0")
            for name in ("warmup_steps", "clip_norm", "evaluate_every", "evaluate_sentences", "samples")
        ],
        (TrainingConfig, "label_smoothing", 1.0, "training.label_smoothing is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(settings, name, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**{name: wrong})


def test_chunks_of_the_loss_divide_the_target_slots():
    with pytest.raises(ValueError, match="loss_chunks is 5, which does not divide data.target_slots = 64: set it to"):
        Experiment(training=TrainingConfig(parallelism=ParallelismConfig(loss_chunks=5)))
    assert Experiment(training=TrainingConfig(parallelism=ParallelismConfig(loss_chunks=8))).training.loss_chunks == 8


def test_three_way_tying_needs_a_joint_vocabulary():
    two_sided = VocabularyConfig(joint=False)
    with pytest.raises(ValueError, match='vocabulary.joint is false: .* to "decoder" or "none"'):
        Experiment(vocabulary=two_sided)
    for tying in ("decoder", "none"):
        assert Experiment(model=TransformerConfig(tie_embeddings=tying), vocabulary=two_sided).vocabulary == two_sided


def test_what_scores_depend_on_is_what_the_section_tells_of_it():
    assert scored_by({}) == scored_by({"best_metric": "bleu", "tokenize": "auto"}) == {}
    assert scored_by({"weights": "averaged", "alpha": 0.0}) == {"weights": "trained", "alpha": 0.0}
    training = TrainingConfig(
        weights="ema", optimizer=OptimizerConfig(ema_decay=0.9), evaluation=EvaluationConfig(tokenize="zh")
    )
    found = scored_by(Experiment(training=training).to_mapping()["training"])
    assert found == {"weights": "ema", "tokenize": "zh", "alpha": 0.6, "beam_size": 1, "evaluate_sentences": 0}
