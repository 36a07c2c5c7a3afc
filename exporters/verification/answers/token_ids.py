"""Compares the token ids that reach the model with those of AutoTokenizer, on odd texts."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import GteDeployError
from gte_deploy.core.spec import ModelSpec, Precision
from gte_deploy.exporters.verification.answers.closeness import named
from gte_deploy.exporters.verification.answers.odd_texts import (
    ODD_TEXTS,
    PLAIN_TEXTS,
    long_pairs,
    long_text,
    short_pairs,
    token_texts,
    vocabulary_texts,
)
from gte_deploy.exporters.verification.answers.subject import Findings, Subject
from gte_deploy.model import Model
from gte_deploy.text.inputs import MAX_BATCH_TOKENS

_Side = Mapping[str, NDArray[np.int64]]


def compare_token_ids(subject: Subject, findings: Findings) -> None:
    """Compare ids, masks and token types of single texts, of a batch and, for a reranker, of pairs."""
    model, tokenizer = subject.model, subject.tokenizer
    if subject.files.lowercases:
        _lowercase(tokenizer)
    written = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    long = long_text(tokenizer, model.spec.max_length)
    prompted = [prompt + text for prompt in model.spec.prompts.values() for text in PLAIN_TEXTS]
    texts = [*ODD_TEXTS, *PLAIN_TEXTS, *token_texts(written), *vocabulary_texts(tokenizer, 8), *prompted, long]
    tokenize = partial(model.tokenize, truncation=True)
    for batch in (*([text] for text in dict.fromkeys(texts)), [*PLAIN_TEXTS, "", long[:200]]):
        _compare_batch(batch, partial(tokenize, batch), subject, findings)
    version = importlib.metadata.version("transformers")
    findings.compared["tokenizer"] = f"{subject.tokenizer_class} of transformers {version}"
    if model.spec.task == "classify":
        some = [*PLAIN_TEXTS[:4], *vocabulary_texts(tokenizer, 4)]
        for pair in (*short_pairs(some), *long_pairs(some, long)):
            _compare_batch([pair], partial(_fed, model, pair), subject, findings)


def _lowercase(tokenizer: Any) -> None:
    from tokenizers import normalizers

    own = tokenizer.backend_tokenizer.normalizer
    steps = [normalizers.Lowercase(), *([] if own is None else [own])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


class _Recorder:
    """A backend that keeps each batch it is given, and answers zeros."""

    name = "recorder"
    device = "cpu"
    num_threads = 1
    outputs: tuple[str, ...] = ("last_hidden_state", "logits")
    precision: Precision = "fp32"

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.batches: list[Batch] = []

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        self.batches.append(batch)
        return {name: np.zeros((len(batch.input_ids), self._spec.num_labels), np.float32) for name in outputs}

    def close(self) -> None:
        """See `Backend.close`."""


def _fed(model: Model, pair: tuple[str, str]) -> dict[str, NDArray[np.int64]]:
    """Return the arrays that `predict` gives to the backend for one pair."""
    recorder = _Recorder(model.spec)
    recording = Model(
        recorder, model._tokenizer, model.spec, max_batch_tokens=MAX_BATCH_TOKENS, path=model.path, backend_reason=""
    )
    recording.predict([pair], prompt="", truncation=True)
    (batch,) = recorder.batches
    fed = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return fed if batch.token_type_ids is None else {**fed, "token_type_ids": batch.token_type_ids}


def _compare_batch(
    inputs: Sequence[str | tuple[str, str]], ask: Callable[[], _Side], subject: Subject, findings: Findings
) -> None:
    theirs = subject.tokenizer(
        list(inputs), truncation=True, max_length=subject.model.spec.max_length, padding=True, return_tensors="np"
    )
    findings.count("pairs tokenised" if isinstance(inputs[0], tuple) else "texts tokenised", len(inputs))
    try:
        ours = ask()
    except GteDeployError as error:
        findings.fail("token ids", f"{named('token ids', inputs[0])} are refused: {error}")
        return
    for row, given in enumerate(inputs):
        wanted, found = (_real_tokens(side, row, types=subject.has_token_types) for side in (theirs, ours))
        for what in wanted:
            if wanted[what] != found[what]:
                findings.fail(what, f"{named(what, given)}: {_first_difference(found[what], wanted[what])}")
                break


def _real_tokens(side: Mapping[str, Any], row: int, *, types: bool) -> dict[str, list[int]]:
    """Return ids and token types of the real tokens of a row, and the ids at its padding.

    Only tokens are compared: a tokenizer that pads on the left gives other positions to the same tokens.
    """
    real = np.asarray(side["attention_mask"][row]) == 1
    ids = np.asarray(side["input_ids"][row])
    type_ids = np.asarray(side["token_type_ids"][row]) if "token_type_ids" in side else np.zeros_like(ids)
    return {
        "token ids": ids[real].tolist(),
        "token types": type_ids[real].tolist() if types else [],
        "padding": ids[~real].tolist(),
    }


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    lengths = f"{len(ours):,} here and {len(theirs):,} from AutoTokenizer; " if len(ours) != len(theirs) else ""
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"{lengths}from position {at} on {ours[at : at + 6]} here, {theirs[at : at + 6]} from AutoTokenizer"
