"""Claim 10: cross-attention connects the words of two languages, although their orders differ.

    python -m experiments.word_order

Kannada puts "in" behind its noun and the day before the month. What the quick start's model attends to is drawn for two
phrases with the words of both languages, once as it grows with each chosen token. Counted: how often two links cross;
each target token has one, to the source token with the largest weight.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments.command import FIGURES, Results, run
from experiments.trainings import GREEDY, QUICKSTART, phrases, trained
from flax_transformer.decoding.translator import Translator
from flax_transformer.plots import plot_links

PAIRS = 500
SHOWN = {
    "5 ಗಂಟೆಗಳಲ್ಲಿ": '"in" stands behind its noun in Kannada (above), first in English',
    "20 ಮಾರ್ಚ್ ಅಥವಾ 21 ಏಪ್ರಿಲ್": "Kannada (above) puts the day before the month, English behind it",
}
FRAME_MS = 900


def crossing_share(weights: np.ndarray) -> float:
    """The share of pairs of target tokens whose links to the source cross; the end of sentence is left out."""
    best = weights[:-1, :-1].argmax(axis=1)
    first, second = np.triu_indices(len(best), 1)
    different = best[first] != best[second]
    return float((best[first] > best[second])[different].mean()) if different.any() else 0.0


def measure(folder: Path) -> Results:
    """The alignments that are shown, how many pairs of links cross, and the share of phrases in which any do."""
    translator = Translator.from_workdir(trained(QUICKSTART, QUICKSTART.seeds[0], folder).path)
    source, _ = phrases(PAIRS, 2)
    found = translator.align(source, translator.translate(source, GREEDY), layer=None)
    crossing = np.array([crossing_share(alignment.weights) for alignment in found])
    translations = translator.translate(list(SHOWN), GREEDY)
    shown = [
        {
            "phrase": phrase,
            "source": alignment.source_tokens,
            "target": alignment.target_tokens,
            "weights": alignment.weights.astype(float).round(3).tolist(),
        }
        for phrase, alignment in zip(SHOWN, translator.align(list(SHOWN), translations, layer=None), strict=True)
    ]
    translator.close()
    return {"crossing": float(crossing.mean()), "phrases_crossing": float((crossing > 0).mean()), "shown": shown}


def draw_step(shown: Results, count: int | None = None) -> Figure:
    """The links of the first tokens of a translation."""
    return plot_links(
        np.array(shown["weights"]),
        shown["source"],
        shown["target"],
        title=SHOWN[shown["phrase"]],
        shown=count,
    )


def animate(shown: Results, path: Path) -> None:
    """Writes a GIF in which the translation grows, token by token."""
    frames = []
    for count in range(1, len(shown["target"]) + 1):
        figure = draw_step(shown, count)
        figure.set_dpi(120)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(32))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, optimize=True)


def draw(results: Results) -> Mapping[str, Figure]:
    """One figure for each phrase, and an animation of the first."""
    animate(results["shown"][0], FIGURES / "word_order.gif")
    return {f"word_order_{number}": draw_step(shown) for number, shown in enumerate(results["shown"])}


if __name__ == "__main__":
    run("word_order", measure, draw)
