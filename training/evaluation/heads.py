"""Heads on a pretrained encoder for tagging words, finding answers and comparing texts, and their examples as tokens.

Tags have dropout and one linear layer on every token, as in transformers' classes; answers a linear layer with two
outputs for each token, the start and the end; texts are compared by the cosine of their first tokens' hidden states.

Shapes: B rows, S tokens of the longest row, H hidden size, N examples, T tokens of all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from gte_deploy.training.evaluation.classifiers import PretrainedEncoder, run_without_padding
from gte_deploy.training.evaluation.finetuning import EVALUATION_BATCH, Encoded, cutting_tokenizer, tokenize
from gte_deploy.training.evaluation.xtreme_data import ChoiceExamples, ContextQuestion, TaggedSentences, TextPairs

IGNORED = -100  # cross_entropy leaves these labels out
_COSINE_SCALE = 20.0


# --- models -----------------------------------------------------------------------------------------------------------


class TokenHead(nn.Module):
    """An encoder with dropout and a new linear layer on every token; `logits` are [B, S, num_outputs].

    With `masked`, outputs at padding are the lowest float, so that no padding competes as the start of an answer.
    """

    def __init__(self, encoder: nn.Module, num_outputs: int, *, dropout: float, masked: bool = False) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder, self.masked = encoder, masked
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.classifier.weight.device

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> TokenClassifierOutput:
        """Compute the outputs of every token."""
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        logits = self.classifier(self.dropout(hidden))
        if self.masked:
            logits = logits.masked_fill(attention_mask[..., None] == 0, torch.finfo(logits.dtype).min)
        return TokenClassifierOutput(logits=logits)


class DualEncoder(nn.Module):
    """One encoder for queries and passages, whose embedding is the first token's hidden state."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Score every query against every passage of the batch: 20 times the cosine, [B, B]."""
        queries, passages = (
            self.embed(**{name.removeprefix(side): tensor for name, tensor in inputs.items() if name.startswith(side)})
            for side in ("query_", "passage_")
        )
        return SequenceClassifierOutput(logits=_COSINE_SCALE * queries @ passages.T)

    def embed(self, **inputs: Tensor) -> Tensor:
        """Return the embeddings, [B, H] float32 of length 1."""
        return F.normalize(self.encoder(**inputs).last_hidden_state[:, 0].float(), dim=-1)


def bare_encoder(encoder: PretrainedEncoder, *, seed: int, is_packed: bool) -> nn.Module:
    """Load the encoder alone, float32 on the CPU; with `is_packed` it computes no padding."""
    classifier = encoder.classifier(num_labels=2, seed=seed)
    if is_packed:
        run_without_padding(classifier)
    return classifier.base_model


def token_dropout(encoder: nn.Module) -> float:
    """The dropout before a head on tokens, as in transformers' classes for token classification."""
    config: Any = encoder.config
    chosen = getattr(config, "classifier_dropout", None)
    return float(getattr(config, "hidden_dropout_prob", 0.0) if chosen is None else chosen)


# --- losses -----------------------------------------------------------------------------------------------------------


def choice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the right choice, from outputs [B * C, 1] and labels [B]."""
    return F.cross_entropy(logits.view(len(labels), -1), labels)


def tag_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tags, from outputs [B, S, tags] and labels [B, S]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the cross-entropies of start and end, from outputs [B, S, 2] and labels [B, 2]."""
    return (F.cross_entropy(logits[..., 0], labels[:, 0]) + F.cross_entropy(logits[..., 1], labels[:, 1])) / 2


