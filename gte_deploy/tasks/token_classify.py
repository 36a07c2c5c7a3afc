"""Labels of tokens: from logits to the forms of transformers' token-classification pipeline, or the bare logits.

Shapes: B rows, T tokens of a text without special ones, L labels, N largest number of entities in a row.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.activations import softmax
from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import AGGREGATION_STRATEGIES, AggregationStrategy, ModelSpec
from gte_deploy.tasks.base import HIDDEN, Ensemble, Outputs, Task, Tensors, filled, import_torch
from gte_deploy.tasks.classify import ScoreRequest
from gte_deploy.text.inputs import as_texts, as_words

if TYPE_CHECKING:
    from gte_deploy.text.tokenization import Piece, TextTokenizer

ENTITIES_SERVED = Ensemble(
    "gte_classify_tokens",
    ("ENTITIES", "LABEL", "SCORE", "INDEX", "WORD", "START", "END"),
    ("AGGREGATION_STRATEGY", "IGNORE_LABELS"),
)
LOGITS_SERVED = Ensemble("gte_classify_tokens", ("TOKENS", "LOGITS"))
_NO_INDEX = -1

Entity = dict[str, Any]
"""One token, with the keys entity, score, index, word, start and end; or a group of them, with the keys entity_group,
score, word, start and end."""


@dataclass(frozen=True)
class OwnLogits:
    """Asks for the logits [T, L] of the tokens of each text, special tokens left out.

    Args:
        first: special tokens before the text.
        last: special tokens behind it.
    """

    first: int = 0
    last: int = 0

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`."""
        return ("logits",)

    def answer(self, batch: Batch, outputs: Outputs) -> list[NDArray[np.float32]]:
        """See `Request`."""
        ends = (batch.attention_mask.sum(axis=1) - self.last).tolist()
        return [logits[self.first : end] for logits, end in zip(outputs["logits"], ends, strict=True)]


class TokenScoreRequest(ScoreRequest):
    """The arguments of one call of `predict` that say what to return: scores [T, L] of the tokens of each text."""

    def assemble(self, logits: Sequence[NDArray[np.float32]], *, single: bool) -> Any:
        """Return scores of texts from their logits [T, L]; if `single`, those of the only text."""
        scores = self.scores(np.concatenate(logits))
        parts: list[Any] = np.split(scores, np.cumsum([len(each) for each in logits])[:-1])
        if self.return_type != "numpy":
            parts = [import_torch().from_numpy(np.ascontiguousarray(part)) for part in parts]
        return parts[0] if single else parts

    def _labels_of_default(self) -> int:
        """CrossEncoder applies the sigmoid if there is one label; token logits get no default activation."""
        return 0


@dataclass(frozen=True)
class TaggingRequest:
    """The arguments of one call that say which entities to answer.

    Args:
        aggregation_strategy: "none" answers tokens, the others groups of them.
        ignore_labels: labels that are left out of the answer.
        stride: number of tokens that neighbouring windows of a long text share; None if texts are not cut.
    """

    aggregation_strategy: AggregationStrategy
    ignore_labels: tuple[str, ...]
    stride: int | None

    @classmethod
    def of(cls, aggregation_strategy: Any, ignore_labels: Any, stride: Any) -> "TaggingRequest":
        """Read the arguments as the pipeline does.

        Raises:
            InputError: an argument has a wrong value; the message names the argument and the allowed values.
        """
        strategy = "none" if aggregation_strategy is None else aggregation_strategy
        strategy = str(getattr(strategy, "value", strategy)).lower()  # transformers has an enumeration for them
        check_choice("aggregation_strategy", strategy, AGGREGATION_STRATEGIES)
        if stride is not None and strategy == "none":
            raise InputError(
                "stride joins what windows of a text answer, which the aggregation_strategy 'none' cannot; choose one "
                f"of {', '.join(AGGREGATION_STRATEGIES[1:])}"
            )
        labels = ("O",) if ignore_labels is None else ignore_labels
        labels = (labels,) if isinstance(labels, str) else tuple(labels)
        if not all(isinstance(label, str) for label in labels):
            raise InputError(f"ignore_labels must be names of labels, not {ignore_labels!r}")
        return cls(strategy, labels, stride)  # type: ignore[arg-type]

    def answers(
        self,
        given: "TaggedTexts",
        pieces: "Sequence[Piece]",
        logits: Iterable[tuple[int, NDArray[np.float32]]],
        tokenizer: "TextTokenizer",
        spec: ModelSpec,
    ) -> list[list[Entity]]:
        """The entities of each text; none of a text without pieces.

        Args:
            given: the texts.
            pieces: pieces of the texts; those of one text come in order.
            logits: number of a piece and logits [T, L] of its own tokens, for each piece in any order.
            tokenizer: tokenizer of the model.
            spec: facts of the model.
        """
        places = [given.places(piece) for piece in pieces]
        tagger = _Tagger(self.aggregation_strategy, tokenizer, spec.id2label)
        found: list[list[Entity]] = [[] for _ in pieces]
        for number, values in logits:
            piece = pieces[number]
            text = given.texts[piece.index]
            found[number] = self._kept(tagger.entities(piece, text, values, places[number].tolist()))
        texts: list[list[list[Entity]]] = [[] for _ in given.texts]
        for piece, entities in zip(pieces, found, strict=True):
            texts[piece.index].append(entities)
        return [windows[0] if len(windows) == 1 else joined_windows(sum(windows, [])) for windows in texts]

    def _kept(self, entities: list[Entity]) -> list[Entity]:
        name = "entity" if self.aggregation_strategy == "none" else "entity_group"
        return [entity for entity in entities if entity[name] not in self.ignore_labels]


