import re
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from flax_transformer.charts import plot_scores
from flax_transformer.figures import GRID, LINES, save


def test_a_saved_figure_is_the_same_each_time_has_no_background_and_suits_dark_pages(tmp_path):
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        save(plot_scores({"phrases": {"ವರ್ಷ": [1.0, 2.0]}}, x_label="%"), path)
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text and "<text" not in text  # letters are outlines
    assert "fill: #ffffff" not in text
    # Every colour is one that the dark style changes, or one that is seen on light and dark.
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text.split("</style>")[1]))
    assert used <= {"#000000", GRID, *LINES}
