"""Compares an experiment with what a work directory records, so that a resumed training is the one begun there."""

import dataclasses
import operator

from flax.traverse_util import flatten_dict

from flax_transformer.experiment import Experiment
from flax_transformer.monitoring.provenance import OF_TEXTS, other_versions
from flax_transformer.new_languages import MEAN
from flax_transformer.processes import hosts
from flax_transformer.workdir import WorkDirectory

# The settings of each section that a training cannot change once it has started; an empty tuple means all of them.
FIXED: dict[str, tuple[str, ...]] = {
    "model": (),
    "vocabulary": (),
    "data": (
        *("train", "temperature", "source_sampling", "target_sampling", "rows", "source_slots", "target_slots", "seed"),
        *("source_language", "target_language", "new_language_like"),
    ),
    "training": (
        *("seed", "rng_impl", "start_from", "freeze"),
        *("optimizer.clip_norm", "optimizer.weight_decay", "optimizer.ema_decay"),
    ),
}
# Settings of how the model is computed, which may differ from machine to machine.
FREE = ("attention_implementation",)
# The settings of the model in which a training may differ from the model that it starts from.
OF_TRAINING = (*FREE, "dropout_rate", "attention_dropout_rate", "activation_dropout_rate", "dtype", "remat")
# What a vocabulary is in a work directory whose config.json is older than these settings.
OLDER = {"byte_fallback": False}
# Settings that grow with the languages that the initial model does not know.
SIZES = ("source_vocab_size", "target_vocab_size")


def as_begun(experiment: Experiment, workdir: WorkDirectory) -> Experiment:
    """Settings that are newer than the work directory get the values that they had when it was begun."""
    begun = workdir.read_config() if workdir.exists else {}
    known = begun.get("vocabulary", OLDER)
    return experiment.changed({f"vocabulary.{name}": OLDER[name] for name in OLDER.keys() - known.keys()})


def check_processes(experiment: Experiment, workdir: WorkDirectory) -> None:
    """Compares the settings of all processes, and what they see of the work directory, before they change it.

    Raises:
        ValueError: a process has other settings, or does not see the work directory that another one sees.
    """
    settings = flatten_dict(experiment.to_mapping(), sep=".")
    for name in FREE:
        settings.pop(f"model.{name}")
    first, *others = hosts.gather({"settings": settings, "exists": workdir.exists})
    for process, other in enumerate(others, 1):
        if other["exists"] != first["exists"]:
            raise ValueError(
                f"processes 0 and {process} see different things in {workdir.path}: give a --workdir that all hosts "
                "share, e.g. gs://BUCKET/FOLDER"
            )
        differs = [name for name, value in first["settings"].items() if other["settings"].get(name) != value]
        if differs:
            raise ValueError(
                f"process {process} has other settings than process 0 ({', '.join(differs[:8])}): give all the same"
            )


def check_config(experiment: Experiment, workdir: WorkDirectory) -> Experiment | None:
    """Checks that the settings in `FIXED` are those that the training was started with.

    The held-out corpora, the number of steps, rates and intervals may change.

    Returns:
        The experiment as it was when training last started; `None` if it is new.

    Raises:
        ValueError: settings differ, the work directory holds a model and no training, or a new training starts from a
            model of another shape.
    """
    if not workdir.exists:
        _check_start(experiment)
        return None
    config = workdir.read_config()
    if "training" not in config:
        raise ValueError(
            f"{workdir.path} holds a model and no training: give another --workdir, and start from the model there by "
            f"--config=finetune:{workdir.path}"
        )
    begun = as_begun(Experiment.from_mapping(config), workdir)
    fixed = [
        f"{section}.{name}"
        for section, names in FIXED.items()
        for name in names or [field.name for field in dataclasses.fields(getattr(begun, section))]
        if name not in FREE
    ]
    pairs = [(name, *(operator.attrgetter(name)(each) for each in (begun, experiment))) for name in fixed]
    changed = [f"{name} = {found!r}, now it is {wanted!r}" for name, found, wanted in pairs if found != wanted]
    if changed:
        it = "it" if len(changed) == 1 else "them"
        raise ValueError(
            f"{workdir.path} was begun with {'; with '.join(changed)}: set {it} back, give another --workdir, or go on "
            "with what the work directory says by leaving out --config and these settings"
        )
    return begun


def _check_start(experiment: Experiment) -> None:
    """Checks that there is the model to start from, and that it has the shape that the experiment describes."""
    start, like = experiment.training.start_from, experiment.data.new_language_like
    if not start:
        if like:
            raise ValueError(
                f"data.new_language_like is {like}, but there is no model that knows languages: name it by "
                "training.start_from, or leave data.new_language_like empty"
            )
        return
    WorkDirectory(start).check_chosen()
    if like and like != MEAN:
        WorkDirectory(start).read_vocabularies().target.speaking(like)  # reports an unknown language
    found, wanted = WorkDirectory(start).read_model_config(), experiment.model
    may_differ = OF_TRAINING + (SIZES if experiment.data.new_language_like else ())
    differs = [
        f"model.{name} is {getattr(wanted, name)!r}, in training.start_from = {start} it is {getattr(found, name)!r}"
        for name in (field.name for field in dataclasses.fields(wanted) if field.name not in may_differ)
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differs:
        value = "value" if len(differs) == 1 else "values"
        raise ValueError(f"{'; '.join(differs)}: use the same {value}, as configs/finetune.py does")


def check_fingerprints(
    experiment: Experiment,
    before: Experiment | None,
    workdir: WorkDirectory,
    fingerprints: dict[str, str],
    accept_changed_corpus: bool,
) -> tuple[dict[str, str], set[str]]:
    """Compares the texts with those of the last start, and those of all hosts with each other.

    Args:
        experiment: the experiment.
        before: the experiment as it was when training last started; `None` if it is new.
        workdir: its work directory.
        fingerprints: of the texts that were loaded, by name.
        accept_changed_corpus: whether a text may differ from the one that the training started with.

    Returns:
        The fingerprints that were recorded, and the names of corpora that have changed.

    Raises:
        ValueError: a corpus has changed, which is not accepted, or a host has other texts than the first.
    """
    # Read before `gather`, after which process 0 may overwrite them.
    begun = workdir.read_fingerprints() if workdir.exists else {}
    for process, others in enumerate(hosts.gather(fingerprints)):
        if others != fingerprints:
            raise ValueError(
                f"process {process} has other texts than process {hosts.index()}: give all hosts the same files"
            )
    changed = {name for name, found in fingerprints.items() if name != "test" and begun.get(name, found) != found}
    # Another corpus may be named for validation; one that is named as before, or again, must have the same text.
    edited = {name for name in changed if before and getattr(before.data, name) in ("", getattr(experiment.data, name))}
    if edited and not accept_changed_corpus:
        specs = " and ".join(f"data.{name} ({getattr(experiment.data, name)})" for name in sorted(edited))
        other = other_versions(workdir.read_metrics(), OF_TEXTS)
        remedy = f"{other}: install that version again" if other else "put the text back"
        raise ValueError(
            f"{specs} has another text than when training last ran in {workdir.path}: {remedy}, give another "
            "--workdir, or go on with the new text by --accept_changed_corpus"
        )
    return begun, changed
