"""Trains an experiment in a work directory; called again, it continues from the newest checkpoint.

A training first prepares its inputs (texts, vocabulary, packed batches) and its state (new, or from the newest
checkpoint). It then makes steps, with checkpoints and evaluations in between, and finally scores the test corpus.
"""

import contextlib
import dataclasses
import errno
import functools
import time
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PyTree

from flax_transformer.checkpoints import Checkpoints
from flax_transformer.experiment import Experiment, scored_by
from flax_transformer.monitoring.profile import Profile
from flax_transformer.monitoring.provenance import provenance
from flax_transformer.monitoring.report import TITLES, Report, record_test
from flax_transformer.monitoring.utilization import Work, device_memory_peak
from flax_transformer.new_languages import start_new_languages
from flax_transformer.processes import hosts
from flax_transformer.processes.interruption import Interrupted, Interruption
from flax_transformer.processes.lock import TrainingLock
from flax_transformer.text.spelling import in_one_cell
from flax_transformer.trained_model import TrainedModel, param_shapes
from flax_transformer.training.evaluation import Evaluation, Scores, show_samples, show_test
from flax_transformer.training.inputs import Materials, check_paths, load_texts, prepare
from flax_transformer.training.notices import notice_of_other_rate
from flax_transformer.training.optimizer import learning_rate_schedule
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.step import (
    StepMetrics,
    TrainState,
    make_create_state,
    make_eval_step,
    make_train_step,
)
from flax_transformer.training.step_statistics import Clock, Window
from flax_transformer.workdir import WorkDirectory


def train_and_evaluate(
    experiment: Experiment,
    path: epath.PathLike,
    *,
    accept_changed_corpus: bool = False,
    profile: str = "",
    interruption: Interruption | None = None,
) -> Scores | None:
    """Trains in a work directory until `training.steps`, then translates the test corpus.

    Args:
        experiment: the model, the data and the settings of training.
        path: the work directory; if it has a training of this experiment, that training continues.
        accept_changed_corpus: whether to continue although a text differs from the one that training started with.
        profile: the first and the last step to record with jax's profiler, e.g. "20:25"; "" for no profile.
        interruption: handles the signals that end training; if not given, they are handled only while it makes steps.

    Returns:
        The test corpus's scores under the weights that `training.weights` names, `None` without a test corpus.

    Raises:
        ValueError: a corpus cannot be read, the work directory belongs to another experiment or is in use by another
            training, or `training.max_skipped` updates in a row were not finite.
        OSError: a checkpoint or another file could not be written.
        Interrupted: a signal ended the training, after the current step and a checkpoint.
    """
    began = time.monotonic()
    hosts.check_connected()
    workdir = WorkDirectory(path)
    check_paths(experiment, workdir)
    texts = load_texts(experiment)
    watched = Profile(profile, workdir.path / "profile")
    lock = TrainingLock(workdir.path) if hosts.is_first() else contextlib.nullcontext()
    with _explain_disk_error(workdir), lock:
        parallelism = Parallelism(experiment.training.parallelism.layout)
        materials = prepare(experiment, texts, workdir, parallelism, accept_changed_corpus=accept_changed_corpus)
        training = _Training(materials, workdir, parallelism, began, watched, interruption)
        training.run()
        scores = training.test()
        workdir.finish_metrics()
        return scores


@dataclasses.dataclass(frozen=True)
class _Session:
    """The objects that exist only while steps are made."""

    checkpoints: Checkpoints
    report: Report
    interruption: Interruption
    clock: Clock


