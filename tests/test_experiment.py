import dataclasses
import json
import operator

import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import (
    MOVED,
    CheckpointsConfig,
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
from flax_transformer.ranges import setting_fields

CHANGED = Experiment(
    model=TransformerConfig.tiny(norm="pre", source_vocab_size=300, target_vocab_size=300),
    vocabulary=VocabularyConfig(size=300, byte_fallback=False, model_type="unigram"),
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
        (
            {"training": {"warmup": 1}},
            r"training.warmup is not a setting: did you mean training.schedule.warmup_steps\?",
        ),
        ({"training": {"schedule": {"nam": "paper"}}}, "training.schedule.nam is not .* training.schedule.name"),
        ({"training": {"xyz": 1}}, "training.xyz is not a setting: it has steps, .*, evaluation.samples"),
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
        (ScheduleConfig, "name", "step", "training.schedule.name is 'step': choose one of paper, "),
        (ScheduleConfig, "learning_rate", -1, "training.schedule.learning_rate is -1: it must be at least 0"),
        *[
            (
                ParallelismConfig,
                "layout",
                kind,
                f"training.parallelism.layout is '{kind}': choose auto, jit, pmap, data, fsdp",
            )
            for kind in ("tpu", "fsdp=2,data=4", "data=0", "data=2,", "model=2")
        ],
        (EvaluationConfig, "best_metric", "rouge", "training.evaluation.best_metric is 'rouge': choose one of bleu, "),
        (TrainingConfig, "rng_impl", "dice", "training.rng_impl is 'dice': choose one of rbg, "),
        *[
            (section, name, 0, f"training.{prefix}{name} is 0: it must be at least 1")
            for section, prefix, name in (
                (TrainingConfig, "", "steps"),
                (TrainingConfig, "", "log_every"),
                (ParallelismConfig, "parallelism.", "loss_chunks"),
                (CheckpointsConfig, "checkpoints.", "every"),
                (CheckpointsConfig, "checkpoints.", "keep_latest"),
                (CheckpointsConfig, "checkpoints.", "keep_best"),
                (EvaluationConfig, "evaluation.", "beam_size"),
            )
        ],
        *[
            (section, name, -1, f"training.{prefix}{name} is -1: it must be at least 0")
            for section, prefix, name in (
                (ScheduleConfig, "schedule.", "warmup_steps"),
                (OptimizerConfig, "optimizer.", "clip_norm"),
                (EvaluationConfig, "evaluation.", "every"),
                (EvaluationConfig, "evaluation.", "sentences"),
                (EvaluationConfig, "evaluation.", "samples"),
            )
        ],
        (
            CheckpointsConfig,
            "average_best",
            2,
            "training.checkpoints.average_best is 2, .* 1 are kept: raise .*keep_best",
        ),
        (TrainingConfig, "label_smoothing", 1.0, "training.label_smoothing is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(settings, name, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**{name: wrong})


def test_chunks_of_the_loss_divide_the_target_slots():
    with pytest.raises(ValueError, match="loss_chunks is 5, which does not divide data.target_slots = 64: set it to"):
        Experiment(training=TrainingConfig(parallelism=ParallelismConfig(loss_chunks=5)))
    assert CHANGED.changed({"training.parallelism.loss_chunks": 8}).training.parallelism.loss_chunks == 8


@pytest.mark.parametrize(
    ("weights", "last", "best"), [("averaged", 0, 0), ("averaged", 2, 1), ("trained", 2, 0), ("trained", 2, 1)]
)
def test_one_mean_of_checkpoints_goes_with_averaged_weights(weights, last, best):
    checkpoints = CheckpointsConfig(average_last=last, average_best=best)
    with pytest.raises(ValueError, match=f"weights is {weights}, .*average_last {last} .*one of the two"):
        TrainingConfig(weights=weights, checkpoints=checkpoints)


def test_three_way_tying_needs_a_joint_vocabulary():
    two_sided = VocabularyConfig(joint=False)
    with pytest.raises(ValueError, match='vocabulary.joint is false: .* to "decoder" or "none"'):
        Experiment(vocabulary=two_sided)
    for tying in ("decoder", "none"):
        assert Experiment(model=TransformerConfig(tie_embeddings=tying), vocabulary=two_sided).vocabulary == two_sided


def test_what_scores_depend_on_is_what_the_section_tells_of_it():
    assert scored_by({}) == scored_by({"evaluation": {"best_metric": "bleu", "tokenize": "auto"}}) == {}
    assert scored_by({"weights": "averaged", "evaluation": {"alpha": 0.0}}) == {"weights": "trained", "alpha": 0.0}
    training = TrainingConfig(
        weights="ema", optimizer=OptimizerConfig(ema_decay=0.9), evaluation=EvaluationConfig(tokenize="zh")
    )
    found = scored_by(Experiment(training=training).to_mapping()["training"])
    assert found == {"weights": "ema", "tokenize": "zh", "alpha": 0.6, "beam_size": 1, "evaluate_sentences": 0}


def test_some_settings_are_changed_by_their_full_names():
    changed = CHANGED.changed({"data.rows": 9, "training.checkpoints.keep_best": 4})
    assert (changed.data.rows, changed.training.checkpoints.keep_best) == (9, 4)
    assert changed.changed({"data.rows": 7, "training.checkpoints.keep_best": 1}) == CHANGED
    with pytest.raises(ValueError, match=r"data.row is not a setting: did you mean data.rows\?"):
        CHANGED.changed({"data.row": 9})


# The section "training" of a config.json from before it had sections, with the defaults of then.
FLAT = {
    "steps": 100_000, "start_from": "", "freeze": "", "seed": 0, "rng_impl": "threefry2x32", "schedule": "paper",
    "learning_rate": 1.0, "warmup_steps": 4000, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-9, "weight_decay": 0.0,
    "clip_norm": 0.0, "label_smoothing": 0.1, "parallelism": "auto", "rows_per_device": 0, "loss_chunks": 1,
    "max_skipped": 20, "ema_decay": 0.0, "weights": "trained", "average_last": 0, "average_best": 0, "log_every": 50,
    "evaluate_every": 1000, "checkpoint_every": 500, "keep_latest": 3, "keep_best": 1, "patience": 0,
    "best_metric": "bleu", "tokenize": "auto", "evaluate_sentences": 0, "beam_size": 1, "alpha": 0.6, "samples": 5,
}  # fmt: skip


def test_every_old_name_leads_to_one_setting_with_the_same_default():
    names = [MOVED.get(name, name) for name in FLAT]
    assert MOVED.keys() <= FLAT.keys() and sorted(names) == sorted(setting_fields(TrainingConfig))
    for name, default in FLAT.items():
        assert operator.attrgetter(MOVED.get(name, name))(TrainingConfig()) == default, name
    assert Experiment.from_mapping({"training": FLAT}) == Experiment()


# Another value than the default for each old name.
OTHER = {
    "schedule": "cosine", "learning_rate": 0.5, "warmup_steps": 7, "beta1": 0.5, "beta2": 0.5, "epsilon": 0.5,
    "weight_decay": 0.5, "clip_norm": 0.5, "ema_decay": 0.5, "parallelism": "fsdp", "rows_per_device": 7,
    "loss_chunks": 8, "checkpoint_every": 7, "keep_latest": 7, "keep_best": 7, "average_last": 2, "average_best": 1,
    "evaluate_every": 7, "evaluate_sentences": 7, "beam_size": 7, "alpha": 0.5, "tokenize": "zh",
    "best_metric": "loss", "patience": 7, "samples": 7,
}  # fmt: skip


@pytest.mark.parametrize("old", MOVED)
def test_a_setting_by_its_old_name_is_the_new_one(old):
    settings = {old: OTHER[old]} | ({"weights": "averaged"} if old.startswith("average") else {})
    training = Experiment.from_mapping({"training": settings}).training
    assert operator.attrgetter(MOVED[old])(training) == OTHER[old] != FLAT[old]
    # A config file that sets it in a whole config leaves the new name's default beside it.
    assert Experiment.from_mapping({"training": dataclasses.asdict(TrainingConfig()) | settings}).training == training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"learning_rate": 3.0},
            ["learning_rate is schedule.learning_rate", "schedule=ScheduleConfig(learning_rate=3.0)"],
        ),
        ({"parallelism": "jit"}, ["parallelism is parallelism.layout", "parallelism=ParallelismConfig(layout='jit')"]),
        ({"evaluate_every": 7}, ["evaluate_every is evaluation.every", "evaluation=EvaluationConfig(every=7)"]),
    ],
)
def test_a_program_that_gives_a_setting_by_its_old_name_is_told_the_new_one(settings, said):
    with pytest.raises(ValueError) as raised:
        TrainingConfig(**settings)
    for words in said:
        assert words in str(raised.value)
