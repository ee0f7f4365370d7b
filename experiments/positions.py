"""Claim 6: without positions words have no order; sines and learned vectors do equally well, except where it is longer.

    python -m experiments.positions

- A model with sines, with learned vectors and without positions, all trained on phrases of up to 16 tokens and tested
  on phrases of the same kind of any length.
- Sines as rotations: the vector of position p + k is that of p, turned; one matrix does it for all p.
- Shuffled words: without positions an encoder gives each word the same vector wherever it stands.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import Results, run
from experiments.trainings import (
    GREEDY,
    LEARNED_POSITIONS,
    NO_POSITIONS,
    SEEDS,
    SHORT,
    SINUSOIDAL_POSITIONS,
    Variant,
    phrases,
    trained,
)
from flax_transformer.charts import Curves, plot_curves, plot_scores
from flax_transformer.decoding.translator import Translator
from flax_transformer.figures import SIGNED, Figure, make_panels, tidy_bar
from flax_transformer.model import Transformer
from flax_transformer.positions import sinusoidal_positions
from flax_transformer.trained_model import TrainedModel

VARIANTS = {"sinusoidal": SINUSOIDAL_POSITIONS, "learned": LEARNED_POSITIONS, "none": NO_POSITIONS}
TRAINED = SHORT["data.source_slots"]  # tokens of the longest phrase of training
PAIRS = 1500
WIDTH = 4  # lengths that share a point of the curve
FEWEST = 20  # phrases for a point
SHIFT = 5


def by_length(variant: Variant, seed: int, folder: Path) -> dict[str, dict[int, float]]:
    """What a model does with phrases, by the middle of the lengths that share a number.

    Returns:
        "right", the percentage of phrases that are translated exactly; and "loss", in nats per token, of the right
        translations, each token being given the right ones before it. The length is that of the longer side.
    """
    workdir = trained(variant, seed, folder)
    right: dict[int, list[bool]] = defaultdict(list)
    losses: dict[int, list[float]] = defaultdict(list)
    with variant.in_place():
        translator = Translator.from_workdir(workdir.path)
        source, target = phrases(PAIRS, 2)
        found = translator.translate(source, GREEDY)
        scored = translator.score(source, target)
        lengths = map(len, translator.vocabularies.source.encode(source))
        for length, mine, wanted, score in zip(lengths, found, target, scored, strict=True):
            group = (max(length, len(score.ids)) - 1) // WIDTH
            right[group].append(mine == wanted)
            losses[group] += [-log_prob for log_prob in score.token_log_probs]
        translator.close()
    groups = {WIDTH * group + WIDTH // 2: group for group in sorted(right) if len(right[group]) >= FEWEST}
    return {
        "right": {middle: 100 * statistics.mean(right[group]) for middle, group in groups.items()},
        "loss": {middle: statistics.mean(losses[group]) for middle, group in groups.items()},
    }


def rotation(d_model: int = 16, length: int = 5000) -> tuple[np.ndarray, float]:
    """The matrix that turns each position's vector into that of `SHIFT` positions later, and its largest error."""
    vectors = np.asarray(sinusoidal_positions(jnp.arange(length + SHIFT), d_model), np.float64)
    matrix, *_ = np.linalg.lstsq(vectors[:length], vectors[SHIFT:], rcond=None)
    return matrix.T, float(np.abs(vectors[:length] @ matrix - vectors[SHIFT:]).max())


def change_by_shuffling(variant: Variant, seed: int, folder: Path) -> float:
    """How far a word's vector moves when the words of a phrase are shuffled, relative to its length."""
    model = TrainedModel.load(trained(variant, seed, folder).path)
    source = phrases(PAIRS, 2)[0]
    words = next(row for row in model.vocabularies.source.encode(source) if 10 <= len(row) <= TRAINED)[:-1]
    ids, order = np.array([words]), np.random.default_rng(seed).permutation(len(words))
    with variant.in_place():
        encode = jax.jit(
            lambda source: Transformer(model.config).apply(
                {"params": model.params}, source, deterministic=True, method="encode"
            )
        )
        memory, shuffled = encode(ids)[:, order], encode(ids[:, order])
    return float(jnp.linalg.norm(memory - shuffled) / jnp.linalg.norm(memory))


def measure(folder: Path) -> Results:
    """All of it."""
    matrix, error = rotation()
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for title, variant in VARIANTS.items():
        found[title] = {"right": defaultdict(list), "loss": defaultdict(list)}
        for seed in SEEDS:
            for kind, curve in by_length(variant, seed, folder).items():
                for length, value in curve.items():
                    found[title][kind][length].append(value)
    return {
        "by_length": found,
        "rotation": matrix.round(6).tolist(),
        "rotation_error": error,
        "change_by_shuffling": {
            title: [change_by_shuffling(variant, seed, folder) for seed in SEEDS] for title, variant in VARIANTS.items()
        },
    }


def draw_rotation(matrix: np.ndarray) -> Figure:
    """The matrix as a heat map."""
    figure, grid = make_panels(1, 1, (3.6, 3.2))
    image = grid[0, 0].imshow(matrix, cmap=SIGNED, vmin=-1, vmax=1)
    grid[0, 0].set(
        title=f"One matrix moves all positions by {SHIFT}:\neach pair of features turns by its own angle",
        xlabel="feature of PE(p)",
        ylabel=f"feature of PE(p + {SHIFT})",
    )
    tidy_bar(figure.colorbar(image, ax=grid[0, 0], label="factor"))
    return figure


def draw(results: Results) -> Mapping[str, Figure]:
    """Both curves over the length, the rotation, and what shuffling does."""
    labels = {"right": "translated exactly, %", "loss": "loss of the right translation, nats per token"}
    panels = [
        Curves(
            title=title,
            x_label="length of the phrase or its translation, tokens",
            y_label=labels[kind],
            curves={
                name: {float(length): values for length, values in curves[kind].items()}
                for name, curves in results["by_length"].items()
            },
        )
        for kind, title in (("right", "Whole phrases"), ("loss", "Token by token, the right ones before given"))
    ]
    figure = plot_curves(panels, title=f"Trained on phrases of up to {TRAINED} tokens: left of the dotted line")
    for axes in figure.axes:
        axes.axvline(TRAINED + 0.5, color="#808790", linestyle=":")
    return {
        "positions": figure,
        "positions_rotation": draw_rotation(np.array(results["rotation"])),
        "positions_shuffled": plot_scores(
            {"How far words' vectors move when the words are shuffled": results["change_by_shuffling"]},
            x_label="distance, relative to the vectors' length",
            digits=2,
        ),
    }


if __name__ == "__main__":
    run("positions", measure, draw)
