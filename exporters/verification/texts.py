"""Batches of real text for calibrating a quantization and for measuring the accuracy of a precision.

The calibration and the evaluation texts are Addresses on the State of the Union, in the public domain. No address is
in the built-in model's training text or in both files. The multilingual texts are the Universal Declaration of Human
Rights in 20 languages, a document of the United Nations that anyone may reproduce: articles 1 to 5 for calibration, and
articles 6 to 15 (from https://www.unicode.org/udhr) for evaluation, with English prose in place of the declaration.
"""

import dataclasses
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.bundle.manifest import TextsEntry
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.text_files import read_texts
from gte_deploy.text.batching import collate
from gte_deploy.text.tokenization import TextTokenizer

MASK_PROBABILITY = 0.15
_ROUNDS = 3
"""The number of rounds: in each, `text_batches` masks other words of the same texts."""
Languages = Literal["auto", "english", "multilingual"]
"""The built-in texts, for calibration and for evaluation; "auto" decides by the vocabulary, see `is_multilingual`."""
ENGLISH = "en"
OWN = "own"
"""The key of a user's texts, where those of a language have its code."""
LANGUAGE_TOKENS = 200
"""Number of words for measuring the accuracy in each language besides English; see `EVALUATION_TOKENS`."""
_MIN_SCRIPTS = 3
_MIN_WORDS = 100
TextBatch = tuple[Batch, np.ndarray]
Span = tuple[int, int]
"""The numbers of the first word and of the word after the last, counted through all texts."""
_WINDOWS = (32, 128, 512, 2048)
_WINDOW_TOKENS = 512  # tokens of a batch of windows; a longer window is a batch of its own
_ROWS_OF_A_BATCH = 4
_SEED = 20240729


@dataclass(frozen=True)
class CalibrationTexts:
    """The texts for calibrating a model.

    Args:
        texts: the texts.
        source: what they are, for people.
        languages: codes of their languages (BCP 47); empty for a user's own texts.
        held_out: language -> other texts, which the choice of layers must hold on as well, see `evaluation_rounds`.
    """

    texts: Sequence[str]
    source: str
    languages: Sequence[str]
    held_out: Mapping[str, Sequence[str]]

    @property
    def entry(self) -> TextsEntry:
        """What a manifest says about them."""
        return _entry(self.source, self.languages, self.texts)


@dataclass(frozen=True)
class EvaluationTexts:
    """The texts for measuring the accuracy of a precision.

    Args:
        texts: language (BCP 47) -> its texts; or `OWN` -> a user's texts.
        source: what they are, for people.
    """

    texts: Mapping[str, Sequence[str]]
    source: str

    @property
    def entry(self) -> TextsEntry:
        """What a report says about them."""
        languages = [language for language in self.texts if language != OWN]
        return _entry(self.source, languages, [text for each in self.texts.values() for text in each])


@dataclass(frozen=True)
class ChosenTexts:
    """The texts of an export.

    Args:
        calibration: the texts for measuring ranges; None for precisions without such ranges.
        evaluation: the texts for measuring the accuracy.
        remarks: one sentence for each doubt about the user's own texts.
    """

    calibration: CalibrationTexts | None
    evaluation: EvaluationTexts
    remarks: Sequence[str] = ()


def _entry(source: str, languages: Sequence[str], texts: Sequence[str]) -> TextsEntry:
    digest = hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()
    return TextsEntry(source, tuple(languages), len(texts), digest)


def builtin_texts(name: str) -> list[str]:
    """Return the paragraphs of "calibration", "evaluation" or "multilingual"."""
    file = resources.files("gte_deploy.exporters") / "texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").split("\n")


