"""Claim 8: the feed-forward network adds to what attention gathers; 3 * d_model is nearly as good as 4 * d_model.

    python -m experiments.feed_forward

Models without it, with 3 * d_model (the tutorial's) and with 4 * d_model (the paper's). And what single neurons of the
first encoder layer of the quick start's model answer to: the source pieces at which they are largest.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from experiments.command import Results, padded, run
from experiments.trainings import BASE, NO_FEED_FORWARD, QUICKSTART, WIDER, all_scores, phrases, trained
from flax_transformer.charts import plot_scores
from flax_transformer.figures import INK, WEIGHTS, Figure, make_panels, tidy_bar
from flax_transformer.fonts import font_families
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel

VARIANTS = {"none": NO_FEED_FORWARD, "3 · d_model": BASE, "4 · d_model": WIDER}
PAIRS = 500
NEURONS = 8
PIECES = 5
SEEN = 5  # times that a piece must occur to count


def choosy_neurons(model: TrainedModel) -> list[dict[str, float]]:
    """For the neurons that are choosiest, the pieces at which they are largest on average, relative to the largest."""
    source, _ = phrases(PAIRS, 2)
    ids = padded(model.vocabularies.source.encode(source))
    transformer = Transformer(model.config)
    is_inner = lambda module, _: module.path == ("encoder", "layers_0", "feed_forward", "inner")  # noqa: E731
    _, kept = jax.jit(
        lambda ids: transformer.apply(
            {"params": model.params},
            ids,
            deterministic=True,
            method="encode",
            capture_intermediates=is_inner,
            mutable="intermediates",
        )
    )(ids)
    (inner,) = jax.tree.leaves(kept)
    activations = np.maximum(np.asarray(inner), 0)  # ReLU
    by_piece: dict[int, list[np.ndarray]] = defaultdict(list)
    for row, sentence in zip(ids, activations, strict=True):
        for piece, values in zip(row, sentence, strict=True):
            if piece:
                by_piece[int(piece)].append(values)
    means = {piece: np.mean(values, axis=0) for piece, values in by_piece.items() if len(values) >= SEEN}
    table = np.stack(list(means.values()))  # [pieces, neurons]
    alive = table.max(axis=0) > 0.5
    choosy = np.where(alive, table.max(axis=0) / (table.mean(axis=0) + 1e-3), 0)
    names = model.vocabularies.source.pieces(means)
    found, used = [], set()
    for neuron in np.argsort(-choosy):
        best = np.argsort(-table[:, neuron])[:PIECES]
        if not choosy[neuron]:
            break
        if best[0] in used:
            continue  # another neuron for the same piece
        used.add(best[0])
        largest = table[best[0], neuron]
        found.append({names[piece]: round(float(table[piece, neuron] / largest), 3) for piece in best})
        if len(found) == NEURONS:
            break
    return found


def measure(folder: Path) -> Results:
    """The scores, and the neurons."""
    learned = TrainedModel.load(trained(QUICKSTART, QUICKSTART.seeds[0], folder).path)
    return {"scores": all_scores(VARIANTS, folder), "neurons": choosy_neurons(learned)}


def draw_neurons(neurons: list[dict[str, float]]) -> Figure:
    """A row for each neuron, with the pieces that excite it most."""
    figure, grid = make_panels(1, 1, (6.0, 0.36 * len(neurons)), 1.0)
    axes = grid[0, 0]
    strengths = np.array([list(neuron.values()) for neuron in neurons])
    image = axes.imshow(strengths, cmap=WEIGHTS, vmin=0, vmax=1, aspect="auto")
    for row, neuron in enumerate(neurons):
        for column, (piece, strength) in enumerate(neuron.items()):
            color = "white" if strength > 0.7 else INK
            label = axes.text(column, row, piece, ha="center", va="center", color=color, size=9, parse_math=False)
            label.set_fontfamily(font_families(piece))
    axes.set_xticks(range(PIECES), ["most", *range(2, PIECES + 1)])
    axes.set_yticks(range(len(neurons)), range(1, len(neurons) + 1))
    axes.tick_params(length=0)
    axes.set(
        title="What eight neurons of the first encoder layer answer to",
        xlabel="source piece, by activation",
        ylabel="neuron",
    )
    tidy_bar(figure.colorbar(image, ax=axes, label="mean activation ÷ the neuron's largest"))
    return figure


def draw(results: Results) -> Mapping[str, Figure]:
    """Both."""
    right = {title: scores["exact_match"] for title, scores in results["scores"].items()}
    return {
        "feed_forward": plot_scores({"Translations exactly right": right}, x_label="% of the test set"),
        "feed_forward_neurons": draw_neurons(results["neurons"]),
    }


if __name__ == "__main__":
    run("feed_forward", measure, draw)
