"""Draws measured numbers: curves over something that varies, and scores of several seeds side by side."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from flax_transformer.figures import (
    GRID,
    LINES,
    Figure,
    check_some,
    make_panels,
    tidy_lines,
    twos_and_fives,
    whole_numbers,
)
from flax_transformer.fonts import font_families

MARKERS = "osD^vP"  # the shapes tell curves apart where colours do not
ROW = 0.42  # inches, for a row of dots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """One panel of curves.

    Attributes:
        title: what one sees.
        x_label: what the horizontal axis counts, with its unit.
        y_label: what was measured, with its unit.
        curves: the measured values by x, by name; several values at one x are several seeds.
        log_x: whether the horizontal axis has powers.
        log_y: whether the vertical axis has powers.
        markers: whether to show each x by a dot.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Mapping[float, float | Sequence[float]]]
    log_x: bool = False
    log_y: bool = False
    markers: bool = True


def plot_curves(panels: Sequence[Curves], *, title: str = "") -> Figure:
    """Draws curves: a line through the means of the seeds, and a band from the lowest to the highest.

    Args:
        panels: what to draw, from left to right.
        title: the title of the figure.

    Raises:
        ValueError: there are no panels, or a panel has no curves.
    """
    check_some({panel.title: panel for panel in panels}, "panels")
    figure, grid = make_panels(1, len(panels), (4.6 if len(panels) < 3 else 3.6, 3.0), 0.7 * len(panels), share_y=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        check_some(panel.curves, "curves")
        for number, (name, curve) in enumerate(panel.curves.items()):
            where = sorted(curve)
            values = [np.atleast_1d(curve[x]) for x in where]
            color = LINES[number % len(LINES)]
            marker = MARKERS[number % len(MARKERS)] if panel.markers else None
            axes.plot(where, [np.mean(v) for v in values], label=name, color=color, marker=marker, markersize=5, lw=2)
            axes.fill_between(where, [np.min(v) for v in values], [np.max(v) for v in values], color=color, alpha=0.2)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if not panel.log_x and all(x == int(x) for curve in panel.curves.values() for x in curve):
            axes.xaxis.set_major_locator(whole_numbers())
        if panel.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.3g}")
        if panel.log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            few = np.ptp(np.log10(axes.get_ylim())) < 2  # powers of ten that are seen
            axes.yaxis.set_minor_locator(twos_and_fives())
            axes.yaxis.set_minor_formatter("{x:g}" if few else "")
        tidy_lines(axes)
    figure.suptitle(title)
    return figure


def plot_scores(
    groups: Mapping[str, Mapping[str, Sequence[float]]], *, x_label: str, title: str = "", digits: int = 1
) -> Figure:
    """Draws scores as dots: a row for each variant, a dot for each seed, a line at their mean, which is also written.

    Args:
        groups: the seeds' scores by variant, by the title of the panel.
        x_label: what was measured, with its unit.
        title: the title of the figure.
        digits: decimal places of the means.

    Raises:
        ValueError: there are no groups, or a group has no scores.
    """
    check_some(groups, "groups")
    rows = max(map(len, groups.values()))
    figure, grid = make_panels(1, len(groups), (4.4, 0.5 + ROW * rows), 1.8 * len(groups), share_y=False)
    for axes, (name, scores) in zip(grid[0], groups.items(), strict=True):
        check_some(scores, "scores")
        for row, values in enumerate(scores.values()):
            color = LINES[row % len(LINES)]
            axes.scatter(values, [row] * len(values), s=45, color=color, alpha=0.8, zorder=3)
            mean = float(np.mean(values))
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=color, lw=2)
            axes.annotate(
                f"{mean:.{digits}f}", (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9
            )
        axes.set_yticks(range(len(scores)), list(scores), fontfamily=font_families("".join(scores)), parse_math=False)
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set(title=name, xlabel=x_label)
        axes.margins(x=0.08)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title)
    return figure
