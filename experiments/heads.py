"""Claim 7: several small heads do more than a large one, each has its own job, and some can be spared.

    python -m experiments.heads

Models with 1, 4 and 16 heads of together 64 features. In the quick start's model, which has learned its task: how much
of its weight each head gives to the token before, to the token itself, to the end of the sentence and, in
cross-attention, to the same digits; and how many phrases remain right when a single head gives nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib import colormaps

from experiments.command import Results, run
from experiments.trainings import BASE, ONE_HEAD, QUICKSTART, SIXTEEN_HEADS, all_scores, exactly_right, phrases, trained
from flax_transformer.charts import plot_scores
from flax_transformer.decoding.translator import Translator
from flax_transformer.figures import HIDDEN, INK, WEIGHTS, Figure, make_panels, tidy_bar
from flax_transformer.trained_model import TrainedModel

VARIANTS = {"1 head of 64": ONE_HEAD, "4 heads of 16": BASE, "16 heads of 4": SIXTEEN_HEADS}
KINDS = {"encoder": "self_attention", "decoder": "self_attention", "cross": "cross_attention"}
PAIRS = 200
JOBS = ("token before", "token itself", "end of sentence", "same digit")


def without_head(model: TrainedModel, kind: str, layer: int, head: int) -> TrainedModel:
    """The model with a head that gives nothing: its rows of the output projection are zero."""
    stack = "encoder" if kind == "encoder" else "decoder"
    path = (stack, f"layers_{layer}", KINDS[kind], "out", "kernel")
    size = model.config.d_model // model.config.num_heads

    def changed(found: Sequence[jax.tree_util.DictKey], leaf: jax.Array) -> jax.Array:
        if tuple(key.key for key in found) != path:
            return leaf
        return leaf.at[head * size : (head + 1) * size].set(0)

    params = jax.tree_util.tree_map_with_path(changed, model.params)
    return TrainedModel(model.config, params, model.vocabularies)


def all_heads(model: TrainedModel) -> list[tuple[str, int, int]]:
    """Kind, layer and number of each head."""
    layers = {"encoder": model.config.num_encoder_layers}
    return [
        (kind, layer, head)
        for kind in KINDS
        for layer in range(layers.get(kind, model.config.num_decoder_layers))
        for head in range(model.config.num_heads)
    ]


def jobs(weights: np.ndarray, queries: Sequence[str], memory: Sequence[str], kind: str) -> list[float]:
    """The share of a head's weight for each job, [Q, M] in; NaN where there is no such job.

    In the decoder, place m holds the token before the one that is predicted, and it never sees the end.
    """
    rows, columns = np.indices(weights.shape)
    before, itself = (float(weights[columns == rows - back].sum() / len(rows)) for back in (1, 0))
    end = float(weights[:, -1].sum() / len(rows))
    digits = np.array([[query == place and query.strip("▁").isdigit() for place in memory] for query in queries])
    asked = digits.any(axis=1)
    same = float((weights * digits)[asked].sum() / asked.sum()) if asked.any() else np.nan
    return {
        "encoder": [before, itself, end, np.nan],
        "decoder": [before, itself, np.nan, np.nan],
        "cross": [np.nan, np.nan, end, same],
    }[kind]


def look(model: TrainedModel, pairs: int = PAIRS) -> dict[str, list[float | None]]:
    """The jobs of each head, averaged over phrases; `None` where there is no such job."""
    translator = Translator(model)
    source, target = phrases(pairs, 2)
    sides = translator.vocabularies.source, translator.vocabularies.target
    found: dict[str, list[list[float]]] = {}
    for source_ids, target_ids in zip(sides[0].encode(source), sides[1].encode(target), strict=True):
        seen = translator.inspector.inspect(source_ids, target_ids)
        words = sides[0].pieces(source_ids), sides[1].pieces(target_ids)
        for kind in KINDS:
            queries, memory = words[kind != "encoder"], words[kind == "decoder"]
            if kind == "decoder":  # what it reads is the target shifted right
                queries = memory = ["<s>", *memory[:-1]]
            for layer in range(seen.layers(kind)):
                for head, weights in enumerate(seen.heads(kind, layer)):
                    name = f"{kind} {layer + 1}.{head + 1}"
                    found.setdefault(name, []).append(jobs(weights, queries, memory, kind))
    translator.close()
    means = {name: np.ma.masked_invalid(np.array(rows)).mean(axis=0) for name, rows in found.items()}
    return {name: row.tolist() for name, row in means.items()}


def prune(model: TrainedModel) -> dict[str, float]:
    """The percentage of phrases that are exactly right with all heads (""), and without one."""
    source, target = phrases(PAIRS, 2)

    def right(changed: TrainedModel) -> float:
        translator = Translator(changed)
        found = exactly_right(translator, source, target)
        translator.close()
        return found

    without = {
        f"{kind} {layer + 1}.{head + 1}": right(without_head(model, kind, layer, head))
        for kind, layer, head in all_heads(model)
    }
    return {"": right(model)} | without


def measure(folder: Path) -> Results:
    """The scores; and of the quick start's model, what heads look at and what is lost without them."""
    scores = all_scores(VARIANTS, folder)
    model = TrainedModel.load(trained(QUICKSTART, QUICKSTART.seeds[0], folder).path)
    return {"scores": scores, "jobs": look(model), "pruned": prune(model)}


def draw_jobs(found: Mapping[str, Sequence[float | None]]) -> Figure:
    """A row for each head, a column for each job."""
    figure, grid = make_panels(1, 1, (3.2, 0.26 * len(found)), 1.4)
    axes = grid[0, 0]
    shares = np.array([[np.nan if share is None else share for share in row] for row in found.values()])
    colors = colormaps[WEIGHTS].with_extremes(bad=HIDDEN)
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "white" if share > 0.6 else INK
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, size=8)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xticks(range(len(JOBS)), JOBS, rotation=30, ha="right")
    axes.tick_params(length=0)
    axes.set(
        title="What each head gives its weight to",
        xlabel="grey: not counted for this kind of attention",
        ylabel="attention (cross: from the decoder to the source), layer.head",
    )
    tidy_bar(figure.colorbar(image, ax=axes, label="share of the head's weight"))
    return figure


def draw(results: Results) -> Mapping[str, Figure]:
    """Scores, jobs, and what is lost without each head."""
    right = {title: scores["exact_match"] for title, scores in results["scores"].items()}
    lost = {name: [results["pruned"][""] - rest] for name, rest in results["pruned"].items() if name}
    worst = sorted(lost, key=lambda name: -lost[name][0])
    shown = {name: lost[name] for name in (*worst[:6], *worst[-3:])}
    return {
        "heads": plot_scores({"Translations exactly right": right}, x_label="% of the test set"),
        "heads_jobs": draw_jobs(results["jobs"]),
        "heads_pruned": plot_scores(
            {"Without one head: the six worst losses, the three least": shown}, x_label="percentage points lost"
        ),
    }


if __name__ == "__main__":
    run("heads", measure, draw)
