"""Tells, before the first step, of settings and texts that are allowed but may not be what was meant."""

import warnings
from collections.abc import Sequence

from flax_transformer.data.corpus import ParallelText, corpus_tags
from flax_transformer.experiment import DataConfig, Experiment
from flax_transformer.training.optimizer import learning_rate_schedule

# Of how many sentences of the training corpus, spread over all of it, the words are compared with a held-out corpus.
COMPARED = 20_000
# With fewer words that only one side of the training corpus has, nothing is said of swapped sides.
FEW = 10


def notice_of_rows(rows: int, batch_rows: int, devices: int) -> str:
    """Says how many empty rows fill up each batch; empty if there are none.

    Args:
        rows: `data.rows`.
        batch_rows: the same with the rows that fill up the batch, a multiple of the devices.
        devices: the number of devices that share a batch.
    """
    if batch_rows == rows:
        return ""
    return (
        f"data.rows = {rows} on {devices} devices: {batch_rows - rows} empty rows fill up each batch; a multiple of "
        "the devices, and of the rows that one takes at once, would waste none"
    )


def notice_of_tags(data: DataConfig, pieces: Sequence[str]) -> str:
    """Says which tags of the corpora are no pieces of the source's vocabulary; empty if all are.

    Args:
        data: names the corpora.
        pieces: the pieces of the vocabulary.
    """
    tags = dict.fromkeys(tag for corpus in (data.train, data.valid, data.test) if corpus for tag in corpus_tags(corpus))
    if not (without := sorted(tags.keys() - set(pieces))):
        return ""
    return (
        f"the vocabulary has no piece for {', '.join(without)}, and reads each in parts, like any word: only tags "
        "of data.train get a piece, and only when the vocabulary is trained"
    )


def notice_of_other_rate(before: Experiment, now: Experiment, step: int) -> str:
    """Says how changed settings change the learning rate of the next update; empty if it stays the same.

    Args:
        before: the experiment as it was when training last started.
        now: the experiment that continues.
        step: the number of updates so far.
    """
    old, new = (float(learning_rate_schedule(each.training, each.model.d_model)(step)) for each in (before, now))
    if abs(new - old) <= 1e-3 * max(new, old):
        return ""
    name = now.training.schedule.name
    reason = f"training.steps was {before.training.steps} and is {now.training.steps}, where {name} ends"
    if before.training.schedule != now.training.schedule:
        reason = "training.schedule was changed"
    return (
        f"the learning rate of step {step + 1} is {new:.3g}, and was to be {old:.3g} ({reason}); to train further "
        "without such a jump, choose the schedule constant or inverse_sqrt with a suitable "
        "training.schedule.learning_rate"
    )


def warn_of_settings(experiment: Experiment) -> None:
    """Warns of a warm-up that does not end before the training does."""
    training = experiment.training
    if training.schedule.warmup_steps > training.steps:
        warnings.warn(
            f"training.schedule.warmup_steps is {training.schedule.warmup_steps}, but training.steps is only "
            f"{training.steps}: the learning rate will never reach its peak; lower the first",
            stacklevel=2,
        )


def warn_of_texts(texts: dict[str, ParallelText]) -> None:
    """Warns of held-out pairs that training sees too, and of held-out corpora whose sides are swapped.

    Args:
        texts: the corpora by name: "train", and "valid" and "test" if there are any.
    """
    train = texts["train"]
    for name in ("valid", "test"):
        if name not in texts:
            continue
        held_out = set(zip(texts[name].source, texts[name].target, strict=True))
        seen = held_out.intersection(zip(train.source, train.target, strict=True))
        if seen:
            warnings.warn(
                f"{len(seen):,} of the {len(held_out):,} different pairs of data.{name} are in data.train too: scores "
                "on them say little about other sentences; take them out of one of the two",
                stacklevel=2,
            )
        if _is_swapped(train, texts[name]):
            warnings.warn(
                f"the sources of data.{name} look like the targets of data.train, and the other way round: name its "
                "two files in the other order",
                stacklevel=2,
            )


def _is_swapped(train: ParallelText, held_out: ParallelText) -> bool:
    """Whether most words that tell the sides of the training corpus apart stand on the other side here."""
    every = max(1, len(train) // COMPARED)
    sources, targets = _words(train.source[::every]), _words(train.target[::every])
    only_source, only_target = sources - targets, targets - sources
    source, target = _words(held_out.source[:COMPARED]), _words(held_out.target[:COMPARED])
    right = len(source & only_source) + len(target & only_target)
    wrong = len(source & only_target) + len(target & only_source)
    return wrong >= FEW and wrong > 2 * right


def _words(sentences: Sequence[str]) -> set[str]:
    return {word for sentence in sentences for word in sentence.split()}