def evaluation_texts(
    tokenizer: TextTokenizer, vocab_size: int, *, languages: Languages = "auto", file: Path | None = None
) -> EvaluationTexts:
    """Return the texts for measuring the accuracy of a precision.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: number of rows of the model's vocabulary.
        languages: which of the built-in texts; "auto" decides by the vocabulary.
        file: a user's texts, which are taken in place of the built-in ones.

    Raises:
        InputError: the file cannot be read.
    """
    if file is not None:
        return EvaluationTexts({OWN: read_texts(file)}, f"your texts in {file.name}")
    found = {ENGLISH: [text for text in builtin_texts("evaluation") if text]}
    hint = "(--eval-texts takes your own texts)"
    if resolve_languages(languages, tokenizer, vocab_size) == "english":
        return EvaluationTexts(found, f"built-in English prose {hint}")
    for line in filter(None, builtin_texts("multilingual-evaluation")):
        language, _, text = line.partition(" ")
        found.setdefault(language, []).append(text)
    return EvaluationTexts(found, f"built-in texts in {len(found)} languages {hint}")


def resolve_languages(languages: Languages, tokenizer: TextTokenizer, vocab_size: int) -> Languages:
    """Return "english" or "multilingual", for "auto" by the vocabulary."""
    if languages != "auto":
        return languages
    return "multilingual" if is_multilingual(tokenizer, vocab_size) else "english"


def is_multilingual(tokenizer: TextTokenizer, vocab_size: int) -> bool:
    """Whether a vocabulary has words of three scripts besides Latin, 100 or more of each.

    A word is an entry with at least two letters, all of one script. bert-base-uncased's vocabulary has eight Cyrillic
    words. Byte-level vocabularies do not show their scripts, and count as English.
    """
    words: Counter[str] = Counter()
    for token_id in range(vocab_size):
        letters = [letter for letter in tokenizer.id_to_token(token_id) or "" if letter.isalpha()]
        scripts = {unicodedata.name(letter, "?").split()[0] for letter in letters} if len(letters) > 1 else set()
        words.update(scripts if len(scripts) == 1 else ())
    return sum(script != "LATIN" and count >= _MIN_WORDS for script, count in words.items()) >= _MIN_SCRIPTS


def calibration_texts(
    tokenizer: TextTokenizer,
    vocab_size: int,
    *,
    languages: Languages = "auto",
    file: Path | None = None,
    evaluation: EvaluationTexts | None = None,
) -> CalibrationTexts:
    """Return the texts for calibrating a model.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: number of rows of the model's vocabulary.
        languages: which of the built-in texts: "multilingual" are those in 20 languages and as many English paragraphs.
            With `file`, it only chooses the texts for the evaluation.
        file: a user's texts, which are taken in place of the built-in ones.
        evaluation: the texts that measure the accuracy. What that leaves out of a user's texts is held out, too.

    Raises:
        InputError: the file cannot be read.
    """
    builtin = evaluation
    if builtin is None or OWN in builtin.texts:
        builtin = evaluation_texts(tokenizer, vocab_size, languages=languages)
    held_out = {**builtin.texts, **(evaluation.texts if evaluation else {})}
    if file is not None:
        return CalibrationTexts(read_texts(file), f"your texts in {file.name}", (), held_out)
    hint = "(--calibration takes your own texts)"
    english = [text for text in builtin_texts("calibration") if text]
    if len(builtin.texts) == 1:
        return CalibrationTexts(english, f"built-in English prose {hint}", (ENGLISH,), held_out)
    texts = [text for text in builtin_texts("multilingual") if text]
    source = f"built-in texts in {len(builtin.texts)} languages {hint}"
    return CalibrationTexts([*texts, *english[: len(texts)]], source, tuple(builtin.texts), held_out)


