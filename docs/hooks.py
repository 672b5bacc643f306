"""What the manual needs beside MkDocs: pages from the root of the repository, and links that leave docs/.

The pages are read on a code host, too, so they link to files as they lie there. What the manual does not have (source,
result files) becomes plain text here; a file that does not exist ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK = r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)]*)?\)"
CODE_OR_LINK = re.compile(rf"```.*?```|`[^`\n]*`|{LINK}", re.DOTALL)  # code has brackets before parentheses, too


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Adds the pages that lie in the root."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links at the manual's pages, and lets Markdown inside of <details> be read."""
    here = page.file.src_uri
    folder = ROOT if here in FROM_ROOT else (ROOT / "docs" / here).parent

    def pointed(link: re.Match[str]) -> str:
        if link[1] is None:
            return link[0]
        text, to, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
        if not to.exists():
            raise PluginError(f"{here} links to {link[2]}, which does not exist")
        inside = to.name if to.parent == ROOT and to.name in FROM_ROOT else None
        if inside is None and to.is_relative_to(ROOT / "docs"):
            inside = to.relative_to(ROOT / "docs").as_posix()
        if inside is None or files.get_file_from_path(inside) is None:
            return text if text.startswith("`") else f"`{text}`" if "/" in text or "." in text else text
        return f"[{text}]({os.path.relpath(inside, os.path.dirname(here) or '.')}{anchor})"

    return CODE_OR_LINK.sub(pointed, markdown).replace("<details>", '<details markdown="1">')
