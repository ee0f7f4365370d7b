"""What all figures share: colours, panels, and a form in which they suit light and dark pages.

The figures do not use pyplot, so you need not close them: `figure.savefig(path)` writes one to a file, and a notebook
that has run `%matplotlib inline` shows it if it is the value of a cell.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'flax_transformer draws with matplotlib ({error}): pip install "flax_transformer[plots]"', name=error.name
    ) from error

# Kinds of colour vision tell these lines apart (Okabe and Ito, 2008, https://jfly.uni-koeln.de/color).
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
HIDDEN, VISIBLE = "#e9ecf1", "#2f6690"
GRID = "#dfe3e8"
INK = "#1f2328"  # for text on light cells, whatever the page
WEIGHTS = "Blues"
SIGNED = "RdBu_r"
# Where a page is dark, black ink is drawn light, and the grid nearly as dark as the page.
DARK_STYLE = f"""<style>@media (prefers-color-scheme: dark) {{
svg {{ fill: #e6edf3 }}
[style*="stroke: #000000"] {{ stroke: #e6edf3 !important }}
[style*="stroke: {GRID}"] {{ stroke: #363d47 !important }}
[style*="fill: {HIDDEN}"] {{ fill: #363d47 !important }}
}}</style>
"""


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as SVG: letters are outlines, which need no font, and it is light or dark as its page is.

    The same figure gives the same bytes.
    """
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "flax_transformer"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    start = text.index(">", text.index("<svg")) + 1
    lines = (text[:start] + "\n" + DARK_STYLE + text[start:]).splitlines()
    Path(path).write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def make_panels(
    rows: int,
    columns: int,
    size: tuple[float, float],
    left: float = 0.6,
    below: float = 0.6,
    *,
    share_y: bool = True,
) -> tuple[Figure, np.ndarray]:
    """Makes a figure and its axes, by row; panel size and the room left of all panels and below each are in inches."""
    width, height = columns * (size[0] + 0.3) + left, rows * (size[1] + below + 0.3) + 0.3
    figure = Figure(figsize=(width, height), layout="compressed")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y)


def tidy_lines(axes: Axes) -> None:
    """Gives axes with lines a grid and a legend, and takes away what the eye does not need."""
    axes.margins(x=0.01)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 3:  # it would hide some of them
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axes.legend(frameon=False)


def check_some(mapping: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if there is nothing to draw."""
    if not mapping:
        raise ValueError(f"{name} is empty: give at least one, with the name to show above it")


def whole_numbers() -> MaxNLocator:
    """Ticks of an axis that counts."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def twos_and_fives() -> LogLocator:
    """Ticks between the powers of ten."""
    return LogLocator(subs=(2, 5))


def tidy_bar(bar: Any) -> None:
    """Takes the frame from a colour bar."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
