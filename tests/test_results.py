"""docs/results.md must be what the result files say, and the README's scores must be on it."""

import re
from pathlib import Path

from benchmarks import quality

README = Path(__file__).parents[1] / "README.md"


def test_the_page_is_made_from_the_result_files():
    assert quality.PAGE.read_text("utf-8") == quality.page()


def test_each_score_of_the_readme_is_on_the_page():
    rows = re.findall(r"^\| \[.*\) \| .* \| ([\d.]+) \| ([\d.]+) \|", quality.PAGE.read_text("utf-8"), re.MULTILINE)
    scores = {score for row in rows for score in row}
    configs = re.findall(r"^\| `configs/.*", README.read_text("utf-8"), re.MULTILINE)
    named = {score for row in configs for score in re.findall(r"(\d+\.\d)(?! hours)", row)}
    assert len(named) > 3 and named <= scores
