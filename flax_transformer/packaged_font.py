"""Where the font is that comes with the extras `plots` and `serve`: Kurinto Sans, of the package weblate-fonts.

It has the letters of nearly all scripts but Chinese, Japanese and Korean ones, so nothing is missing on a machine that
has no fonts of its own.
"""

import importlib.util
from pathlib import Path

PACKAGE = "weblate_fonts"
FILE = "static/weblate_fonts/kurinto/ttf/KurintoSans-Rg.ttf"


def packaged_font() -> Path | None:
    """The file; `None` if the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    folders = found.submodule_search_locations if found else None
    path = Path(folders[0]) / FILE if folders else None
    return path if path is not None and path.exists() else None
