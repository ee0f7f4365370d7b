"""Shows how a training is going on the terminal, and records it in `metrics.jsonl` and for TensorBoard."""

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from flax_transformer.monitoring.tensorboard import open_events
from flax_transformer.text.spelling import in_one_cell
from flax_transformer.workdir import WorkDirectory

# What training minimises is smoothed. In TensorBoard `loss` is that of validation too: cross-entropy, not smoothed.
IN_TENSORBOARD = {"train": {"loss": "smoothed_loss", "cross_entropy": "loss"}}
TITLES = {"loss": "loss", "bleu": "BLEU", "chrf": "chrF", "exact_match": "exact match"}


def format_score(name: str, value: float) -> str:
    """Formats one score for people, e.g. `97.2 %`."""
    return {"loss": f"{value:.3f}", "exact_match": f"{value:.1f} %"}.get(name, f"{value:.1f}")


def record_test(workdir: WorkDirectory, step: int, scores: Mapping[str, Any], samples: Sequence[Sequence[str]]) -> None:
    """Records the scores of the test corpus, and for TensorBoard some sources with references and translations.

    Args:
        workdir: the work directory.
        step: that of the checkpoint.
        scores: by name.
        samples: for each source its text, its reference and its translation.
    """
    workdir.append_metrics({"kind": "test", "step": step, **scores})
    with open_events(workdir.path / "tensorboard") as events:
        for name in TITLES:
            events.add_scalar(f"test/{name}", scores[name], step)
        rows = [[in_one_cell(text).replace("|", "\\|") for text in sample] for sample in samples]
        table = [["source", "reference", "translation"], ["---"] * 3, *rows]
        events.add_text("test/samples", "\n".join(f"| {' | '.join(row)} |" for row in table), step)


class Report:
    """The progress bar and the records of one training; use it in a `with` statement."""

    def __init__(self, workdir: WorkDirectory, *, first_step: int, steps: int, silent: bool = False):
        """Starts a progress bar at `first_step` of `steps`; a silent report shows and records nothing."""
        self._workdir, self._silent = workdir, silent
        self._events = None if silent else open_events(workdir.path / "tensorboard", first_step=first_step)
        # In a log file the bar is a new line each time, so it is written only every half minute.
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
        # If the terminal is gone, that error must not hide the one that ended the training.
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
        """Advances the progress bar by one step."""
        self._bar.update()

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and records the means over some steps."""
        # These are NaN if all updates were skipped.
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
            parts.append(f"{metrics['skipped']:,} updates skipped")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._record("train", step, metrics)

    def compiled(
        self, step: int, *, trace_seconds: float, compile_seconds: float, program_bytes: int, seconds_from_start: float
    ) -> None:
        """Shows and records how long the first step took, and how much memory its program needs."""
        trace = f"tracing took {trace_seconds:.1f} s, compiling" if trace_seconds else "compiling took"
        memory = f"; the program takes {program_bytes / 1e9:.2f} GB of a device" if program_bytes else ""
        self.say(
            f"step {step} was done {seconds_from_start:.1f} s after the start; {trace} {compile_seconds:.1f} s{memory}"
        )
        metrics = {
            "trace_seconds": trace_seconds,
            "compile_seconds": compile_seconds,
            "program_bytes": program_bytes,
            "seconds_from_start": seconds_from_start,
        }
        self._record("compile", step, metrics)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Records how long training waited for a checkpoint."""
        self._record("checkpoint", step, {"blocked_seconds": seconds})

    def validation(self, step: int, scores: Mapping[str, float], seconds: float) -> None:
        """Records the scores of the validation corpus, named as in `TITLES`, and prints them as a row of a table."""
        if not self._table_has_head:
            self.say("    step   time  " + "  ".join(f"{title:>11}" for title in TITLES.values()))
            self._table_has_head = True
        values = "  ".join(f"{format_score(name, scores[name]):>11}" for name in TITLES)
        self.say(f"{step:>8}  {seconds:>4.0f}s  {values}")
        self._record("valid", step, {name: scores[name] for name in TITLES} | {"seconds": seconds})

    def _record(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        if self._silent:
            return
        self._workdir.append_metrics({"kind": kind, "step": step} | metrics)
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{IN_TENSORBOARD.get(kind, {}).get(name, name)}", value, step)
