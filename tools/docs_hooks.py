"""Hooks of `make docs`: pages outside docs/, and links to files that the site does not hold."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where they stand in the repository, and on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/qwen3_cuda.png": "qwen3_cuda.png",
}
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's files; a link to any other file of the repository, such as code, leaves its text."""
    sources = {target: source for source, target in OUTSIDE.items()}
    here = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def on_site(match: re.Match) -> str:
        image, text, target, anchor = match.groups(default="")
        path = os.path.normpath(here / target)
        if "://" in target or not (ROOT / path).exists():
            return match.group()  # mkdocs says what is wrong with it
        target = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return text
        target = os.path.relpath(target, PurePosixPath(page.file.src_uri).parent)
        return f"{image}[{text}]({target}{anchor})"

    return LINK.sub(on_site, markdown)
