"""Measures how long saving a checkpoint of a preset's training state blocks the training loop.

    python -m benchmarks.save tiny base

After each save a step donates the state, as in training, while the checkpoint is written in the background.
"""

import argparse
import functools
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from flax_transformer import Transformer, TransformerConfig
from flax_transformer.commands.process import prepare_libraries
from flax_transformer.experiment import TrainingConfig
from flax_transformer.training.optimizer import make_optimizer
from flax_transformer.training.step import TrainState
from flax_transformer.workdir import WorkDirectory

VOCABULARY = {"tiny": 8000, "base": 37_000, "big": 37_000}
SAVES = 7


@functools.partial(jax.jit, donate_argnums=0)
def spend(trees):
    """Replaces a training step: makes a new array in the memory of every old one."""

    def change(leaf):
        return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf + 1

    return jax.tree.map(change, trees)


def blocked(preset: str) -> list[float]:
    """The seconds for which each save blocked."""
    size = VOCABULARY[preset]
    config = getattr(TransformerConfig, preset)(source_vocab_size=size, target_vocab_size=size)
    model, optimizer = Transformer(config), make_optimizer(TrainingConfig(), config.d_model)
    state = jax.jit(functools.partial(TrainState.create, model, optimizer))(jax.random.key(0))
    rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
    trees = spend({"params": state.params, "training": rest})
    seconds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        WorkDirectory(folder).open_checkpoints(keep_latest=2) as checkpoints,
    ):
        for step in range(1, SAVES + 1):
            jax.block_until_ready(trees)
            begin = time.perf_counter()
            checkpoints.save(step, trees, {})
            seconds.append(time.perf_counter() - begin)
            trees = spend(trees)
            # In training the previous checkpoint is complete when the next one comes.
            while checkpoints.is_writing:
                time.sleep(0.05)
    return seconds


def main() -> None:
    """Prints a line for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", choices=list(VOCABULARY))
    prepare_libraries()
    for preset in parser.parse_args().presets:
        seconds = blocked(preset)
        print(
            f"{preset}: a save blocks for {statistics.median(seconds):.2f} s (median of {SAVES}, {min(seconds):.2f} to "
            f"{max(seconds):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
