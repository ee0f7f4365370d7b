"""Takes what training measures and leaves it where people look: the terminal, `metrics.jsonl`, TensorBoard."""

import contextlib
import math
import sys
from collections.abc import Sequence

from tqdm import tqdm

from flax_transformer.training.evaluation import Scores
from flax_transformer.training.events import open_events
from flax_transformer.training.parallel import ParallelStep
from flax_transformer.workdir import WorkDirectory

TITLES = {"loss": "loss", "bleu": "BLEU", "chrf": "chrF", "exact_match": "exact match"}


def format_score(name: str, value: float) -> str:
    """One score as a person reads it, e.g. `97.2 %`."""
    return {"loss": f"{value:.3f}", "exact_match": f"{value:.1f} %"}.get(name, f"{value:.1f}")


class Report:
    """Shows a training's progress and records it; use it in a `with` statement."""

    def __init__(self, workdir: WorkDirectory, *, first_step: int, steps: int, silent: bool = False):
        """Starts a progress bar at `first_step` of `steps`; a silent one shows and records nothing."""
        self._workdir, self._silent = workdir, silent
        self._events = None if silent else open_events(workdir.path / "tensorboard")
        # A log file gets a line every half minute, a terminal a bar that moves.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=silent,
        )
        self._table_has_head = False

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What ended the training must not give way to a terminal that is gone.
        with contextlib.suppress(*() if kind is None else (Exception,)):
            if self._events is not None:
                self._events.close()
            self._bar.close()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if not self._silent:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def step_done(self) -> None:
        """Moves the bar one step."""
        self._bar.update()

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Records one window of steps."""
        # Where no update of the window was made, these have no value.
        parts = []
        if math.isfinite(metrics["loss"]):
            parts.append(f"loss {metrics['loss']:.3f}")
        if math.isfinite(metrics["fill_rate"]):
            parts.append(f"{metrics['fill_rate']:.0%} full")
        if math.isfinite(metrics.get("tokens_per_second", math.nan)):
            parts.append(f"{metrics['tokens_per_second']:,.0f} target tokens/s")
        if "input_wait" in metrics:
            parts += [
                f"{metrics['input_wait']:.0%} waiting for input",
                f"step {1e3 * metrics['step_seconds_p50']:.0f} ms, p95 {1e3 * metrics['step_seconds_p95']:.0f} ms",
            ]
        if "model_flops_utilization" in metrics:
            parts.append(f"{metrics['model_flops_utilization']:.0%} of peak")
        if "memory_bytes" in metrics:
            parts.append(f"{metrics['memory_bytes'] / 1e9:.1f} GB")
        if metrics["skipped"]:
            parts.append(f"{metrics['skipped']:,} updates left out")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._record("train", step, metrics)

    def compiled(self, step: int, compiled: ParallelStep, seconds: float) -> None:
        """Tells of the first step: what compiling took, the memory of the program, and the time since the start."""
        trace = (
            f"tracing took {compiled.trace_seconds:.1f} s, compiling" if compiled.trace_seconds else "compiling took"
        )
        memory = f"; the program takes {compiled.memory / 1e9:.2f} GB of a device" if compiled.memory else ""
        self.say(
            f"step {step} was done {seconds:.1f} s after the start; {trace} {compiled.compile_seconds:.1f} s{memory}"
        )
        times = {"trace_seconds": compiled.trace_seconds, "compile_seconds": compiled.compile_seconds}
        self._record("compile", step, times | {"program_bytes": compiled.memory, "seconds_from_start": seconds})

    def checkpoint(self, step: int, seconds: float) -> None:
        """Records how long a checkpoint kept training waiting."""
        self._record("checkpoint", step, {"blocked_seconds": seconds})

    def validation(self, step: int, scores: Scores, seconds: float) -> None:
        """Records the validation corpus's scores and prints them as the next row of a table."""
        if not self._table_has_head:
            self.say("    step   time  " + "  ".join(f"{title:>11}" for title in TITLES.values()))
            self._table_has_head = True
        values = "  ".join(f"{format_score(name, getattr(scores, name)):>11}" for name in TITLES)
        self.say(f"{step:>8}  {seconds:>4.0f}s  {values}")
        self._record("valid", step, {name: getattr(scores, name) for name in TITLES} | {"seconds": seconds})

    def _record(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        if self._silent:
            return
        self._workdir.append_metrics({"kind": kind, "step": step} | metrics)
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)


def show_samples(source: Sequence[str], references: Sequence[str], translations: Sequence[str], count: int) -> None:
    """Prints the first few sources, references and translations, one under the other."""
    for triple in list(zip(source, references, translations, strict=True))[:count]:
        print()
        for name, text in zip(("source", "reference", "translation"), triple, strict=True):
            print(f"  {name:>11}  {text}")


def show_test(weights: str, scores: Scores, *, metric: str, seconds: float) -> None:
    """Prints the test corpus's scores; the last line tells the one that chose the checkpoint.

    Args:
        weights: which ones, in words.
        scores: the test corpus's.
        metric: a key of `TITLES`.
        seconds: spent training.
    """
    print(f"\ntest corpus, {weights}: BLEU {scores.bleu:.1f}, chrF {scores.chrf:.1f}, loss {scores.loss:.3f}")
    print(f"BLEU signature: {scores.signature}")
    corpus = (
        f"of {scores.sentences} held-out phrases" if metric == "exact_match" else f"on {scores.sentences} sentences"
    )
    value = format_score(metric, getattr(scores, metric))
    print(f"{TITLES[metric]}: {value} {corpus}, trained in {seconds:.0f} s", flush=True)
