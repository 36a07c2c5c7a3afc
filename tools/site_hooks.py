"""Complete the documentation site while MkDocs builds it (mkdocs.yml): the repository's own pages, unchanged.

The documents are written to be read in the repository, so README.md and others lie outside docs/, and links lead to
scripts, results and folders. `on_files` adds all of these to the site, each at its path in the repository: docs/ is the
top of the site, and README.md its first page. `on_page_markdown` turns links accordingly, and on the page of the Python
API it puts the reference that mkdocstrings makes in place of the text that `make docs` wrote for readers on the forge.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
API, DECISIONS = "python-api.md", "decisions/README.md"
# The target of a Markdown link or of an image in HTML, if it is no address.
LINK = re.compile(r"""(\]\(|(?:src|srcset|href)=")(?!\w+:)([^)"\s#]+)""")


def site_path(path: str) -> str:
    """Return the place in the site of a file or folder, by its path in the repository."""
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"{path.removeprefix('docs/')}/{'README' if (ROOT / path / 'README.md').exists() else 'index'}.md"
    return path.removeprefix("docs/")


def repository_path(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    return "README.md" if page == "index.md" else f"docs/{page}" if (ROOT / "docs" / page).is_file() else page


def targets(path: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield what a page links to in the repository: the target as written, and its path from the root."""
    for _, target in LINK.findall(text):
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not found.startswith("..") and (ROOT / found).exists():
            yield target, found


def folder_page(path: str) -> str:
    """Return a page that lists the files of a folder, which a link leads to."""
    names = subprocess.run(["git", "ls-files", path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [f"- [{name}]({name})" for name in (posixpath.relpath(name, path) for name in names.splitlines())]
    return "\n".join([f"# {path}", "", *lines, ""])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as in the repository, and every decision in the navigation under its area."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    index = (ROOT / "docs" / DECISIONS).read_text(encoding="utf-8")
    areas: list[Any] = [DECISIONS]
    for area, lines in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", index, re.MULTILINE | re.DOTALL):
        areas.append({area: [f"decisions/{name}" for name in re.findall(r"^- \[.+?\]\(([\w-]+\.md)\)", lines, re.M)]})
    nav: Any = config.nav
    project = next(entry["The project"] for entry in nav if "The project" in entry)
    project[:] = [{"Decisions": areas} if entry == {"Decisions": DECISIONS} else entry for entry in project]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the documents link to outside docs/, from README.md on."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        source, place = ROOT / path, site_path(path)
        page = place.endswith(".md")
        text = folder_page(path) if source.is_dir() and "README" not in place else ""
        if source.is_dir() and not text:
            source, path = source / "README.md", f"{path}/README.md"
        if page and not text:
            text = source.read_text(encoding="utf-8")
        if files.get_file_from_path(place) is None:
            written = File.generated(config, place, content=text)
            files.append(written if page else File.generated(config, place, abs_src_path=str(source)))
        new = {found for _, found in targets(path if not source.is_dir() else f"{path}/index.md", text)} - seen
        seen |= new
        waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to the repository into links of the site; write the reference of the API."""
    own = page.file.src_uri
    known = dict(targets(repository_path(own), markdown))

    def turn(match: re.Match[str]) -> str:
        if match[2] not in known:
            return match[0]
        return match[1] + os.path.relpath(site_path(known[match[2]]), posixpath.dirname(own) or ".")

    markdown = LINK.sub(turn, markdown)
    return reference(markdown) if own == API else markdown


def reference(markdown: str) -> str:
    """Return the page of the API with a directive of mkdocstrings for each object that it describes."""
    return re.sub(r"^## (gte_deploy[\w.]+)\n.*?(?=^## |\Z)", r"::: \1\n\n", markdown, flags=re.MULTILINE | re.DOTALL)
