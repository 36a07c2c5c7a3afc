"""Read pairs of texts that belong together out of packages: a word and its definition, a title and the text below it.

Every reader yields `Pair`s. The texts are prose on one line, without markup.
"""

import fnmatch
import gzip
import html.parser
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tools, which is no package

from package_archives import read_members

MOST_WORDS = 100
"""Words of a positive; the rest is cut. With word pieces of punctuation it stays below 256 tokens."""
_LEAST_WORDS = 4
_NUMBERING = re.compile(r"^(?:(?:chapter|appendix|section)\s+)?(?:[A-Z]\.?)?\d[\d.]*\s+", re.IGNORECASE)
_PARTS_OF_SPEECH = re.compile(
    r"^[\s,;]*(?:(?:n|v|a|t|i|p|pr|pl|adv|adj|prep|conj|interj|pron|imp|vb|superl|compar|vt|vi)\.[\s,;&]*)+"
)
_BASE64 = {char: n for n, char in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


class Pair(NamedTuple):
    """A short text and the longer one that it leads to, with the name of the document from which both come."""

    document: str
    anchor: str
    positive: str


@dataclass(frozen=True)
class Section:
    """A heading and the paragraphs between it and the next heading."""

    title: str
    paragraphs: list[str]


def plain(text: str, *, most_words: int = MOST_WORDS) -> str:
    """Return the first words of a text, divided by single spaces."""
    return " ".join(text.split()[:most_words])


def read_wordnet(archive: Path) -> Iterator[Pair]:
    """Pair the words of each synset with its definition; examples are left out (database format: wndb(5WN))."""
    for name, data in read_members(archive):
        if "/wordnet/data." not in name:
            continue
        for line in data.decode("utf-8").splitlines():
            fields, bar, gloss = line.partition(" | ")
            if not bar or line.startswith(" "):
                continue
            offset, _, _, count, *rest = fields.split()
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
            definition = plain(re.split(r'[;:]?\s*"', gloss)[0])
            yield Pair(f"{name.rpartition('.')[2]}-{offset}", ", ".join(dict.fromkeys(words)), definition)


def read_dictionary(archive: Path) -> Iterator[Pair]:
    """Pair headwords with their definitions, from the index and the text of a dictd database (dictfmt(1))."""
    files = dict(read_members(archive))
    for name in (name for name in files if name.endswith(".index")):
        text = gzip.decompress(files[name.removesuffix(".index") + ".dict.dz"])
        entries: dict[tuple[int, int], list[str]] = {}
        for line in files[name].decode("utf-8").splitlines():
            word, *place = line.split("\t")
            if not word.startswith("00"):  # facts about the dictionary itself
                entries.setdefault((_number(place[0]), _number(place[1])), []).append(word)
        for (begin, size), words in entries.items():
            if pair := _definition(text[begin : begin + size].decode("utf-8", errors="replace"), words):
                yield pair


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _BASE64[digit]
    return value


def _definition(entry: str, words: list[str]) -> Pair | None:
    """Return headword and first senses of an entry of GCIDE, FOLDOC or Jargon; None if it only refers to another."""
    head, _, body = entry.partition("\n")
    word = re.split(r"\s*\\", head)[0].strip()
    if "\\" in head:  # GCIDE: the pronunciation, spellings, the part of speech and the etymology come first
        body = re.sub(r"^\s*\S+( \S+)? ?\\[^\\]*\\(,\s*[\w -]+\\[^\\]*\\)*[,\s]*(\([^()]*\))?", "", entry)
    elif body.startswith(("\n", " ")):
        body = re.sub(r"^ [a-z., ]+\n", "", body)
    else:  # FOLDOC: further headwords, each on a line of its own
        body = body.partition("\n\n")[2]
    body = body.split("[1913 Webster]\n\n   {")[0].partition("Note:")[0].partition("Syn:")[0]
    for _ in range(3):  # brackets lie in brackets
        body = re.sub(r"\[[^\[\]]*\]|<[^<>\n]{1,60}>|\(\d{4}-\d\d-\d\d\)|\(\?[^()]*\)", " ", body)
    body = re.sub(r"--\s?[A-Z][\w.' ]*(\([^()]*\))?\.?|/\S+ ?\S*/|[{}]", " ", body)
    body = _PARTS_OF_SPEECH.sub("", body)
    body = plain(re.sub(r"\s+([,.;])", r"\1", re.sub(r"(?<=\s)\d+\.\s", " ", f" {body}")), most_words=60)
    refers = re.match(r"(?:same as|see|compare)\b", body, re.IGNORECASE) and len(body.split()) < 12
    if refers or word.lower() not in {each.lower() for each in words}:
        return None
    return Pair(word.lower(), word, body)


class _SectionParser(html.parser.HTMLParser):
    """Collect headings and the text below them; tables, code listings and navigation are left out."""

    HEADINGS = frozenset({"h1", "h2", "h3", "h4"})
    BLOCKS = frozenset({"p", "li", "dd", "dt", "div", "section", "article", "body", "br", "blockquote"})
    SKIPPED = frozenset({"pre", "table", "script", "style", "nav", "head", "header", "footer", "svg", "math", "title"})

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[Section] = []
        self._text: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        if tag == "a" and "headerlink" in classes:  # Sphinx writes a pilcrow behind every heading
            self._inside.append(tag)
        if tag in self.HEADINGS | self.BLOCKS | self.SKIPPED:
            self._end_block()
        if tag in self.HEADINGS | self.SKIPPED:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HEADINGS | self.BLOCKS | self.SKIPPED:
            self._end_block()
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._inside or self._inside[-1] in self.HEADINGS:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._end_block()

    def _end_block(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text = []
        if not text:
            return
        if self._inside and self._inside[-1] in self.HEADINGS:
            self.sections.append(Section(text, []))
        elif self.sections:
            self.sections[-1].paragraphs.append(text)


def read_pages(archive: Path, pattern: str = "*.html", exclude: str = "") -> Iterator[Pair]:
    """Pair the headings of HTML pages with the text below them; of the pages that match only the first pattern."""
    for name, data in read_members(archive):
        if fnmatch.fnmatch(name, pattern) and not fnmatch.fnmatch(name, exclude):
            parser = _SectionParser()
            parser.feed(data.decode("utf-8", errors="replace"))
            parser.close()
            yield from _pairs_of_sections(name, parser.sections)


def read_pod(archive: Path) -> Iterator[Pair]:
    """Pair the headings of Perl's documentation with the text below them (perlpod(1)); code is left out."""
    for name, data in read_members(archive):
        if name.endswith(".pod"):
            sections: list[Section] = []
            for paragraph in re.split(r"\n\s*\n", data.decode("utf-8", errors="replace")):
                text = " ".join(re.sub(r"[A-Z]<+\s*(?:[^<>|]*\|)?([^<>]*?)\s*>+", r"\1", paragraph).split())
                if heading := re.match(r"=head\d (.*)", text):
                    sections.append(Section(heading[1], []))
                elif sections and not paragraph.startswith((" ", "\t", "=")):
                    sections[-1].paragraphs.append(text)
            yield from _pairs_of_sections(name, sections)


def read_mallard(archive: Path) -> Iterator[Pair]:
    """Pair the titles of GNOME's English help pages with the text below them (projectmallard.org)."""
    space = "{http://projectmallard.org/1.0/}"
    for name, data in read_members(archive):
        if "/help/C/" not in name or not name.endswith(".page"):
            continue
        page = xml.etree.ElementTree.fromstring(data)
        sections = []
        for part in (page, *page.iter(f"{space}section")):
            title = part.find(f"{space}title")
            paragraphs = [plain("".join(each.itertext())) for each in part.findall(f"{space}p")]
            if title is not None:
                sections.append(Section(plain("".join(title.itertext())), paragraphs))
        yield from _pairs_of_sections(name, sections)


def _pairs_of_sections(document: str, sections: Iterable[Section]) -> Iterator[Pair]:
    """Pair titles and texts. A title of one or two words says little alone, so the title of the page comes first."""
    page = ""
    for section in sections:
        title = plain(_NUMBERING.sub("", section.title)).rstrip("¶#: ")
        page = page or title
        if len(title.split()) < 3 and title != page:
            title = f"{page}: {title}"
        prose = [text for text in section.paragraphs if len(text.split()) >= _LEAST_WORDS]
        if len(title.split()) > 1:
            yield Pair(document, title, plain(" ".join(prose)))


def read_descriptions(lists: Path) -> Iterator[Pair]:
    """Pair the short with the long descriptions of Debian's packages.

    Packages of one source share paragraphs and are one document. A paragraph that occurred before is left out.

    Args:
        lists: folder into which `apt-get update` wrote the lists of packages and their English descriptions.
    """
    sources: dict[str, str] = {}
    for record in _records(lists, "Packages"):
        sources[record["Package"]] = record.get("Source", record["Package"]).split()[0]
    seen: set[str] = set()
    for record in _records(lists, "Translation-en"):
        short, _, long = record["Description-en"].partition("\n")
        name = record["Package"]
        paragraphs = [" ".join(text.split()) for text in re.split(r"\n\s*\.\s*(?:\n|$)", long)]
        prose = [text for text in paragraphs if text not in seen and not re.match(r"[*+-] ", text)]
        seen.update(paragraphs)
        # The crates of Rust have one description for each of their features.
        if not name.startswith("librust-"):
            yield Pair(sources.get(name, name), plain(short), plain(" ".join(prose)))


def _records(lists: Path, kind: str) -> Iterator[dict[str, str]]:
    """Yield the fields of every record in the lists of one kind (deb822(5))."""
    for file in sorted(lists.glob(f"*_{kind}*")):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(file)]
        text = subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8", errors="replace")
        for record in text.split("\n\n"):
            fields = (field.partition(":") for field in re.split(r"\n(?=\S)", record.strip("\n")) if field)
            if parsed := {key: value.strip() for key, _, value in fields}:
                yield parsed
