"""Reads the pages of the folder beside it: small texts, what their sentences are, and what must come back unchanged.

A page is followed by "## sentences" and a sentence a line, and it may be followed by "## keep" and a text a line; lines
of what is kept that belong together, such as those of a `<pre>`, are kept one by one.
"""

import dataclasses
from pathlib import Path

FOLDER = Path(__file__).parent / "pages"


@dataclasses.dataclass(frozen=True)
class Page:
    name: str
    text: str
    sentences: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def is_markup(self):
        return not self.name.endswith(".txt")


def read_page(path):
    text, _, rest = path.read_bytes().decode().partition("## sentences\n")
    sentences, _, kept = rest.partition("## keep\n")
    # The line end before the first heading belongs to the file.
    return Page(path.name, text.removesuffix("\n"), tuple(sentences.splitlines()), tuple(kept.splitlines()))


PAGES = [read_page(path) for path in sorted(FOLDER.iterdir())]
