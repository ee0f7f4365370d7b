"""Takes an experiment and a work directory and leaves a trained model in it; called again, it goes on where it was.

The way of one training: texts, vocabulary, packed batches, state (new, or from the newest checkpoint), steps with an
evaluation now and then, and at the end the test corpus.
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from flax_transformer.data.corpus import ParallelText, load_corpus
from flax_transformer.data.pipeline import PackedCorpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import Experiment
from flax_transformer.model import Transformer
from flax_transformer.training.evaluation import Evaluation, Scores
from flax_transformer.training.interruption import Interrupted, Interruption
from flax_transformer.training.optimizer import learning_rate_schedule, make_optimizer
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.report import Report, show_samples, show_test
from flax_transformer.training.step import StepMetrics, TrainState, eval_step, train_step
from flax_transformer.workdir import Checkpoints, WorkDirectory

# Steps run ahead of the host; more than two of them on several CPU devices can deadlock jax's runtime.
STEPS_IN_FLIGHT = 2

# What a training keeps from beginning to end; nothing named is all of the section.
FIXED: dict[str, tuple[str, ...]] = {
    "model": (),
    "vocabulary": (),
    "data": ("train", "rows", "source_slots", "target_slots", "seed"),
    "training": ("seed", "rng_impl", "clip_norm", "weight_decay"),
}


def train_and_evaluate(experiment: Experiment, path: epath.PathLike) -> Scores | None:
    """Trains in a work directory until `training.steps`, then translates the test corpus.

    Args:
        experiment: what is trained on what.
        path: the work directory; if a training has begun there, it goes on from the newest checkpoint.

    Returns:
        The test corpus's scores under the best checkpoint, `None` without a test corpus.

    Raises:
        ValueError: a corpus cannot be read, or the work directory belongs to another experiment.
        Interrupted: SIGTERM or SIGINT came; the step in hand was finished and a checkpoint written.
    """
    training = _Training(experiment, WorkDirectory(path))
    training.run()
    return training.test()


class _Training:
    """One training, prepared: everything that its loop needs."""

    def __init__(self, experiment: Experiment, workdir: WorkDirectory):
        """Reads the texts, makes or reads the vocabulary, packs the corpora and builds the compiled steps."""
        self.workdir = workdir
        self.parallelism = Parallelism(experiment.training.parallelism)
        texts = _load_texts(experiment)
        self.vocabularies = _vocabularies(experiment, workdir, texts["train"])
        experiment = _fill_in_vocabulary_sizes(experiment, self.vocabularies)
        _check_config(experiment, workdir)
        self.config, self.model_config = experiment.training, experiment.model
        self.packed = {
            name: PackedCorpus.from_text(
                text,
                self.vocabularies,
                experiment.data,
                max_length=self.model_config.max_length,
                multiple=self.parallelism.num_devices,
            )
            for name, text in texts.items()
        }
        # Last, so that what stopped at a mistake can be mended in the same folder.
        workdir.write_config(experiment.to_mapping())
        for name, packed in self.packed.items():
            print(_describe(name, texts[name], packed, self.config.steps), flush=True)

        self.model = Transformer(self.model_config)
        self.optimizer = make_optimizer(self.config, self.model_config.d_model)
        self.schedule = learning_rate_schedule(self.config, self.model_config.d_model)
        step = functools.partial(
            train_step, model=self.model, optimizer=self.optimizer, label_smoothing=self.config.label_smoothing
        )
        self.train_step = self.parallelism.compile(step, donate_state=True)
        evaluate = self.parallelism.compile(functools.partial(eval_step, model=self.model), donate_state=False)
        self.evaluations = {
            name: Evaluation(
                text,
                self.packed[name],
                self.vocabularies,
                self.model_config,
                self.config,
                evaluate,
                sentences=self.config.evaluate_sentences if name == "valid" else 0,
            )
            for name, text in texts.items()
            if name != "train"
        }

    def open_checkpoints(self) -> Checkpoints:
        return self.workdir.open_checkpoints(
            keep_latest=self.config.keep_latest, keep_best=self.config.keep_best, best_metric=self.config.best_metric
        )

    def run(self) -> None:
        """Steps from the newest checkpoint to the last step."""
        with self.open_checkpoints() as checkpoints:
            state, seconds = self._start(checkpoints)
            first = int(state.step)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            print(f"{parameters:,} parameters, {self.parallelism}, steps {first} to {self.config.steps}", flush=True)
            clock = _Clock(seconds)
            window = _Window(self.config.log_every)
            with (
                Report(self.workdir, first_step=first, steps=self.config.steps) as report,
                Interruption() as interruption,
            ):
                for step, batch in enumerate(self.packed["train"].batches(first, self.config.steps), first + 1):
                    state, metrics = self.train_step(state, batch)
                    report.step_done()
                    for logged_step, measured in window.add(step, metrics, flush=step == self.config.steps):
                        measured["learning_rate"] = float(self.schedule(logged_step - 1))
                        report.training(logged_step, measured)
                    if self._is_due(step, self.config.evaluate_every) or self._is_due(
                        step, self.config.checkpoint_every
                    ):
                        jax.block_until_ready(state)
                        with window.paused():
                            self._evaluate_and_save(step, state, checkpoints, report, clock)
                    if interruption.signal is not None:
                        checkpoints.save(step, state.params, _rest(state), {"seconds": clock.seconds}, None)
                        raise Interrupted(step, interruption.signal)

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, float]:
        """The state to go on from, and the seconds trained before."""
        rng = jax.random.key(self.config.seed, impl=self.config.rng_impl)
        create = functools.partial(TrainState.create, self.model, self.optimizer)
        state = self.parallelism.place(jax.jit(create)(rng))
        if checkpoints.latest_step is None:
            return state, 0.0
        params, rest, notes = checkpoints.restore(state.params, _rest(state))
        return state.replace(params=params, **rest), notes["seconds"]

    def _evaluate_and_save(
        self, step: int, state: TrainState, checkpoints: Checkpoints, report: Report, clock: "_Clock"
    ) -> None:
        metrics = None
        if "valid" in self.evaluations and self._is_due(step, self.config.evaluate_every):
            scores, _ = self.evaluations["valid"].score(state.params)
            report.validation(step, scores, clock.seconds)
            metrics = {name: getattr(scores, name) for name in ("loss", "bleu", "chrf", "exact_match")}
        checkpoints.save(step, state.params, _rest(state), {"seconds": clock.seconds}, metrics)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def test(self) -> Scores | None:
        """Translates the test corpus with the best checkpoint, and shows how well."""
        if "test" not in self.evaluations:
            return None
        shapes = jax.eval_shape(lambda: TrainState.create(self.model, self.optimizer, jax.random.key(0)).params)
        with self.open_checkpoints() as checkpoints:
            params = checkpoints.restore_params("best", shapes)
            step, seconds = checkpoints.best_step, checkpoints.read_notes()["seconds"]
        assert step is not None, "restore_params has found it"
        evaluation = self.evaluations["test"]
        scores, translations = evaluation.score(self.parallelism.place(params))
        self.workdir.append_metrics({"kind": "test", "step": step} | dataclasses.asdict(scores))
        show_samples(evaluation.source, evaluation.references, translations, self.config.samples)
        show_test(step, scores, metric=self.config.best_metric, seconds=seconds)
        return scores


class _Clock:
    """Counts the seconds trained, those before an interruption included."""

    def __init__(self, before: float):
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


class _Window:
    """Gathers the metrics of some steps without making the device wait for the host."""

    def __init__(self, size: int):
        self._size = size
        self._in_flight: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._gathered: list[StepMetrics] = []
        self._since = time.monotonic()

    def add(self, step: int, metrics: StepMetrics, *, flush: bool) -> list[tuple[int, dict[str, float]]]:
        """Takes a step's metrics; gives the step and the means of each window that is complete."""
        self._in_flight.append((step, metrics))
        complete = []
        while len(self._in_flight) > (0 if flush else STEPS_IN_FLIGHT):
            finished, metrics = self._in_flight.popleft()
            self._gathered.append(jax.device_get(metrics))
            if finished % self._size == 0 or (flush and not self._in_flight):
                complete.append((finished, self._means()))
        return complete

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the tokens a second."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def _means(self) -> dict[str, float]:
        sums = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *self._gathered)
        norms = [float(metrics.gradient_norm) for metrics in self._gathered]
        now = time.monotonic()
        seconds, self._since, self._gathered = now - self._since, now, []
        tokens = sums.sums.tokens
        return {
            "loss": sums.sums.smoothed / tokens,
            "cross_entropy": sums.sums.cross_entropy / tokens,
            "accuracy": sums.sums.correct / tokens,
            "gradient_norm": float(np.mean(norms)),
            "tokens_per_second": tokens / seconds,
        }