def text_batches(
    texts: Sequence[str], tokenizer: TextTokenizer, spec: ModelSpec, *, max_tokens: int, round: int = 0
) -> list[TextBatch]:
    """Make batches of token ids of all lengths from `texts`.

    Every text is a row, sorted by length and padded in batches of four. The words of all texts are also joined and cut
    into windows of 32 to 2,048 tokens. A text or window above the model's limit is cut into pieces. So the words and
    the masked words are the same for every limit, and a result on these batches does not depend on it.

    For a classifier with token types, every second row is a pair of its halves. For a fill-mask model, 15 % of the
    words are masked (seeded): other words in each round, and other words in the windows than in the texts. The array of
    a batch holds the original ids, [num_masks] int64; it is empty for other tasks.

    Args:
        texts: at least one text.
        tokenizer: the model's tokenizer.
        spec: the facts about the model.
        max_tokens: the most words that are taken from the texts; the windows hold as many again.
        round: number of the round, up to `_ROUNDS` - 1; all rounds together mask nine words in ten once.
    """
    rng = np.random.default_rng(_SEED)
    prefix, suffix = tokenizer.template.prefix, tokenizer.template.suffix
    special = len(prefix) + len(suffix)
    has_pairs = spec.task == "classify" and spec.token_types
    rows = _rows(texts, tokenizer, max_tokens)
    words = [rows[i][len(prefix) : len(rows[i]) - len(suffix)] for i in _at_most(rows, max_tokens)]
    ends = np.cumsum([0, *map(len, words)])
    inner = max(1, spec.max_length - special)
    pieces = [span for start, end in pairwise(ends) for span in _cut(start, end, inner)]
    windows = _windows(int(ends[-1]), [min(window - special, inner) for window in _WINDOWS])
    stream, draws = np.concatenate(words).astype(np.int64), rng.random(ends[-1])

    def batch(spans: Sequence[Span], kind: int) -> TextBatch:
        # Each round and kind masks its own 15 % of all words.
        masked = np.floor(draws / MASK_PROBABILITY) == 2 * round + kind
        rows = [
            _row(stream[slice(*span)].tolist(), tokenizer, is_pair=has_pairs and i % 2 == 0)
            for i, span in enumerate(spans)
        ]
        positions, wanted = None, np.empty(0, np.int64)
        if spec.task == "fill-mask" and tokenizer.mask_token_id is not None:
            masks = [
                (i, len(prefix) + n)
                for i, span in enumerate(spans)
                for n in np.flatnonzero(masked[slice(*span)]).tolist()
            ]
            # At least one mask: a batch without masks does not test the vocabulary projection.
            positions = np.array(masks or [(0, min(len(prefix), len(rows[0]) - 1))], np.int64)
            wanted = _mask(rows, positions, tokenizer.mask_token_id)
        padded = collate(rows, pad_token_id=spec.pad_token_id, token_types=spec.token_types)
        return dataclasses.replace(padded, mask_positions=positions), wanted

    return [batch(group, 0) for group in _grouped(pieces)] + [batch(group, 1) for group in windows]


def texts_left_out(texts: Sequence[str], tokenizer: TextTokenizer, *, max_tokens: int) -> list[str]:
    """Return the texts that `text_batches` with the same arguments does not take."""
    taken = set(_at_most(_rows(texts, tokenizer, max_tokens), max_tokens))
    kept = [text for text in texts if text.strip()]
    return [text for i, text in enumerate(kept) if i not in taken]


def evaluation_rounds(
    texts: Mapping[str, Sequence[str]],
    tokenizer: TextTokenizer,
    spec: ModelSpec,
    *,
    max_tokens: int,
    left_out_of: int | None = None,
) -> "dict[str, TextRounds]":
    """Return language -> rounds of its texts, see `EvaluationTexts`.

    Args:
        texts: language -> texts.
        tokenizer: the model's tokenizer.
        spec: the facts about the model.
        max_tokens: the most words of English and of a user's texts; other languages have `LANGUAGE_TOKENS`.
        left_out_of: take the texts that the same rounds with this `max_tokens` do not take, so that one set of rounds
            can judge what another has chosen.
    """
    found = {}
    for language, each in texts.items():
        is_large = language in (ENGLISH, OWN)
        most = max_tokens if is_large else LANGUAGE_TOKENS
        if left_out_of is not None:
            taken = left_out_of if is_large else LANGUAGE_TOKENS
            each = texts_left_out(each, tokenizer, max_tokens=taken)
        if each:  # a tokenizer that knows none of the words may make so few tokens that nothing is left
            found[language] = TextRounds(each, tokenizer, spec, max_tokens=most)
    return found


