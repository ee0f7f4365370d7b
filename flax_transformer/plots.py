"""Draws masks, position vectors, learning-rate schedules, losses and attention weights with matplotlib.

Glossary: B batch, H heads, Q query positions, M memory positions, S source, T target, P positions, D d_model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flax_transformer.figures import (
    HIDDEN,
    LINES,
    SIGNED,
    VISIBLE,
    WEIGHTS,
    Axes,
    Figure,
    check_some,
    make_panels,
    tidy_bar,
    tidy_lines,
    whole_numbers,
)
from flax_transformer.fonts import font_families

from matplotlib.axis import Axis, XAxis  # isort: skip: figures.py says what to install where it is missing
from matplotlib.colors import ListedColormap  # isort: skip
from matplotlib.patches import Patch  # isort: skip

CELL = 0.3  # inches; enough for a token's label
WIDEST = 11.0  # inches; a notebook shrinks wider figures until they are unreadable
MOST_NUMBERS = 12  # masks of at most this many positions show the number in each cell


def plot_masks(
    masks: Mapping[str, Float[jax.Array | np.ndarray, "..."]],
    *,
    query_tokens: Sequence[str] | None = None,
    memory_tokens: Sequence[str] | None = None,
) -> Figure:
    """Draws additive masks side by side, with one row of panels for each row of the batch.

    Masks are first broadcast against each other, as in attention, so a padding mask shows the same row for every query.

    Args:
        masks: masks of 0 and -inf that broadcast to [B, 1, Q, M], by name.
        query_tokens: Q labels; position numbers if not given.
        memory_tokens: M labels; position numbers if not given.

    Raises:
        ValueError: there are no masks, a mask has the wrong shape or holds other numbers, or the number of labels is
            wrong.
    """
    check_some(masks, "masks")
    for name, mask in masks.items():
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"mask {name!r} has shape {mask.shape}: give it [B, 1, Q, M]")
        if strange := set(np.unique(mask)) - {0.0, -np.inf}:
            raise ValueError(f"mask {name!r} holds {min(strange)}: an additive mask may only hold 0 and -inf")
    visible = {
        name: panels[:, 0]
        for name, panels in zip(masks, np.broadcast_arrays(*(np.asarray(m) == 0 for m in masks.values())), strict=True)
    }
    batch, queries, memory = next(iter(visible.values())).shape
    size = _cells(memory, memory_tokens), _cells(queries, query_tokens)
    figure, grid = make_panels(batch, len(visible), size, _room(query_tokens), _room(memory_tokens) + 0.3)
    for column, (name, panels) in enumerate(visible.items()):
        for row, panel in enumerate(panels):
            axes = grid[row, column]
            axes.imshow(panel, cmap=ListedColormap([HIDDEN, VISIBLE]), vmin=0, vmax=1, aspect="equal")
            if max(queries, memory) <= MOST_NUMBERS:
                _write_numbers(axes, panel)
            _separate_cells(axes, panel.shape, "white")
            _label_positions(axes.yaxis, query_tokens, queries, "query_tokens", "queries")
            _label_positions(axes.xaxis, memory_tokens, memory, "memory_tokens", "memory positions")
            axes.set_xlabel("memory position")
        grid[0, column].set_title(name)
    for row, axes in enumerate(grid[:, 0]):
        axes.set_ylabel("query" if batch == 1 else f"query, batch row {row}")
    legend = [Patch(color=VISIBLE, label="0: visible"), Patch(color=HIDDEN, label="−∞: hidden")]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_positions(encodings: Mapping[str, Float[jax.Array | np.ndarray, "P D"]]) -> Figure:
    """Draws position vectors as heat maps side by side, with a row for each position and a column for each feature.

    Args:
        encodings: sinusoidal or learned position vectors, by name.

    Raises:
        ValueError: there are no vectors.
    """
    check_some(encodings, "encodings")
    figure, grid = make_panels(1, len(encodings), (4.2, 3.4))
    limit = max(float(np.abs(vectors).max(initial=0)) for vectors in encodings.values())
    for axes, (name, vectors) in zip(grid[0], encodings.items(), strict=True):
        image = axes.imshow(
            np.asarray(vectors), cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axes.set_title(name)
        axes.set_xlabel("feature")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(whole_numbers())
    grid[0, 0].set_ylabel("position")
    tidy_bar(figure.colorbar(image, ax=list(grid[0]), label="value", aspect=28, pad=0.02))
    return figure


def plot_schedules(schedules: Mapping[str, Callable[[Any], Any]], steps: int) -> Figure:
    """Draws learning rates over the updates of a training.

    Args:
        schedules: functions by name; each gives the learning rate of an update, counted from 0, and must be traceable
            by jax.
        steps: number of updates.

    Raises:
        ValueError: there are no schedules, or `steps` is below 1.
    """
    check_some(schedules, "schedules")
    if steps < 1:
        raise ValueError(f"steps is {steps}: draw at least 1")
    figure, grid = make_panels(1, 1, (6.4, 3.2))
    axes = grid[0, 0]
    updates = np.arange(steps)
    for number, (name, schedule) in enumerate(schedules.items()):
        rates = np.asarray(jax.vmap(lambda update, schedule=schedule: jnp.asarray(schedule(update)))(updates))
        axes.plot(updates, rates, label=name, color=LINES[number % len(LINES)], linewidth=2)
    axes.set(title="Learning rate", xlabel="update", ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    tidy_lines(axes)
    return figure


def plot_attention(
    weights: Float[jax.Array | np.ndarray, "*H T S"],
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    *,
    title: str = "Attention",
    head_titles: Sequence[str] | None = None,
) -> Figure:
    """Draws how much each target token of a sentence attends to each source token, in one panel per head.

    Row t of the cross-attention is the query that predicts target token t. For self-attention, give the same tokens as
    source and target; the decoder's tokens are its input, which is the target shifted right.

    Args:
        weights: the attention weights of one layer and one sentence, from 0 to 1.
        source_tokens: the S tokens that are attended to.
        target_tokens: the T tokens that attend.
        title: the title of the figure.
        head_titles: the titles of the panels; "head 0", "head 1" and so on if not given.

    Raises:
        ValueError: the weights have the wrong dimensions, or do not fit the tokens or the titles.
    """
    if weights.ndim not in (2, 3):
        raise ValueError(f"weights have shape {weights.shape}: choose one layer and one sentence, [H, T, S] or [T, S]")
    heads = np.asarray(weights).reshape(-1, *weights.shape[-2:])
    if head_titles is None:
        head_titles = [f"head {number}" for number in range(len(heads))] if weights.ndim == 3 else [""]
    if len(head_titles) != len(heads):
        raise ValueError(f"head_titles has {len(head_titles)} entries for {len(heads)} heads: give one for each")
    targets, sources = heads.shape[1:]
    size = _cells(sources, source_tokens), _cells(targets, target_tokens)
    rows = math.ceil(len(heads) / max(1, int(WIDEST / size[0])))
    figure, grid = make_panels(
        rows, math.ceil(len(heads) / rows), size, _room(target_tokens) + 0.6, _room(source_tokens)
    )
    for axes in grid.flat[len(heads) :]:
        axes.set_axis_off()
    for axes, head, head_title in zip(grid.flat, heads, head_titles, strict=False):
        image = axes.imshow(head, cmap=WEIGHTS, vmin=0, vmax=1, aspect="equal", interpolation="nearest")
        axes.set_title(head_title)
        _separate_cells(axes, head.shape, HIDDEN)
        _label_positions(axes.yaxis, target_tokens, targets, "target_tokens", "rows of weights")
        _label_positions(axes.xaxis, source_tokens, sources, "source_tokens", "columns of weights")
        axes.set_xlabel("memory position")
    for axes in grid[:, 0]:
        axes.set_ylabel("query")
    figure.suptitle(title, fontfamily=font_families(title), parse_math=False)
    tidy_bar(figure.colorbar(image, ax=grid.ravel().tolist(), label="weight", aspect=28, pad=0.02))
    return figure


def plot_links(
    weights: Float[jax.Array | np.ndarray, "T S"],
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    *,
    title: str = "Alignment",
    shown: int | None = None,
) -> Figure:
    """Draws an alignment as lines between two rows of words, the thicker the more a target attends to a source word.

    Where the lines cross, the two languages have other word orders.

    Args:
        weights: how much each target token attends to each source token, from 0 to 1.
        source_tokens: the S tokens of the upper row.
        target_tokens: the T tokens of the lower row.
        title: the title of the figure.
        shown: how many target tokens have been written so far, the last one of them being emphasised; all if not given.

    Raises:
        ValueError: the weights do not fit the tokens.
    """
    heads = np.asarray(weights)
    if heads.shape != (len(target_tokens), len(source_tokens)):
        raise ValueError(
            f"weights have shape {heads.shape}, there are {len(target_tokens)} target and {len(source_tokens)} source "
            "tokens: give [T, S]"
        )
    rows = (1.0, source_tokens), (0.0, target_tokens)
    lengths = [[max(len(token), 1) + 1.5 for token in tokens] for _, tokens in rows]
    widest = max(map(sum, lengths))
    figure, grid = make_panels(1, 1, (min(max(0.13 * widest, 4.8), WIDEST), 2.0), 0.2, 0.2)
    axes = grid[0, 0]
    places = [(np.cumsum(sizes) - np.array(sizes) / 2) * widest / sum(sizes) for sizes in lengths]
    last = len(target_tokens) if shown is None else shown
    for (target, source), weight in np.ndenumerate(heads[:last]):
        new = shown is None or target == last - 1
        if weight > 0.05:
            ends = [places[0][source], places[1][target]], [0.9, 0.1]
            axes.plot(*ends, color=LINES[0 if new else 5], lw=4 * weight, alpha=float(min(1, 0.2 + weight)))
    for (height, tokens), middle in zip(rows, places, strict=True):
        for number, (x, token) in enumerate(zip(middle, tokens, strict=True)):
            hidden = height == 0 and number >= last
            label = axes.text(x, height, token, ha="center", va="center", fontsize=10, parse_math=False)
            label.set(fontfamily=font_families(token), alpha=0.0 if hidden else 1.0)
    axes.set(xlim=(0, widest), ylim=(-0.2, 1.2))
    axes.set_title(title, fontfamily=font_families(title), parse_math=False)
    axes.set_axis_off()
    return figure


def plot_training(lines: Iterable[Mapping[str, Any]]) -> Figure:
    """Draws how the loss of training and that of the validation corpus fell.

    Both are cross-entropy in nats per token; training's is measured with dropout, so it may be the higher one.

    Args:
        lines: those of `metrics.jsonl`, as `WorkDirectory.read_metrics` returns them; of lines of one step the last
            counts.

    Raises:
        ValueError: no line has a loss.
    """
    curves: dict[str, dict[int, float]] = {"train": {}, "valid": {}}
    for line in lines:
        # A line has null where all updates were skipped.
        loss = line.get("cross_entropy" if line.get("kind") == "train" else "loss")
        if line.get("kind") in curves and loss is not None:
            curves[line["kind"]][line["step"]] = loss
    if not any(curves.values()):
        raise ValueError("no line has a loss of training or of a validation corpus: train first")
    figure, grid = make_panels(1, 1, (6.4, 3.2))
    axes = grid[0, 0]
    for (name, curve), color in zip(curves.items(), LINES, strict=False):
        steps = sorted(curve)
        marker = "o" if name == "valid" else None
        axes.plot(steps, [curve[step] for step in steps], label=name, color=color, linewidth=2, marker=marker)
    axes.set(title="Loss", xlabel="update", ylabel="nats per token", ylim=(0, None))
    tidy_lines(axes)
    return figure


def picture_formats() -> list[str]:
    """The endings of file names in which a figure can be written, e.g. png, svg and pdf."""
    return sorted(Figure().canvas.get_supported_filetypes())


def _cells(count: int, tokens: Sequence[str] | None) -> float:
    """The side of a panel of `count` cells, in inches."""
    return min(max(CELL * count, 1.8), 3.4 if tokens is None else WIDEST)


def _room(tokens: Sequence[str] | None) -> float:
    """The room that an axis needs for its labels, in inches."""
    return 0.6 + 0.07 * max(map(len, tokens or [""]), default=0)


def _write_numbers(axes: Axes, visible: np.ndarray) -> None:
    for (query, position), seen in np.ndenumerate(visible):
        text, color = ("0", "white") if seen else ("−∞", "#8b93a3")
        axes.text(position, query, text, color=color, fontsize=8, ha="center", va="center")


def _separate_cells(axes: Axes, shape: tuple[int, ...], color: str) -> None:
    """Draws thin lines between and around the cells instead of a black frame."""
    for axis, count in ((axes.yaxis, shape[0]), (axes.xaxis, shape[1])):
        axis.set_ticks(np.arange(1, count) - 0.5, minor=True)
    axes.grid(which="minor", color=color, linewidth=0.8 if max(shape) <= MOST_NUMBERS else 0.4)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color(color)


def _label_positions(axis: Axis, tokens: Sequence[str] | None, count: int, name: str, what: str) -> None:
    """Labels an axis with tokens, or with position numbers if there are none."""
    if tokens is None:
        axis.set_major_locator(whole_numbers())
        return
    if len(tokens) != count:
        raise ValueError(f"{name} has {len(tokens)} tokens, there are {count} {what}: give one for each")
    # Otherwise dollar signs, as in prices, would start a formula.
    axis.set_ticks(range(count), tokens, fontfamily=font_families("".join(tokens)), fontsize=8, parse_math=False)
    if isinstance(axis, XAxis):
        for label in axis.get_ticklabels():
            label.set(rotation=60, rotation_mode="anchor", ha="right", va="center")