@contextlib.contextmanager
def _explain_disk_error(workdir: WorkDirectory) -> Iterator[None]:
    """Adds to the error of a file that could not be written from which step the training will continue."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        continues = "continues from the last checkpoint"
        if hosts.count() == 1:  # to open the checkpoints, all processes would have to be here
            with workdir.open_checkpoints(read_only=True) as checkpoints:
                step = checkpoints.latest_step
            continues = "starts again" if step is None else f"continues from step {step}"
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if is_full else "check the disk and the permissions"
        raise OSError(
            f"{error.filename or f'a file in {workdir.path}'} could not be written or read ({error.strerror}): "
            f"{remedy}; the same command {continues}"
        ) from error


class _Training:
    """One training, with everything that its loop needs."""

    def __init__(
        self,
        materials: Materials,
        workdir: WorkDirectory,
        parallelism: Parallelism,
        began: float,
        profile: Profile,
        interruption: Interruption | None,
    ):
        """Builds the compiled step and the evaluations; `began` is the start of the program, by `time.monotonic`."""
        self.materials, self.workdir, self.parallelism = materials, workdir, parallelism
        self.began, self.profile, self.interruption = began, profile, interruption
        experiment = materials.experiment
        self.config, self.model_config = experiment.training, experiment.model
        self.schedule = learning_rate_schedule(self.config, self.model_config.d_model)
        step = make_train_step(experiment, materials.micro_batches)
        self.train_step = parallelism.compile(step, donate_state=True)
        evaluate = make_eval_step(experiment, materials.micro_batches)
        compiled = self.parallelism.compile(evaluate, donate_state=False)
        self.evaluations = {
            name: Evaluation(
                text,
                self.materials.held_out[name],
                self.materials.vocabularies,
                self.model_config,
                self.config.evaluation,
                compiled,
                self.parallelism.as_whole,
                sentences=self.config.evaluation.sentences if name == "valid" else 0,
                devices=self.parallelism.local_devices,
            )
            for name, text in self.materials.texts.items()
            if name != "train"
        }

    def open_checkpoints(self) -> Checkpoints:
        return self.workdir.open_checkpoints(
            keep_latest=self.config.checkpoints.keep_latest,
            keep_best=self.config.checkpoints.keep_best,
            best_metric=self.config.evaluation.best_metric,
            found_by=scored_by(dataclasses.asdict(self.config)),
            is_planned=self._is_planned,
        )

    def _is_planned(self, step: int) -> bool:
        """Whether a training that is never stopped has a checkpoint at this step."""
        config = self.config
        return any(config.is_due(step, each.every) for each in (config.checkpoints, config.evaluation))

    def run(self) -> None:
        """Makes the steps from the newest checkpoint to the last step, or until evaluations stop improving."""
        with self.open_checkpoints() as checkpoints:
            state, first, seconds = self._start(checkpoints)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            parts = self.materials.micro_batches
            micro_batches = f", {parts} micro-batches a device" if parts > 1 else ""
            hosts.say(
                f"{parameters:,} parameters, {self.parallelism}{micro_batches}, steps {first} to {self.config.steps}"
            )
            before = self.materials.before
            if first and before and (jump := notice_of_other_rate(before, self.materials.experiment, first)):
                hosts.say(jump)
            if told := self.profile.missed(first + 1, self.config.steps):
                hosts.say(told)
            with (
                Report(self.workdir, first_step=first, steps=self.config.steps, silent=not hosts.is_first()) as report,
                self._interruption() as interruption,
            ):
                if hosts.is_first():
                    self.workdir.append_metrics({"kind": "start", "step": first} | provenance())
                self._steps(state, first, _Session(checkpoints, report, interruption, Clock(seconds)))
        if self.interruption is not None:
            self.interruption.training_is_over()
        hosts.wait("the first process has written the scores")
        if self.config.weights == "averaged":
            self._average()

    def _average(self) -> None:
        """Writes the mean of the checkpoints; of fewer than wanted if training ended early or some were lost."""
        last = self.config.checkpoints.average_last
        wanted = last or self.config.checkpoints.average_best
        with self.open_checkpoints() as checkpoints:
            steps = set(checkpoints.all_steps)
            there = len(steps if last else steps & checkpoints.scores.keys())
        if there < wanted and hosts.is_first():
            kind = "checkpoints" if last else "scored checkpoints"
            warnings.warn(
                f"there are {there} {kind}, not the {wanted} whose mean is wanted: "
                + (f"the mean of these {there} is used" if there else "the newest checkpoint is used"),
                stacklevel=2,
            )
        count = min(there, wanted)
        if last or not count:
            self.workdir.average_checkpoints(last=max(count, 1))
        else:
            self.workdir.average_checkpoints(best=count)

    def _forget_later(self, checkpoints: Checkpoints, step: int) -> None:
        """Discards scores and averages of later steps than the one from which training continues."""
        checkpoints.forget_scores_after(step)
        if any(hosts.gather(self.workdir.averages_after(step))):
            if hosts.is_first():
                self.workdir.set_average_aside(step)
            hosts.wait("the average is set aside")

    @contextlib.contextmanager
    def _interruption(self) -> Iterator[Interruption]:
        if self.interruption is not None:
            yield self.interruption
            return
        with Interruption() as interruption:
            if hosts.count() > 1:
                interruption.meet(hosts.Peers())
            yield interruption

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, int, float]:
        """The state to continue from, its step, and the seconds trained before."""
        rng = jax.random.key(self.config.seed, impl=self.config.rng_impl)
        state = self.parallelism.create(make_create_state(self.materials.experiment), rng)
        restored = checkpoints.restore(self._trees(state))
        self._forget_later(checkpoints, 0 if restored is None else restored[0])
        if restored is None:
            return self._with_start(state), 0, 0.0
        step, trees, notes = restored
        trees = self.parallelism.as_local(trees)
        state = state.replace(params=trees["params"], ema=trees.get("ema"), **trees["training"])
        return state, step, notes["seconds"]

    def _with_start(self, state: TrainState) -> TrainState:
        """Replaces the parameters of a new state by those of `training.start_from`, if it is set."""
        if not self.config.start_from:
            return state
        model, like = TrainedModel.load(self.config.start_from), self.materials.experiment.data.new_language_like
        params = model.params if not like else start_new_languages(model, self.materials.vocabularies, like)
        params = self.parallelism.place(params)
        return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))

    def _trees(self, state: TrainState) -> dict[str, PyTree]:
        """The parts of a state in a checkpoint; the parameters are separate because translating reads only them."""
        apart = {"params": state.params} | ({} if state.ema is None else {"ema": state.ema})
        names = [field.name for field in dataclasses.fields(state) if field.name not in ("params", "ema")]
        rest = {name: value for name in names if (value := getattr(state, name)) is not None}
        return self.parallelism.as_global(apart | {"training": rest})

    def _steps(self, state: TrainState, first: int, session: _Session) -> None:
        rows = self.materials.train.batch_rows
        work = Work.of(self.materials.experiment, rows, self.parallelism.devices)
        window = Window(self.config.log_every, self._check_finite, work)

        def record(windows: list[tuple[int, dict[str, float]]]) -> None:
            for step, means in windows:
                # A skipped update does not advance the schedule.
                rate = float(self.schedule(step - 1 - means["skipped"]))
                memory = device_memory_peak(self.parallelism.devices)
                session.report.training(step, means | {"learning_rate": rate} | memory)

        # If the last run was stopped during its evaluation, evaluate now.
        if first:
            self._evaluate(first, state, session)
        if self._ends_early(first, session):
            return
        try:
            batches = self.materials.train.batches(first, self.config.steps)
            for step, batch in enumerate(window.timed(batches), first + 1):
                self.profile.before(step)
                state, metrics = self.train_step(state, batch)
                if step == first + 1:
                    jax.block_until_ready(metrics)
                    session.report.compiled(
                        step,
                        trace_seconds=self.train_step.trace_seconds,
                        compile_seconds=self.train_step.compile_seconds,
                        program_bytes=self.train_step.memory,
                        seconds_from_start=time.monotonic() - self.began,
                    )
                    window.begin_anew()
                session.report.step_done()
                record(window.add(step, metrics))
                if self.profile.is_complete(step):
                    record(window.settle())
                    with window.paused():  # writing a profile takes seconds
                        if told := self.profile.close():
                            session.report.say(told)
                signal = session.interruption.check(step)
                evaluate = self.config.is_due(step, self.config.evaluation.every)
                if evaluate or signal or self.config.is_due(step, self.config.checkpoints.every):
                    record(window.settle())
                    with window.paused():
                        self._save(step, state, session)
                        if signal:
                            raise Interrupted(step, signal)
                        self._evaluate(step, state, session)
                    if evaluate and self._ends_early(step, session):
                        break
                session.checkpoints.check()
        except Interrupted:
            record(window.close())
            raise
        finally:
            if told := self.profile.close():
                # If the terminal is gone, that error must not hide the one that ended the training.
                with contextlib.suppress(OSError):
                    session.report.say(told)
        record(window.close())

    def _save(self, step: int, state: TrainState, session: _Session) -> None:
        jax.block_until_ready(state)
        begin = time.monotonic()
        notes = {"seconds": session.clock.seconds, "planned": self._is_planned(step)}
        session.checkpoints.save(step, self._trees(state), notes)
        session.report.checkpoint(step, time.monotonic() - begin)

    def _evaluate(self, step: int, state: TrainState, session: _Session) -> None:
        """Scores the validation corpus if it is due at this step and the step has no comparable scores yet."""
        due = "valid" in self.evaluations and self.config.is_due(step, self.config.evaluation.every)
        if not due or step in session.checkpoints.scores:
            return
        params = state.ema if self.config.weights == "ema" else state.params
        stop = functools.partial(session.interruption.stop_after_checkpoint, step)
        scores, _ = self.evaluations["valid"].score(params, after_each=stop)
        metrics = {name: getattr(scores, name) for name in TITLES}
        session.report.validation(step, metrics, session.clock.seconds)
        session.checkpoints.record_scores(step, metrics)

    def _ends_early(self, step: int, session: _Session) -> bool:
        evaluations = session.checkpoints.evaluations_since_best
        patience = self.config.evaluation.patience
        if not patience or evaluations < patience or step >= self.config.steps:
            return False
        session.report.say(
            f"no better {self.config.evaluation.best_metric} in {evaluations} evaluations: training ends at step {step}"
        )
        return True

    def _check_finite(self, step: int, metrics: StepMetrics) -> None:
        """Raises ValueError if too many updates in a row, including this one, were skipped."""
        if metrics.skipped_in_a_row < self.config.max_skipped:
            return
        text, pairs = self.materials.texts["train"], self.materials.train.example_ids(step - 1)
        file = self.workdir.path / f"not_finite_{step}.tsv"
        if hosts.is_first():
            lines = [
                f"{pair + 1}\t{in_one_cell(text.source[pair])}\t{in_one_cell(text.target[pair])}\n" for pair in pairs
            ]
            file.write_text("".join(lines), encoding="utf-8")
        norms = ", ".join(f"{name} {float(norm):.3g}" for name, norm in metrics.module_norms.items())
        raise ValueError(
            f"{int(metrics.skipped_in_a_row)} updates in a row were left out because the loss or the gradient was not "
            f"finite, the last at step {step} (loss {metrics.sums.smoothed / metrics.sums.tokens:.3g}; gradient norms: "
            f"{norms}); the sentence pairs of its batch, numbered within data.train, are in {file}; the last "
            "checkpoint stands: go on from it with a lower training.schedule.learning_rate, or a larger "
            "training.max_skipped"
        )

    def test(self) -> Scores | None:
        """Translates the test corpus with the weights that training chose, and prints the scores."""
        if "test" not in self.evaluations:
            return None
        shapes = param_shapes(self.model_config)
        params = self.workdir.restore_params("chosen", shapes)
        averaged = self.config.weights == "averaged"
        with self.open_checkpoints() as checkpoints:
            step = checkpoints.latest_step if averaged else checkpoints.best_step
            seconds = checkpoints.read_notes()["seconds"]
        assert step is not None, "restore_params has found one"
        evaluation = self.evaluations["test"]
        scores, translations = evaluation.score(self.parallelism.place(params))
        if hosts.is_first():
            config = self.config.evaluation
            shown = list(zip(evaluation.source, evaluation.references, translations, strict=True))[: config.samples]
            record_test(self.workdir, step, dataclasses.asdict(scores), shown)
            show_samples(evaluation.source, evaluation.references, translations, config.samples)
            weights = "the mean of checkpoints" if averaged else f"checkpoint {step}"
            show_test(weights, scores, search=evaluation.search, metric=config.best_metric, seconds=seconds)
        return scores