class Rounds(Protocol):
    """The batches of each round, such as a list of lists."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sequence[TextBatch]: ...


class TextRounds:
    """The rounds of `text_batches`, each made at its first use; the arguments are those of `text_batches`."""

    def __init__(self, texts: Sequence[str], tokenizer: TextTokenizer, spec: ModelSpec, *, max_tokens: int) -> None:
        self._make = partial(text_batches, texts, tokenizer, spec, max_tokens=max_tokens)
        self._made: dict[int, list[TextBatch]] = {}

    def __len__(self) -> int:
        return _ROUNDS

    def __getitem__(self, number: int, /) -> Sequence[TextBatch]:
        if number not in self._made:
            self._made[number] = self._make(round=number)
        return self._made[number]


def _cut(start: int, end: int, length: int) -> list[Span]:
    """Return spans of `length` that cover `start` to `end`, the last one shorter; one empty span for no words."""
    return [(i, min(i + length, end)) for i in range(start, end, length)] or [(start, end)]


def _windows(total: int, lengths: Sequence[int]) -> list[list[Span]]:
    """Return batches of windows with every word once: a sixth in each shorter length, the rest in the longest."""
    parts = [total * i // 6 for i in range(len(lengths))] + [total]
    groups = []
    for (start, end), length in zip(pairwise(parts), lengths, strict=True):
        spans = _cut(start, end, length) if start < end else []
        whole, rest = [span for span in spans if span[1] - span[0] == length], spans[-1:]
        rows = max(1, _WINDOW_TOKENS // length)
        groups += [whole[i : i + rows] for i in range(0, len(whole), rows)]
        groups += [rest] if rest and rest != whole[-1:] else []
    return groups


def _row(words: list[int], tokenizer: TextTokenizer, *, is_pair: bool) -> list[int]:
    """Make a text of these words, or a pair of their halves of the same length, with [SEP] in place of the last."""
    inner = len(words) - (tokenizer.min_pair_length - 2) + (tokenizer.min_length - 1)
    if not is_pair or inner < 2:
        return tokenizer.template.row(words)
    return tokenizer.template.row(words[: inner // 2], words[inner // 2 : inner])


def _rows(texts: Sequence[str], tokenizer: TextTokenizer, max_tokens: int) -> list[list[int]]:
    """Return the token ids of the texts that are not blank, each cut to `max_tokens`."""
    special = len(tokenizer.template.prefix) + len(tokenizer.template.suffix)
    kept = [text for text in texts if text.strip()]
    return tokenizer.encode_texts(kept, max_length=max(max_tokens, special + 1), truncation=True)


def _at_most(rows: Sequence[list[int]], max_tokens: int) -> list[int]:
    """Choose rows spread evenly over `rows` with about `max_tokens` tokens; at least one row if there is one."""
    total = sum(map(len, rows))
    keep = min(len(rows), max(1, len(rows) * max_tokens // max(total, 1)))
    return np.linspace(0, len(rows) - 1, keep).round().astype(int).tolist() if rows else []


def _grouped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    by_length = sorted(spans, key=lambda span: span[1] - span[0])
    for start in range(0, len(by_length), _ROWS_OF_A_BATCH):
        yield by_length[start : start + _ROWS_OF_A_BATCH]


def _mask(rows: list[list[int]], positions: NDArray[np.int64], mask_token_id: int) -> NDArray[np.int64]:
    """Put the mask token at the positions (row, token), and return the original ids."""
    wanted = np.array([rows[row][token] for row, token in positions], np.int64)
    for row, token in positions:
        rows[row][token] = mask_token_id
    return wanted