@dataclass(frozen=True)
class TaggedTexts:
    """The texts of one call.

    Args:
        texts: the texts whose tokens are labelled; if the caller gave words, they are joined by the delimiter.
        encoded: the input of the tokenizer: the texts, or the words of each text.
        word_starts: the start of each word in its text; None if the caller gave texts.
        offsets: (start, end) of the tokens of each text, special tokens included, if the caller gave them, else None.
        single: whether the caller gave one text alone.
    """

    texts: list[str]
    encoded: list[str] | list[list[str]]
    word_starts: list[NDArray[np.int64]] | None
    offsets: list[NDArray[np.int64]] | None
    single: bool

    @classmethod
    def of(cls, inputs: Any, *, is_split_into_words: bool, delimiter: Any, offset_mapping: Any) -> "TaggedTexts":
        """Read the arguments as the pipeline does.

        Raises:
            InputError: there is no text, or words came in place of texts or texts in place of words; or
                `offset_mapping` is not one list of offsets for each text.
        """
        if is_split_into_words:
            words = as_words(inputs)
            delimiter = " " if delimiter is None else as_texts(delimiter, name="delimiter")[0][0]
            texts = as_texts([delimiter.join(each) for each in words])[0]
            starts = [_starts(each, len(delimiter)) for each in words]
            return cls(texts, words, starts, _checked_offsets(offset_mapping, len(texts)), single=False)
        texts, single = as_texts(inputs)
        return cls(texts, texts, None, _checked_offsets(offset_mapping, len(texts)), single)

    @property
    def keys(self) -> Sequence[Hashable]:
        """A key for each text: equal texts have equal keys, unless the caller gave their offsets."""
        if self.offsets is not None:
            return range(len(self.texts))
        return self.texts if self.word_starts is None else [tuple(words) for words in self.encoded]

    def places(self, piece: "Piece") -> NDArray[np.int64]:
        """Return (start, end) of the piece's own tokens in their text, [T, 2].

        Raises:
            InputError: the caller's `offset_mapping` has fewer entries than the text has tokens.
        """
        offsets = piece.offsets
        if self.offsets is not None:
            given = self.offsets[piece.index]
            if len(given) < len(piece.ids):
                raise InputError(
                    f"offset_mapping has {len(given)} places for input {piece.index}, which has {len(piece.ids)} "
                    "tokens, special tokens included"
                )
            offsets = given[piece.first : piece.first + len(piece.offsets)]
        if self.word_starts is None or piece.words is None:
            return offsets
        return offsets + self.word_starts[piece.index][piece.words][:, None]


def joined_windows(entities: list[Entity]) -> list[Entity]:
    """Join the entities of all windows of a text.

    Among overlapping entities the longest stays; among equally long ones, the one with the highest score.
    """
    if not entities:
        return []
    first, *rest = sorted(entities, key=lambda entity: entity["start"])
    joined = [first]
    for entity in rest:
        last = joined[-1]
        if not last["start"] <= entity["start"] < last["end"]:
            joined.append(entity)
        elif _rank(entity) > _rank(last):
            joined[-1] = entity
    return joined


def _rank(entity: Entity) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]


@dataclass(frozen=True)
class _Token:
    """A token, or a word of several tokens."""

    word: str
    scores: NDArray[np.float32]
    start: int
    end: int
    index: int
    is_subword: bool


