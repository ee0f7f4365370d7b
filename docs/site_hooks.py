"""Adds pages to the documentation site that lie outside of docs/: README, notebooks and other pages of the project.

A link of such a page to another page of the site becomes a link within the site, and a link to a file of the repository
one to the repository's address.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The pages of the site, by their paths in the repository.
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
WITHOUT_PICTURES = """
<div class="admonition note"><p class="admonition-title">Run it to see its pictures</p>
<p>This page shows the text and the code of a notebook of <code>colab/</code>. Its kept figures are on the page
<a href="../learning.html">Learning</a>, too.</p></div>
"""
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text("utf-8")))
    for notebook in sorted((ROOT / "colab").glob("*.ipynb")):
        files.append(File(f"colab/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Points links to pages of the site, and to the repository where a file is not one."""
    repository = config.extra["repository"]
    sources = {page_path: path for path, page_path in PAGES.items()}
    source = sources.get(page.file.src_path, f"docs/{page.file.src_path}")

    def point(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        inside = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None:
            return f"{found[1]}{repository}/blob/main/{target})" if (ROOT / target).exists() else found[0]
        relative = posixpath.relpath(inside, posixpath.dirname(page.file.src_path) or ".")
        return f"{found[1]}{relative}{found[3] or ''})"

    return LINK.sub(point, markdown)


def on_page_content(html: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Points a notebook's links to other notebooks to their pages, and says where its pictures are."""
    if not page.file.src_path.endswith(".ipynb"):
        return html
    html = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', html)
    return html.replace("</h1>", f"</h1>{WITHOUT_PICTURES}", 1)
