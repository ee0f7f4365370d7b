"""Claim 9: more layers translate better, and alignments become sharper with depth. Is it so?

    python -m experiments.depth

Models of one, two and five encoder and decoder layers; and, in the deepest one, how sure each decoder layer is where to
look: the mean entropy of its heads, over the test set's first phrases.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.command import Results, run
from experiments.trainings import BASE, GREEDY, LAYERS, SEEDS, all_scores, phrases, trained
from flax_transformer.charts import Curves, plot_curves, plot_scores
from flax_transformer.decoding.translator import Translator
from flax_transformer.figures import Figure
from flax_transformer.plots import plot_attention

VARIANTS = {"1 + 1 layers": LAYERS[1], "2 + 2 layers": BASE, "5 + 5 layers": LAYERS[5]}
DEEPEST = LAYERS[5]
PAIRS = 100
EXAMPLE = 3


def entropies(seed: int, folder: Path) -> list[float]:
    """The mean entropy in nats of the heads of each decoder layer's cross-attention.

    The end of the source is left out, and what heads give to the words adds up to 1 again: to look at the end of a
    sentence is to look at nothing.
    """
    translator = Translator.from_workdir(trained(DEEPEST, seed, folder).path)
    source, _ = phrases(PAIRS, 2)
    vocabularies = translator.vocabularies
    translations = translator.translate(source, GREEDY)
    found: list[list[float]] = [[] for _ in range(translator.config.num_decoder_layers)]
    for source_ids, target_ids in zip(
        vocabularies.source.encode(source), vocabularies.target.encode(translations), strict=True
    ):
        seen = translator.inspector.inspect(source_ids, target_ids)
        for layer, means in enumerate(found):
            words = np.maximum(seen.heads("cross", layer)[:, :-1, :-1], 1e-9)
            words /= words.sum(axis=-1, keepdims=True)
            means.append(float(-(words * np.log(words)).sum(axis=-1).mean()))
    translator.close()
    return [float(np.mean(means)) for means in found]


def example(folder: Path) -> Results:
    """What each layer of the deepest model attends to in one phrase."""
    translator = Translator.from_workdir(trained(DEEPEST, SEEDS[0], folder).path)
    source = phrases(PAIRS, 2)[0][EXAMPLE : EXAMPLE + 1]
    translation = translator.translate(source, GREEDY)
    layers = [
        translator.align(source, translation, layer=layer)[0] for layer in range(translator.config.num_decoder_layers)
    ]
    translator.close()
    return {
        "source": layers[0].source_tokens,
        "target": layers[0].target_tokens,
        "weights": [layer.weights.astype(float).round(3).tolist() for layer in layers],
    }


def measure(folder: Path) -> Results:
    """The scores, the entropies by layer and seed, and an example."""
    return {
        "scores": all_scores(VARIANTS, folder),
        "entropies": [entropies(seed, folder) for seed in SEEDS],
        "example": example(folder),
    }


def draw(results: Results) -> Mapping[str, Figure]:
    """Scores, entropies, and the example layer by layer."""
    right = {title: scores["exact_match"] for title, scores in results["scores"].items()}
    layers = dict(enumerate(zip(*results["entropies"], strict=True), 1))
    sure = Curves(
        title="How sure each decoder layer is where to look",
        x_label="decoder layer",
        y_label="entropy of cross-attention, nats",
        curves={"5 + 5 layers": layers},
    )
    entropy = plot_curves([sure])
    entropy.axes[0].set_ylim(bottom=0)
    shown = results["example"]
    pictures = plot_attention(
        np.array(shown["weights"]),
        shown["source"],
        shown["target"],
        title="Cross-attention of each decoder layer, mean of its heads",
        head_titles=[f"layer {number}" for number in range(1, len(shown["weights"]) + 1)],
    )
    return {
        "depth": plot_scores({"Translations exactly right": right}, x_label="% of the test set"),
        "depth_entropy": entropy,
        "depth_layers": pictures,
    }


if __name__ == "__main__":
    run("depth", measure, draw)
