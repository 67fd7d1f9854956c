"""Make pages of the site of the pages at the root of the repository; `mkdocs.yml` names this.

Every page is written for the repository, where its links work. On the site the same links are
pointed at the same pages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

AT_THE_ROOT = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()([^)\s:#]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages at the root."""
    for name, page in AT_THE_ROOT.items():
        source = Path(config.config_file_path).with_name(name)
        files.append(File.generated(config, page, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Point the links of a page at where their targets are on the site."""
    root, here = Path(config.config_file_path).parent, Path(page.file.abs_src_path).parent
    place = Path(page.file.src_uri).parent

    def repointed(match: re.Match[str]) -> str:
        target = Path(os.path.relpath(here / match[2], root)).as_posix()
        target = AT_THE_ROOT.get(target, target.removeprefix("docs/"))
        return match[1] + Path(os.path.relpath(target, place)).as_posix()

    return LINK.sub(repointed, markdown)
