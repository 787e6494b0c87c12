"""Hooks of MkDocs: pages from files of the root, and the page that draws in the browser."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTE_FOR_THE_REPOSITORY = re.compile(r"^> Only the built site shows .*\n", re.MULTILINE)
LINK_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")  # to a file that only the repository has
# The reference of Python is one file in the repository, and has a page per section on the site.
REFERENCE_LINK = re.compile(r"\]\(reference/python\.md#([\w-]+)\)")
REFERENCE_PAGES = {
    "model": "api/model.md",
    "tokens": "api/tokens.md",
    "generators": "api/generators.md",
    "evaluation-and-export": "api/evaluation.md",
}
PAGES = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
DRAWING_PAGE = os.environ.get("DRAWING_PAGE")  # folder that `svqvae export scenes --web` wrote
TRY_IT = '<p><a href="draw/index.html"><strong>Draw in your browser</strong></a> (27 MB)</p>'


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page. Fills the pages that are files of the root."""
    if page.file.src_uri in PAGES:
        text = (ROOT / PAGES[page.file.src_uri]).read_text()
        return text.replace("](docs/", "](").replace("](model_card.md)", "](index.md)")
    markdown = NOTE_FOR_THE_REPOSITORY.sub("", markdown)
    markdown = REFERENCE_LINK.sub(lambda link: f"]({REFERENCE_PAGES[link[1]]})", markdown)
    markdown = LINK_OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
    if page.file.src_uri == "browser.md" and DRAWING_PAGE:
        title, text = markdown.split("\n", 1)
        return f"{title}\n\n{TRY_IT}\n{text}"
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Called by MkDocs after the site is written. Adds the page that draws."""
    if DRAWING_PAGE:
        shutil.copytree(DRAWING_PAGE, Path(config.site_dir, "draw"))