def _rest(state: TrainState) -> dict[str, PyTree]:
    """What a checkpoint holds beside the parameters."""
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def _load_texts(experiment: Experiment) -> dict[str, ParallelText]:
    if not experiment.data.train:
        raise ValueError("data.train is empty: name a corpus, e.g. --config.data.train=files:train.en,train.de")
    named = {"train": experiment.data.train, "valid": experiment.data.valid, "test": experiment.data.test}
    return {name: load_corpus(spec) for name, spec in named.items() if spec}


def _vocabularies(experiment: Experiment, workdir: WorkDirectory, text: ParallelText) -> VocabularyPair:
    if workdir.exists and workdir.has_vocabularies():
        return workdir.read_vocabularies()
    vocabularies = VocabularyPair.train(text.source, text.target, experiment.vocabulary)
    workdir.write_vocabularies(vocabularies)
    return vocabularies


def _fill_in_vocabulary_sizes(experiment: Experiment, vocabularies: VocabularyPair) -> Experiment:
    target = vocabularies.target
    for name, id_ in (("pad_id", target.pad_id), ("start_id", target.bos_id), ("eos_id", target.eos_id)):
        if getattr(experiment.model, name) != id_:
            raise ValueError(f"model.{name} is {getattr(experiment.model, name)}, the vocabulary has {id_}: set it so")
    model = dataclasses.replace(
        experiment.model, source_vocab_size=vocabularies.source.size, target_vocab_size=target.size
    )
    return dataclasses.replace(experiment, model=model)


