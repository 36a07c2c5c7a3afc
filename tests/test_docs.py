"""Links between the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{document.name} links to {target}"


def test_readme_names_every_document() -> None:
    text = DOCUMENTS[0].read_text(encoding="utf-8")
    assert [path.name for path in DOCUMENTS[1:] if f"(docs/{path.name})" not in text] == []


def test_the_table_of_fields_is_the_readers_own() -> None:
    from gte_deploy.models.fields import document

    written = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert written == document(), "write it anew: python -m gte_deploy.models.fields > docs/checkpoints.md"


def _anchors(path: Path) -> set[str]:
    """GitHub's: lower case, spaces as hyphens, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
