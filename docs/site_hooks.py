"""Hooks of MkDocs: pages from files of the root."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page. Fills the pages that are files of the root."""
    if page.file.src_uri in PAGES:
        text = (ROOT / PAGES[page.file.src_uri]).read_text()
        return text.replace("](docs/", "](").replace("](model_card.md)", "](index.md)")
    return markdown
