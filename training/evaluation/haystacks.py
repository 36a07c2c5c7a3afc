"""Documents for tests of long contexts: texts of a user, each with a sentence hidden in it, and questions about these.

The tests are those of LongEmbed (arXiv 2404.12096): "passkey" hides a number for a name, "needle" a fact, in documents
of one length, and a model has to find the document that answers a question. The sentences are generated, so that none
was trained on; the texts around them are the user's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.readers import DocumentReader
from gte_deploy.training.data.units import plan_units
from gte_deploy.training.evaluation.glue_tasks import read_json_lines
from gte_deploy.training.evaluation.retrieval_sets import RetrievalSet
from gte_deploy.training.needle_options import NeedleTest
from gte_deploy.training.options import ReadOptions

_FIRST_NAMES = (
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Karin Leo Mina Nils Olga Pavel Rosa Samir Tara Viktor"
).split()
_LAST_NAMES = (
    "Abbott Becker Costa Dubois Eriksen Fischer Garcia Haddad Ivanov Jensen Kowalski Lindgren Moreau Novak Okafor "
    "Petrov Quinn Rossi Sato Tanaka"
).split()
_PLACES = (
    "Amber Birch Cedar Copper Coral Crystal Eagle Falcon Granite Harvest Ivory Juniper Lantern Maple Mirror Otter "
    "Pepper Raven Silver Willow"
).split()
_KINDS = (
    "Bay Bridge Canyon Cliff Creek Falls Field Grove Harbour Hill Hollow Island Meadow Mill Pass Point Ridge Spring"
).split()
# What is said of a place, and how one asks for it.
_FACTS = (
    ("The best thing to do in {place} is to {activity}.", "What is the best thing to do in {place}?"),
    ("Every visitor who comes to {place} is told to {activity}.", "What are visitors of {place} told to do?"),
    (
        "On the last day of summer people in {place} always {activity}.",
        "What do people in {place} do when summer ends?",
    ),
)
_ACTIVITIES = (
    "eat a sandwich on the pier",
    "paint the old railway station",
    "count the bells of the chapel",
    "borrow a wooden boat",
    "listen to the clockmaker",
    "plant a lemon tree",
    "read letters in the lighthouse",
    "bake bread with rosemary",
    "fly a kite over the quarry",
    "taste the black honey",
)
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")
_LOOK_AHEAD = 64  # tokens in which the end of a sentence is looked for
_TRIES = 8


@dataclass(frozen=True)
class Needle:
    """A sentence that is hidden in a document, and a question that only this document answers."""

    text: str
    question: str


@dataclass(frozen=True)
class Haystacks:
    """Documents of one length.

    Args:
        data: the documents and the questions.
        depths: query id -> place of the sentence in its document, from 0 (first) to 1 (last); empty where unknown.
    """

    data: RetrievalSet
    depths: dict[str, float]


class Filler:
    """Texts of a user as one stream of tokens, of which documents are cut.

    Args:
        texts: the documents, in their order; no more are read than `most` tokens need.
        tokenizer: reads plain text, see `read_tokenizer`.
        most: number of tokens to read.

    Raises:
        InputError: the texts have no token.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, *, most: int) -> None:
        self.tokenizer = tokenizer
        parts: list[str] = []
        starts: list[NDArray[np.int64]] = []
        read = length = 0
        for text in texts:
            encoding = tokenizer.encode(text, add_special_tokens=False)
            starts.append(np.array([start for start, _ in encoding.offsets], dtype=np.int64) + length)
            parts.append(text + "\n\n")
            length += len(parts[-1])
            read += len(encoding.offsets)
            if read >= most:
                break
        if not read:
            raise InputError("the texts have no token in which a sentence could be hidden")
        self._text = "".join(parts)
        self._starts = np.append(np.concatenate(starts), len(self._text))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def document(self, needle: str, *, length: int, start: int, depth: float) -> str:
        """Cut a document of at most `length` tokens, special tokens included, and hide a sentence in it.

        Args:
            needle: the sentence.
            length: tokens of the document. It has at most 2 % fewer, unless the sentence does not fit.
            start: first token of the text around the sentence.
            depth: where the sentence goes, from 0 to 1; it goes to the next end of a sentence, or of a word.

        Raises:
            InputError: the sentence alone is longer than `length`.
        """
        room = length - len(self.tokenizer.encode(needle, add_special_tokens=True).ids)
        if room < 0:
            raise InputError(f"{needle!r} is longer than {length} tokens")
        size = room
        for _ in range(_TRIES):
            text = self._assembled(needle, start, size, depth)
            over = len(self.tokenizer.encode(text, add_special_tokens=True).ids) - length
            if over <= 0:
                return text
            size = max(0, size - over)
        return self._assembled(needle, start, max(0, size - length // 100), depth)

    def _assembled(self, needle: str, start: int, size: int, depth: float) -> str:
        place = self._break(start + round(depth * size), start + size)
        first, middle, last = (int(self._starts[token]) for token in (start, place, start + size))
        before, after = self._text[first:middle].strip(), self._text[middle:last].strip()
        return " ".join(part for part in (before, needle, after) if part)

    def _break(self, token: int, stop: int) -> int:
        """The first token from `token` on that begins a sentence, or else a word."""
        word: int | None = None
        for at in range(token, min(token + _LOOK_AHEAD, stop)):
            end = int(self._starts[at])
            before = self._text[max(0, end - 8) : end]
            if not before or before.rstrip().endswith(_SENTENCE_ENDS):
                return at
            if word is None and before[-1].isspace():
                word = at
        return token if word is None else word


def read_filler(inputs: Sequence[str], options: ReadOptions) -> Iterator[str]:
    """Yield the documents of files, folders or datasets, as `gte-train prepare` reads them.

    Raises:
        InputError: an input or a record cannot be read.
    """
    reader = DocumentReader(options, counts=Counter(), advance=lambda _: None)
    return itertools.chain.from_iterable(map(reader.read, plan_units(inputs)))


def read_needles(path: Path) -> list[Needle]:
    """Read sentences and questions from JSON lines with the fields needle and question.

    Raises:
        InputError: the file cannot be read, or a line has no such fields.
    """
    found = []
    try:
        for number, record in enumerate(read_json_lines(path), start=1):
            text, question = record.get("needle"), record.get("question")
            if not (isinstance(text, str) and text.strip() and isinstance(question, str) and question.strip()):
                raise InputError(f"{path}, object {number}: expected the texts needle and question")
            found.append(Needle(text, question))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return found


def generate_needles(test: NeedleTest, count: int, *, seed: int) -> list[Needle]:
    """Generate English sentences and questions, each about another name or place.

    Raises:
        InputError: there are not so many names or places.
    """
    rng = np.random.default_rng(seed)
    pairs = (_FIRST_NAMES, _LAST_NAMES) if test == "passkey" else (_PLACES, _KINDS)
    names = [" ".join(pair) for pair in itertools.product(*pairs)]
    if count > len(names):
        raise InputError(f"{count} documents are more than the {len(names)} names of the test {test}; take fewer")
    chosen = [names[i] for i in rng.permutation(len(names))[:count]]
    if test == "passkey":
        keys = rng.choice(np.arange(10_000, 100_000), size=count, replace=False)
        return [
            Needle(
                f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}.",
                f"What is the pass key for {name}?",
            )
            for name, key in zip(chosen, keys, strict=True)
        ]
    facts = rng.integers(len(_FACTS), size=count)
    activities = rng.integers(len(_ACTIVITIES), size=count)
    return [
        Needle(_FACTS[fact][0].format(place=place, activity=_ACTIVITIES[activity]), _FACTS[fact][1].format(place=place))
        for place, fact, activity in zip(chosen, facts, activities, strict=True)
    ]


def make_haystacks(needles: Sequence[Needle], filler: Filler, *, length: int, queries: int, seed: int) -> Haystacks:
    """Hide each sentence in a document of `length` tokens.

    The depths are spread evenly, over the documents that are asked for and over the others, in a random order. The
    places in the texts are drawn at random.

    Args:
        needles: one for each document.
        filler: the texts.
        length: tokens of each document, special tokens included.
        queries: the first so many needles are asked for.
        seed: seed of the depths and of the places in the texts.

    Raises:
        InputError: the texts have fewer tokens than one document.
    """
    if len(filler) < length:
        raise InputError(f"the texts have {len(filler):,} tokens, and a document needs {length:,}; give more text")
    rng = np.random.default_rng([seed, length])
    rest = len(needles) - queries
    depths = np.concatenate([(rng.permutation(count) + 0.5) / count for count in (queries, rest) if count])
    starts = rng.integers(len(filler) - length + 1, size=len(needles))
    corpus = {
        f"d{i}": filler.document(needle.text, length=length, start=int(starts[i]), depth=float(depths[i]))
        for i, needle in enumerate(needles)
    }
    asked = {f"q{i}": needle.question for i, needle in enumerate(needles[:queries])}
    data = RetrievalSet(corpus, asked, {f"q{i}": {f"d{i}": 1.0} for i in range(queries)})
    return Haystacks(data, {f"q{i}": float(depths[i]) for i in range(queries)})
