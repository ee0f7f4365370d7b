"""Trains as train.py does, and prints for each step which sentences this process was given.

The sentences are decoded from the batches themselves, so that exactly what was trained on is logged. The environment
variable OBSERVED names the file.
"""

import hashlib
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def pairs_of(batch) -> list[str]:
    """A short hash of the tokens of each sentence pair of a batch, row by row."""
    found = []
    rows = zip(batch.source.ids, batch.source.segments, batch.target.ids, batch.target.segments, strict=True)
    for source, source_segments, target, target_segments in rows:
        for segment in range(1, source_segments.max() + 1):
            tokens = [source[source_segments == segment].tolist(), target[target_segments == segment].tolist()]
            found.append(hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12])
    return found


def observe() -> None:
    """Logs the contents of each batch when training takes it."""
    import jax

    from flax_transformer.data.epochs import ChangingCorpus
    from flax_transformer.data.pipeline import PackedCorpus

    def observed(batches: Callable[..., Iterator]) -> Callable[..., Iterator]:
        def logged(corpus: Any, start: int, stop: int) -> Iterator:
            for step, batch in enumerate(batches(corpus, start, stop), start + 1):
                with open(os.environ["OBSERVED"], "a") as file:
                    which = {"step": step, "process": jax.process_index(), "processes": jax.process_count()}
                    line = which | {"pairs": pairs_of(batch)}
                    file.write(json.dumps(line) + "\n")
                yield batch

        return logged

    for kind in (PackedCorpus, ChangingCorpus):
        kind.batches = observed(kind.batches)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    observe()
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
