"""Hooks of the site's build: files of the repository that lie outside docs/ become pages, and links follow them.

In the repository a page links to `../bench/README.md`, which a reader of the files can follow; on the site the same
link leads to `numbers.md`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# The page of the site for each file of the repository outside docs/.
PAGE_OF_FILE = {
    "README.md": "index.md",
    "bench/README.md": "numbers.md",
    "manifests/README.md": "sources.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}

# Files that have no page: on the site their names stay, without a link.
FILES_WITHOUT_PAGE = {"CITATION.cff"}

LINK = re.compile(r"(!?\[[^\]]*\])\(([^()\s#]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGE_OF_FILE`."""
    for name, page in PAGE_OF_FILE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page with its links rewritten for the site."""
    file_of_page = {page_name: name for name, page_name in PAGE_OF_FILE.items()}
    source = file_of_page.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def site_link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in FILES_WITHOUT_PAGE:
            return text.strip("[]")
        return f"{text}({PAGE_OF_FILE.get(path, path.removeprefix('docs/'))}{anchor})"

    return LINK.sub(site_link, markdown)
