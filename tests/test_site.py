"""The documentation site is built without a warning, and holds every document, every target of links, and the API."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import gte_deploy

pytestmark = pytest.mark.xdist_group("site")
ROOT = Path(__file__).resolve().parents[1]


class _Page(HTMLParser):
    """The addresses that a page names, those that a browser fetches with it, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        found = [values[name] for name in ("href", "src", "srcset") if values.get(name)]
        self.links += found
        if tag in ("script", "img", "source", "iframe") or values.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.fetched += found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stderr, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {file: _Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}


def test_every_document_is_a_page_with_its_text(site):
    documents = sorted((ROOT / "docs").rglob("*.md"))
    assert len(documents) > 60
    for document in documents:
        place = document.relative_to(ROOT / "docs").with_suffix(".html")
        page = site / (place.with_name("index.html") if place.name == "README.html" else place)
        title = re.search(r"^# (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
        assert title and title[1].split()[0].strip("`") in page.read_text(encoding="utf-8"), document
    first = (site / "index.html").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles and [title for title in titles if f">{title}<" not in first] == []


def test_every_decision_is_in_the_navigation(site, pages):
    decisions = [path.stem for path in (ROOT / "docs" / "decisions").glob("*.md") if path.name != "README.md"]
    assert {f"decisions/{name}.html" for name in decisions} <= {*pages[site / "index.html"].links}


def test_links_lead_somewhere_on_the_site(site, pages):
    """MkDocs checks links between pages; this one also those in HTML, to files, and what the theme adds."""
    lost = []
    for file, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc or file.name == "404.html":  # its links begin at the root of a host
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(address.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                lost.append(f"{file.relative_to(site)}: {link}")
    assert lost == []


def test_a_page_fetches_nothing_from_another_host(pages):
    foreign = {link for page in pages.values() for link in page.fetched if urlsplit(link).netloc}
    assert foreign == set()


def test_the_reference_has_the_public_api(site):
    inventory = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory[inventory.index(b"zlib.\n") + 6 :]).decode().splitlines()
    objects = {line.split()[0] for line in lines if "python-api.html" in line}
    written = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^## (gte_deploy[\w.]+)$", written, re.MULTILINE)} <= objects
    names = {"model": "Model", "model.tokenizer": "text.model_tokenizer.ModelTokenizer", "client": "triton.Client"}
    for variable, method in re.findall(r"^### (model\.tokenizer|model|client)\.(\w+)$", written, re.MULTILINE):
        assert f"gte_deploy.{names[variable]}.{method}" in objects
    text = (site / "python-api.html").read_text(encoding="utf-8")
    for name in gte_deploy.__all__:
        assert name == "__version__" or name in text
    assert not [name for name in objects if re.search(r"\._(?!_call__)", name)], "nothing private"