def _check_config(experiment: Experiment, workdir: WorkDirectory) -> None:
    """Checks that what a training cannot change on its way is what it began with.

    The held-out corpora may change, and so may lengths, rates and intervals.
    """
    if not workdir.exists:
        return
    begun = Experiment.from_mapping(workdir.read_config())
    for section, names in FIXED.items():
        found, wanted = getattr(begun, section), getattr(experiment, section)
        for name in names or [field.name for field in dataclasses.fields(wanted)]:
            if getattr(found, name) != getattr(wanted, name):
                raise ValueError(
                    f"{workdir.path} was begun with {section}.{name} = {getattr(found, name)!r}, now it is "
                    f"{getattr(wanted, name)!r}: set it back, or give another --workdir"
                )


def _describe(name: str, text: ParallelText, packed: PackedCorpus, steps: int) -> str:
    line = (
        f"{name}: {len(text):,} sentence pairs in {len(packed.rows):,} rows, {packed.fill_rate:.1%} of the slots filled"
    )
    if len(packed.too_long):
        line += f"; {len(packed.too_long):,} pairs too long for a row are left out of the loss"
    if name == "train":
        line += f"; {packed.epoch_steps:,.1f} steps an epoch, {steps / packed.epoch_steps:,.1f} epochs"
    return line
