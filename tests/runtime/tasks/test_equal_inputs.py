"""Equal inputs of one call are computed once; each place gets a result of its own, and errors name the first place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gte_deploy
from gte_deploy import InputError, NonFiniteError
from gte_deploy.tasks.sparse import SparseEmbedding
from runtime_models import make_word_checkpoint

WORDS = ("the king [MASK]", "a queen of the [MASK] city", "old [MASK] water")
PLACES = (0, 1, 0, 2, 1, 0)
LONG = "the king " * 100


class Counting:
    """A backend that counts its runs and the rows in them."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.runs, self.rows = backend, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def run(self, batch: Any, outputs: Sequence[str]) -> Any:
        self.runs += 1
        self.rows += len(batch.input_ids)
        return self.backend.run(batch, outputs)


@pytest.fixture(scope="module")
def checkpoints(word_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tagger = tmp_path_factory.mktemp("equal") / "token-classify"
    make_word_checkpoint(tagger, task="token-classify", num_labels=3, seed=3)
    return {**word_checkpoints, "sparse": word_checkpoints["fill-mask"], "token-classify": tagger}


@pytest.fixture
def load(checkpoints: dict[str, Path]) -> Iterator[Callable[[str], gte_deploy.Model]]:
    opened = []

    def load(task: str) -> gte_deploy.Model:
        model = gte_deploy.load(checkpoints[task], backend="torch", task=task, num_threads=1)
        model._backend = Counting(model._backend)
        opened.append(model)
        return model

    yield load
    for model in opened:
        model.close()


def at_places(items: Sequence[Any]) -> list[Any]:
    return [items[place] for place in PLACES]


PAIRS = [(text, "the house") for text in WORDS]
SPLIT = [text.split() for text in WORDS]
CALLS: dict[str, tuple[str, Callable[[Any, Any], Any], Sequence[Any]]] = {
    "encode": ("embed", lambda model, texts: model.encode(texts), WORDS),
    "encode, prompt": ("embed", lambda model, texts: model.encode(texts, prompt_name="query"), WORDS),
    "encode, tokens": ("embed", lambda model, texts: model.encode(texts, output_value="token_embeddings"), WORDS),
    "encode, all": ("embed", lambda model, texts: model.encode(texts, output_value=None), WORDS),
    "encode, tensors": ("embed", lambda model, texts: model.encode(texts, convert_to_numpy=False), WORDS),
    "encode, cut": ("embed", lambda model, texts: model.encode(texts, max_length=5, truncation=True), WORDS),
    "encode_sparse": ("sparse", lambda model, texts: model.encode_sparse(texts), WORDS),
    "encode_sparse, dictionaries": ("sparse", lambda model, texts: model.encode_sparse(texts, as_dict=True), WORDS),
    "predict": ("classify", lambda model, pairs: model.predict(pairs), PAIRS),
    "predict, texts and pairs": ("classify", lambda model, pairs: model.predict(pairs), [*PAIRS[:2], (WORDS[2],)]),
    "predict, tokens": ("token-classify", lambda model, texts: model.predict(texts), WORDS),
    "fill_mask": ("fill-mask", lambda model, texts: model.fill_mask(texts), WORDS),
    "classify_tokens": ("token-classify", lambda model, texts: model.classify_tokens(texts, ignore_labels=[]), WORDS),
    "classify_tokens, windows": (
        "token-classify",
        lambda model, texts: model.classify_tokens(
            texts, aggregation_strategy="simple", ignore_labels=[], stride=1, max_length=8
        ),
        WORDS,
    ),
    "classify_tokens, words": (
        "token-classify",
        lambda model, texts: model.classify_tokens(texts, ignore_labels=[], is_split_into_words=True),
        SPLIT,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_equal_inputs_are_computed_once_and_answered_everywhere(name: str, load: Callable[[str], gte_deploy.Model]):
    task, call, inputs = CALLS[name]
    model = load(task)
    expected = call(model, list(inputs))
    rows, model._backend.rows = model._backend.rows, 0
    found = call(model, at_places(inputs))
    assert model._backend.rows == rows
    assert len(found) == len(PLACES)
    for result, place in zip(found, PLACES, strict=True):
        assert plain(result) == plain(expected[place])  # bit for bit: the batches are the same


@pytest.mark.parametrize("name", CALLS)
def test_results_are_not_shared(name: str, load: Callable[[str], gte_deploy.Model]):
    task, call, inputs = CALLS[name]
    found = call(load(task), at_places(inputs))
    first, third, last = (plain(found[place]) for place in (0, 2, 5))
    assert first == third == last
    if isinstance(found[2], np.floating):  # an element of an array, which none can change
        found[2] = 7
    else:
        spoil(found[2])
    assert plain(found[2]) != third
    assert plain(found[0]) == first and plain(found[5]) == last


def plain(value: Any) -> Any:
    """The value as nested lists and dictionaries of Python's own types."""
    if isinstance(value, SparseEmbedding):
        return [plain(value.indices), plain(value.values)]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def spoil(value: Any) -> None:
    """Change everything inside the value that can change."""
    if isinstance(value, SparseEmbedding):
        spoil(value.values)
    elif isinstance(value, dict):
        for name, each in value.items():
            if isinstance(each, float):
                value[name] = -1.0
            else:
                spoil(each)
    elif isinstance(value, list):
        for each in value:
            spoil(each)
    elif hasattr(value, "tolist"):
        value[...] = -7


def test_equal_embeddings_are_those_of_the_library(checkpoints: dict[str, Path], load: Any):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(checkpoints["embed"]), device="cpu")
    model = load("embed")
    texts = at_places(WORDS)
    for options in ({}, {"prompt": "old "}, {"prompt_name": "query"}):
        expected = theirs.encode(texts, **options)
        np.testing.assert_allclose(model.encode(texts, **options), expected, atol=1e-5)


def test_rank_computes_equal_documents_once(load: Callable[[str], gte_deploy.Model]):
    model = load("classify")
    alone = {document: float(model.predict([("the king", document)])[0]) for document in WORDS}
    model._backend.rows = 0
    ranked = model.rank("the king", at_places(WORDS))
    assert model._backend.rows == len(WORDS)
    assert sorted(item["corpus_id"] for item in ranked) == list(range(len(PLACES)))
    for item in ranked:
        assert item["score"] == pytest.approx(alone[WORDS[PLACES[item["corpus_id"]]]], abs=1e-5)


def test_a_place_in_the_first_or_the_second_text_makes_a_pair_another(load: Callable[[str], gte_deploy.Model]):
    model = load("classify")
    model.predict([("a king", "a queen"), ("a queen", "a king"), ("a king",), ("a king", "a king")])
    assert model._backend.rows == 4


@pytest.mark.parametrize(
    ("task", "call", "message"),
    [
        ("embed", lambda model: model.encode(["a", LONG, "a", LONG]), "input 1 has 202 tokens"),
        ("classify", lambda model: model.predict([("a", "a"), ("a", LONG), ("a", LONG)]), "input 1 has"),
        ("fill-mask", lambda model: model.fill_mask(["[MASK]", "[MASK]", "a king", "a king"]), "input 2 has no mask"),
        ("token-classify", lambda model: model.classify_tokens(["a", "a", LONG, LONG]), "input 2 has 202 tokens"),
        ("embed", lambda model: model.encode(["a", "a", "\ud800", "\ud800"]), r"inputs\[2\] has a lone surrogate"),
        ("classify", lambda model: model.predict([("a", "b"), ("a", "\ud800")]), r"inputs\[1\]\[1\] has a lone"),
    ],
)
def test_an_error_names_the_first_of_equal_inputs(task: str, call: Any, message: str, load: Any):
    with pytest.raises(InputError, match=message):
        call(load(task))


def test_numbers_that_are_not_finite_name_the_first_of_equal_inputs(load: Any, monkeypatch: pytest.MonkeyPatch):
    model = load("embed")
    run = model._backend.backend.run

    def broken(batch: Any, outputs: Sequence[str]) -> Any:
        return {name: np.full_like(values, np.nan) for name, values in run(batch, outputs).items()}

    monkeypatch.setattr(model._backend.backend, "run", broken)
    with pytest.raises(NonFiniteError, match="for the inputs 0, 2;"):
        model.encode(["a king", "a king", "the queen", "a king", "the queen"])


def test_offsets_of_the_caller_belong_to_a_place_and_not_to_a_text(load: Callable[[str], gte_deploy.Model]):
    model = load("token-classify")
    offsets = [[(0, 0), (start, start + 3), (0, 0)] for start in (1, 5)]
    found = model.classify_tokens(["king", "king"], ignore_labels=[], offset_mapping=offsets)
    assert [entities[0]["start"] for entities in found] == [1, 5]


def test_the_progress_bar_counts_all_inputs(load: Callable[[str], gte_deploy.Model], capsys: Any):
    load("embed").encode(at_places(WORDS), batch_size=1, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["encode", "encode_sparse", "predict", "fill_mask", "classify_tokens"])
def test_one_short_text_starts_no_thread_and_one_run(name: str, load: Any, monkeypatch: pytest.MonkeyPatch):
    task, call, inputs = CALLS[name]
    model = load(task)
    call(model, [inputs[0]])  # libraries may start their own threads the first time
    model._backend.runs, started = 0, []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread.name), start(thread)))
    call(model, [inputs[0]])
    assert (model._backend.runs, started) == (1, [])
