"""The names of settings in version 0.1.0, and what they are called now."""

from collections.abc import Mapping
from typing import Any

# In version 0.1.0 all settings of training were directly in the section "training". Its work directories, command lines
# and config files use the names on the left.
MOVED = {
    "schedule": "schedule.name",
    "learning_rate": "schedule.learning_rate",
    "warmup_steps": "schedule.warmup_steps",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "epsilon": "optimizer.epsilon",
    "weight_decay": "optimizer.weight_decay",
    "clip_norm": "optimizer.clip_norm",
    "ema_decay": "optimizer.ema_decay",
    "parallelism": "parallelism.layout",
    "rows_per_device": "parallelism.rows_per_device",
    "loss_chunks": "parallelism.loss_chunks",
    "checkpoint_every": "checkpoints.every",
    "keep_latest": "checkpoints.keep_latest",
    "keep_best": "checkpoints.keep_best",
    "average_last": "checkpoints.average_last",
    "average_best": "checkpoints.average_best",
    "evaluate_every": "evaluation.every",
    "evaluate_sentences": "evaluation.sentences",
    "beam_size": "evaluation.beam_size",
    "alpha": "evaluation.alpha",
    "tokenize": "evaluation.tokenize",
    "best_metric": "evaluation.best_metric",
    "patience": "evaluation.patience",
    "samples": "evaluation.samples",
}


def by_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with old names of settings replaced by new ones; if both are there, the old one counts."""
    if not isinstance(config.get("training"), Mapping):
        return dict(config)
    training = dict(config["training"])
    # Some old names are those of sections now; what is a mapping is the section.
    old = {name: training.pop(name) for name in MOVED if name in training and not isinstance(training[name], Mapping)}
    for name, value in old.items():
        section, key = MOVED[name].split(".")
        training[section] = {**training.get(section, {}), key: value}
    return {**config, "training": training} if old else dict(config)
