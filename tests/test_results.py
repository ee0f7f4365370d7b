"""docs/results.md and the README must say what the result files say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import quality

README = Path(__file__).parents[1] / "README.md"


def test_the_page_is_made_from_the_result_files():
    assert quality.PAGE.read_text("utf-8") == quality.page()


@pytest.mark.parametrize(
    ("config", "results"),
    [
        ("multi30k_en_de", {"multi30k_raw": ["2016"], "multi30k_tok": ["2016"]}),
        ("kannada_english", {"kannada_small": ["bible", "stories", "interface"]}),
    ],
)
def test_the_scores_and_hours_of_the_readme_are_those_of_the_result_files(config, results):
    (row,) = re.findall(rf"^\| `configs/{config}.py`.*", README.read_text("utf-8"), re.MULTILINE)
    expected = []
    for name, tests in results.items():
        result = json.loads((quality.FOLDER / f"{name}.json").read_text("utf-8"))
        expected += [*(result["tests"][test]["bleu"] for test in tests), result["training"]["hours"]]
    assert re.findall(r"\d+\.\d", row) == [f"{number:.1f}" for number in expected]