# --- examples as tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceRows:
    """N questions with C choices each, as N * C rows of tokens; `labels` [N]."""

    rows: Encoded
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, examples: ChoiceExamples, *, encoder: PretrainedEncoder, max_length: int) -> ChoiceRows:
        """Tokenize each premise with each choice. Of two texts the longer one is truncated first."""
        encodings = tokenize(examples.texts, tokenizer=cutting_tokenizer(encoder, max_length))
        return cls(Encoded.of_encodings(encodings, np.zeros(len(examples.texts)), encoder=encoder), examples.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, members: NDArray[np.int64], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs [B * C, S] and labels [B]."""
        choices = len(self.rows) // len(self)
        rows = (members[:, None] * choices + np.arange(choices)).ravel()
        return self.rows.inputs(rows, device), torch.from_numpy(self.labels[members]).to(device)


@dataclass(frozen=True)
class TagRows:
    """N sentences as tokens. A word's first token has the number of its tag; all other tokens are IGNORED."""

    rows: Encoded
    tags: NDArray[np.int64]  # [T]

    @classmethod
    def of(
        cls, sentences: TaggedSentences, names: Sequence[str], *, encoder: PretrainedEncoder, max_length: int
    ) -> TagRows:
        """Tokenize sentences of words; words beyond `max_length` tokens are left out."""
        tokenizer = cutting_tokenizer(encoder, max_length)
        encodings = list(tokenize(sentences.words, tokenizer=tokenizer, in_words=True))
        numbers = {name: number for number, name in enumerate(names)}
        tags = []
        for encoding, sentence in zip(encodings, sentences.tags, strict=True):
            before = None
            for word in encoding.word_ids:
                tags.append(IGNORED if word is None or word == before else numbers[sentence[word]])
                before = word
        rows = Encoded.of_encodings(iter(encodings), np.zeros(len(encodings)), encoder=encoder)
        return cls(rows, np.array(tags, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, members: NDArray[np.int64], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and labels, [B, S]."""
        source, mask = self.rows.places(members)
        labels = torch.from_numpy(np.where(mask, self.tags[source], IGNORED)).to(device)
        return self.rows.inputs(members, device), labels

    def decode(self, outputs: Sequence[NDArray], names: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
        """Return the predicted and the true tags of each sentence's words."""
        predicted, true = [], []
        for number, output in enumerate(outputs):
            tags = self.tags[self.rows.ends[number] : self.rows.ends[number + 1]]
            kept = tags != IGNORED
            predicted.append([names[tag] for tag in output[kept].argmax(axis=1)])
            true.append([names[tag] for tag in tags[kept]])
        return predicted, true


@dataclass(frozen=True)
class AnswerRows:
    """Questions with parts of their texts, as rows of tokens.

    Args:
        rows: the tokens; labels are the first and the last token of the answer, [rows, 2], 0 where the part has none.
        questions: which question each row belongs to, [rows].
        offsets: for each row the characters [start, stop) of the text that each token is, or (-1, -1).
    """

    rows: Encoded
    questions: NDArray[np.int64]
    offsets: list[NDArray[np.int64]]

    @classmethod
    def of(
        cls, questions: Sequence[ContextQuestion], *, encoder: PretrainedEncoder, max_length: int, stride: int
    ) -> AnswerRows:
        """Tokenize each question with its text; a long text becomes several rows that overlap by `stride` tokens."""
        # The stride has to leave room for new tokens, whatever the length of a question.
        stride = min(stride, max_length // 3)
        tokenizer = cutting_tokenizer(encoder, max_length, strategy="only_second", stride=stride)
        shortened = cutting_tokenizer(encoder, max_length - 1 - stride - tokenizer.num_special_tokens_to_add(True))
        texts = [(_shortened(item.question, shortened), item.context) for item in questions]
        encodings, numbers, offsets, labels = [], [], [], []
        for number, first in enumerate(tokenize(texts, tokenizer=tokenizer)):
            for encoding in (first, *first.overflowing):
                places = _context_offsets(encoding)
                encodings.append(encoding)
                numbers.append(number)
                offsets.append(places)
                labels.append(_answer_tokens(places, questions[number]))
        rows = Encoded.of_encodings(iter(encodings), np.array(labels, dtype=np.int64), encoder=encoder)
        return cls(rows, np.array(numbers, dtype=np.int64), offsets)

    def answers(
        self, outputs: Sequence[NDArray], questions: Sequence[ContextQuestion], *, best: int = 20, longest: int = 30
    ) -> list[str]:
        """Return the answer to each question: the span of the highest sum of start and end over its rows.

        Spans have at most `longest` tokens, and begin and end at one of the `best` tokens, as in transformers' scripts.
        """
        found: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
        for output, offsets, number in zip(outputs, self.offsets, self.questions, strict=True):
            score, start, stop = _best_span(output, offsets, best=best, longest=longest)
            if score > found[number][0]:
                found[number] = score, questions[number].context[start:stop]
        return [text for _, text in found]


def _shortened(question: str, tokenizer: Any) -> str:
    """Cut a question that would leave no room for its text, at a token's end."""
    encoding = tokenizer.encode(question, add_special_tokens=False)
    return question[: encoding.offsets[-1][1]] if encoding.overflowing else question


def _context_offsets(encoding: Any) -> NDArray[np.int64]:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.array([sequence == 1 for sequence in encoding.sequence_ids])
    return np.where(inside[:, None], offsets, -1)


def _answer_tokens(offsets: NDArray[np.int64], question: ContextQuestion) -> tuple[int, int]:
    """Return the tokens at the ends of the answer; (0, 0), the first token, if the row does not hold it whole."""
    start, stop = question.start, question.start + len(question.answers[0])
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < stop:
        return 0, 0
    first = inside[np.searchsorted(offsets[inside, 0], start, side="right") - 1]
    last = inside[np.searchsorted(offsets[inside, 1], stop, side="left")]
    return int(first), int(last)


def _best_span(output: NDArray, offsets: NDArray[np.int64], *, best: int, longest: int) -> tuple[float, int, int]:
    starts, stops = (np.argsort(-output[:, side], kind="stable")[:best] for side in (0, 1))
    chosen = (-np.inf, 0, 0)
    for first in starts:
        for last in stops:
            inside = offsets[first, 0] >= 0 and offsets[last, 0] >= 0
            score = float(output[first, 0] + output[last, 1])
            if inside and first <= last < first + longest and score > chosen[0]:
                chosen = score, int(offsets[first, 0]), int(offsets[last, 1])
    return chosen


@dataclass(frozen=True)
class PairRows:
    """N queries and their passages as tokens. The passages of a batch's other queries are the wrong answers."""

    queries: Encoded
    passages: Encoded

    @classmethod
    def of(cls, pairs: TextPairs, *, encoder: PretrainedEncoder, query_length: int, max_length: int) -> PairRows:
        """Tokenize queries and passages, each up to its own length."""
        return cls(
            encode_texts(pairs.queries, encoder=encoder, max_length=query_length),
            encode_texts(pairs.passages, encoder=encoder, max_length=max_length),
        )

    def __len__(self) -> int:
        return len(self.queries)

    def batch(self, members: NDArray[np.int64], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs of both sides, and for each query the place of its passage in the batch."""
        inputs: dict[str, Tensor] = {}
        for side, rows in (("query_", self.queries), ("passage_", self.passages)):
            inputs |= {f"{side}{name}": tensor for name, tensor in rows.inputs(members, device).items()}
        return inputs, torch.arange(len(members), device=device)


def encode_texts(texts: Sequence[str], *, encoder: PretrainedEncoder, max_length: int) -> Encoded:
    """Tokenize texts without labels."""
    encodings = tokenize(texts, tokenizer=cutting_tokenizer(encoder, max_length))
    return Encoded.of_encodings(encodings, np.zeros(len(texts)), encoder=encoder)


# --- search -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed_texts(model: DualEncoder, data: Encoded, *, bfloat16: bool = False) -> Tensor:
    """Compute the embeddings of texts, [N, H] float32 on the CPU. Texts of similar length share a batch."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    parts = []
    for start in range(0, len(order), EVALUATION_BATCH):
        inputs = data.inputs(order[start : start + EVALUATION_BATCH], model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            parts.append(model.embed(**inputs).cpu())
    embeddings = torch.empty(len(order), parts[0].shape[1])
    embeddings[torch.from_numpy(order)] = torch.cat(parts)
    return embeddings


def nearest(queries: Tensor, passages: Tensor, *, top: int, device: torch.device) -> NDArray[np.int64]:
    """Return for each query the `top` passages of the highest cosine, the best first, [Q, top]."""
    passages = passages.to(device)
    found = [(part.to(device) @ passages.T).topk(min(top, len(passages))).indices.cpu() for part in queries.split(256)]
    return torch.cat(found).numpy()