@dataclass(frozen=True)
class _Tagger:
    strategy: AggregationStrategy
    tokenizer: "TextTokenizer"
    id2label: Mapping[int, str]

    def entities(
        self, piece: "Piece", text: str, logits: NDArray[np.float32], places: Sequence[Sequence[int]]
    ) -> list[Entity]:
        scores = softmax(logits) if len(logits) else logits
        tokens = [
            self._token(token_id, text, row, *place, index=piece.first + at)
            for at, (token_id, row, place) in enumerate(zip(piece.own_ids, scores, places, strict=True))
        ]
        if self.strategy in ("none", "simple"):
            found = [self._entity(token) for token in tokens]
        else:
            found = [self._entity(self._word(parts)) for parts in _words(tokens)]
        return found if self.strategy == "none" else [self._group(parts) for parts in _groups(found)]

    def _token(
        self, token_id: int, text: str, scores: NDArray[np.float32], start: int, end: int, *, index: int
    ) -> _Token:
        word, shown = self.tokenizer.token(token_id), text[start:end]
        if token_id == self.tokenizer.unk_token_id:
            return _Token(shown, scores, start, end, index, is_subword=False)
        if self.tokenizer.marks_subwords:
            is_subword = len(word) != len(shown)
        else:
            # The pipeline's guess if tokens have no subword marks: without a space before it, a token continues a word.
            is_subword = start > 0 and " " not in text[start - 1 : start + 1]
        return _Token(word, scores, start, end, index, is_subword)

    def _entity(self, token: _Token) -> Entity:
        best = int(token.scores.argmax())
        return {
            "entity": self.id2label.get(best, f"LABEL_{best}"),
            "score": float(token.scores[best]),
            "index": token.index,
            "word": token.word,
            "start": token.start,
            "end": token.end,
        }

    def _word(self, parts: list[_Token]) -> _Token:
        """Join the tokens of a word into one token, whose scores decide the label of the word."""
        if self.strategy == "first" or len(parts) == 1:
            scores = parts[0].scores
        elif self.strategy == "max":
            scores = max(parts, key=lambda part: float(part.scores.max())).scores
        else:
            scores = np.mean([part.scores for part in parts], axis=0)
        word = self.tokenizer.joined_tokens([part.word for part in parts])
        return _Token(word, scores, parts[0].start, parts[-1].end, parts[0].index, is_subword=False)

    def _group(self, parts: list[Entity]) -> Entity:
        return {
            "entity_group": parts[0]["entity"].split("-", 1)[-1],
            "score": sum(part["score"] for part in parts) / len(parts),
            "word": self.tokenizer.joined_tokens([part["word"] for part in parts]),
            "start": parts[0]["start"],
            "end": parts[-1]["end"],
        }


def _words(tokens: list[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.is_subword:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _groups(entities: list[Entity]) -> list[list[Entity]]:
    """Neighbours with the same tag; one that begins with "B-" begins a group."""
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, tag = _tag(entity["entity"])
        if groups and not begins and tag == _tag(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _tag(label: str) -> tuple[bool, str]:
    """Return whether the label begins a group, and the tag without its "B-" or "I-"."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _starts(words: Sequence[str], delimiter: int) -> NDArray[np.int64]:
    lengths = np.array([len(word) + delimiter for word in words], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]])


def _checked_offsets(offset_mapping: Any, count: int) -> list[NDArray[np.int64]] | None:
    if offset_mapping is None:
        return None
    try:
        one = len(offset_mapping) > 0 and isinstance(offset_mapping[0], tuple)
        found = [np.array(places, dtype=np.int64) for places in ([offset_mapping] if one else offset_mapping)]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"offset_mapping must be a list of (start, end) for each text: {error}") from error
    if len(found) != count or any(places.ndim != 2 or places.shape[1] != 2 or (places < 0).any() for places in found):
        raise InputError(f"offset_mapping must be a list of (start, end) for each of the {count} texts")
    return found


def entities_to_tensors(found: Sequence[Sequence[Entity]]) -> dict[str, NDArray[Any]]:
    """Convert the entities of each row to the tensors of `ENTITIES_SERVED`: [B, N]; `ENTITIES` [B, 1] counts them."""
    width = max(1, *map(len, found))

    def column(name: str, filler: Any, dtype: Any) -> NDArray[Any]:
        return filled([[entity.get(name, filler) for entity in entities] for entities in found], width, filler, dtype)

    labels = [[entity["entity" if "entity" in entity else "entity_group"].encode() for entity in row] for row in found]
    words = [[entity["word"].encode() for entity in row] for row in found]
    return {
        "ENTITIES": np.array([[len(entities)] for entities in found], dtype=np.int32),
        "LABEL": filled(labels, width, b"", np.object_),
        "SCORE": column("score", 0.0, np.float32),
        "INDEX": column("index", _NO_INDEX, np.int32),
        "WORD": filled(words, width, b"", np.object_),
        "START": column("start", 0, np.int32),
        "END": column("end", 0, np.int32),
    }


def entities_from_tensors(tensors: Tensors, *, grouped: bool) -> list[list[Entity]]:
    """Return the entities that `entities_to_tensors` converted; `grouped` says whether they are groups of tokens."""
    return [_entities_of(tensors, row, grouped=grouped) for row in range(len(tensors["ENTITIES"]))]


def _entities_of(tensors: Tensors, row: int, *, grouped: bool) -> list[Entity]:
    count = int(tensors["ENTITIES"][row, 0])
    columns = {
        "entity_group" if grouped else "entity": [label.decode() for label in tensors["LABEL"][row, :count]],
        "score": tensors["SCORE"][row, :count].tolist(),
        **({} if grouped else {"index": tensors["INDEX"][row, :count].tolist()}),
        "word": [word.decode() for word in tensors["WORD"][row, :count]],
        "start": tensors["START"][row, :count].tolist(),
        "end": tensors["END"][row, :count].tolist(),
    }
    return [dict(zip(columns, entity, strict=True)) for entity in zip(*columns.values(), strict=True)]


TOKEN_CLASSIFY = Task(
    name="token-classify",
    outputs=("logits", HIDDEN),
    request=OwnLogits,
    method="classify_tokens",
    architecture="ForTokenClassification",
    ensembles=(ENTITIES_SERVED, LOGITS_SERVED),
    has_labels=True,
)
