"""The comparison with recorded values, on values that transformers and sentence-transformers give for tiny models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers

import gte_deploy
from factories import add_sparse_modules
from gte_deploy.exporters.published.comparison import compare_recorded, selection
from gte_deploy.exporters.published.recorded import RECORDED, Recorded
from gte_deploy.models.published import PUBLISHED
from runtime_models import PIECES, make_word_checkpoint

TEXTS = ("the king walked to the river", "paris is a city, and the queen is old")
PAIRS = (("where is paris", "paris is a city"), ("where is paris", "the old man sings"))
MASKED = "the king walked to the [MASK]"
IDS = ((2, 20, 31, 40, 4, 50, 3),)


@pytest.fixture(scope="module")
def checkpoints(word_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sparse = make_word_checkpoint(tmp_path_factory.mktemp("sparse") / "sparse", seed=3)
    add_sparse_modules(sparse, query_weights=[i / 7 for i in range(len(PIECES))])
    return {**word_checkpoints, "sparse": sparse}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path], bundle_of: Callable[..., Path]) -> Iterator[dict[str, gte_deploy.Model]]:
    # One is a bundle; the comparison is the same on every engine, and checkpoints need no export.
    opened = {task: gte_deploy.load(path, backend="torch") for task, path in checkpoints.items() if task != "fill-mask"}
    opened["fill-mask"] = gte_deploy.load(bundle_of(checkpoints["fill-mask"]), backend="onnx")
    yield opened
    for model in opened.values():
        model.close()


def hidden(folder: Path) -> Any:
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder),
    )
    inputs = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    with torch.inference_mode():
        return model(**inputs).last_hidden_state.numpy(), inputs["attention_mask"].numpy()


def masked_logits(folder: Path) -> Any:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    with torch.inference_mode():
        mask = torch.tensor([[0, *[1] * (len(IDS[0]) - 1)]])
        return model(torch.tensor(IDS), attention_mask=mask).logits.numpy()


def encoded(folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(
        list(TEXTS), normalize_embeddings=True
    )


def sparse_vectors(folder: Path, method: str) -> Any:
    encoder = sentence_transformers.SparseEncoder(str(folder), device="cpu")
    return getattr(encoder, method)(list(TEXTS), convert_to_sparse_tensor=False).numpy()


def scores(folder: Path) -> Any:
    encoder = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    return encoder.predict([list(pair) for pair in PAIRS], activation_fn=torch.nn.Identity())


def single_logits(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        return model(**tokenizer(list(TEXTS), return_tensors="pt", padding=True)).logits.numpy()


def mean(folder: Path) -> Any:
    states, mask = hidden(folder)
    return np.stack([row[kept == 1].mean(0) for row, kept in zip(states, mask, strict=True)])


def case(task: str, quantity: str, values: Callable[[Path], Any], **known: Any) -> Any:
    expected = {"source": "a test", "quantity": quantity, "texts": TEXTS, "select": "[...]", **known}
    return pytest.param(task, expected, values, id=f"{task} {quantity} {known.get('select', '')}")


CASES = [
    case("embed", "last_hidden_state", lambda path: hidden(path)[0][:, 1:4, 1:4], select="[:, 1:4, 1:4]"),
    case("embed", "mean_hidden_state", lambda path: mean(path)[0, :5], select="[0, :5]"),
    case("embed", "embedding", lambda path: encoded(path)[0, :5], select="[0, :5]", normalized=True),
    case("embed", "similarity", lambda path: [100 * (encoded(path) @ encoded(path).T)[0, 1]], scale=100.0),
    case(
        "fill-mask",
        "logits",
        lambda path: masked_logits(path)[:, 1:3, :4],
        select="[:, 1:3, :4]",
        token_ids=IDS,
        attention_mask=((0, 1, 1, 1, 1, 1, 1),),
        texts=(),
    ),
    case("classify", "logits", lambda path: scores(path), select="[:, 0]", pairs=PAIRS, texts=()),
    case("classify", "logits", lambda path: single_logits(path), select="[:, :]"),
    case("sparse", "sparse", lambda path: sparse_vectors(path, "encode_document")[0, [7, 30]], select="[0, 7 30]"),
    case("sparse", "sparse", lambda path: sparse_vectors(path, "encode_query")[1, :9], select="[1, :9]", is_query=True),
    case(
        "sparse",
        "sparse_similarity",
        lambda path: sparse_vectors(path, "encode_document") @ sparse_vectors(path, "encode_document")[0],
    ),
]


@pytest.mark.parametrize(("task", "expected", "values"), CASES)
def test_recorded_values_agree_and_a_wrong_one_is_found(checkpoints, models, task, expected, values):
    wanted = np.asarray(values(checkpoints[task]))
    right = Recorded(values=wanted.tolist(), **expected)
    outcome = compare_recorded(models[task], right)
    assert outcome.passed and outcome.count == wanted.size and outcome.largest < 2e-4, outcome.describe()
    assert np.allclose(outcome.found, wanted, atol=1e-4)

    wrong = wanted.astype(float).copy()
    wrong.flat[-1] += 1.2e-3 + 1e-4 * abs(wrong.flat[-1])  # the bound is 1e-3, and 1e-4 for the engine
    outcome = compare_recorded(models[task], dataclasses.replace(right, values=wrong.tolist()))
    assert not outcome.passed and outcome.largest > outcome.bound > 1e-3


def test_vectors_of_tokens_are_those_of_the_route():
    document, query = np.arange(12.0).reshape(4, 3), np.arange(6.0).reshape(2, 3)
    model = SimpleNamespace(encode_document=lambda texts: [document], encode_query=lambda texts: [query])
    values = ((0, 1), (3, 4))
    expected = Recorded(source="a test", quantity="multi_vector", values=values, texts=("a",), select="[:2, :2]")
    assert compare_recorded(model, expected).passed
    assert compare_recorded(model, dataclasses.replace(expected, select="[:, :2]", is_query=True)).passed
    assert "(4, 2)" in compare_recorded(model, dataclasses.replace(expected, select="[:, :2]")).error


def test_the_best_words_agree_with_the_pipeline(checkpoints, models):
    fill = transformers.pipeline("fill-mask", model=str(checkpoints["fill-mask"]), device="cpu")
    answers = fill(MASKED, top_k=20)  # those of rows that only fill the vocabulary up have no word
    words = tuple(answer["token_str"] for answer in answers if answer["token_str"])[:3]
    expected = Recorded(source="a test", quantity="words", values=words, texts=(MASKED,))
    assert compare_recorded(models["fill-mask"], expected).passed
    outcome = compare_recorded(models["fill-mask"], dataclasses.replace(expected, values=words[::-1]))
    assert not outcome.passed and outcome.found == list(words) and words[0] in PIECES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select": "[:, :2, :2]"}, r"gives the shape \(2, 2, 2\), and the source \(2,\)"),
        ({"select": "[0, 0, 500 501]"}, "IndexError"),
        ({"quantity": "words", "values": ("a",)}, "InputError"),
        ({"quantity": "sparse"}, "InputError"),
    ],
)
def test_what_cannot_be_compared_is_a_failed_comparison(models, changes, said):
    fields = {"quantity": "last_hidden_state", "values": (0.0, 0.0), "texts": TEXTS, **changes}
    outcome = compare_recorded(models["embed"], Recorded(source="a test", **fields))
    assert not outcome.passed and outcome.largest is None and outcome.error is not None
    assert re.search(said, outcome.error)


def test_no_number_agrees_with_nan(models):
    expected = Recorded(source="a test", quantity="embedding", values=(float("nan"),), texts=TEXTS, select="[0, :1]")
    assert not compare_recorded(models["embed"], expected).passed


def test_selections_are_those_of_numpy():
    array = np.arange(60).reshape(3, 4, 5)
    assert np.array_equal(array[selection("[:, 1:4, -1]")], array[:, 1:4, -1])
    assert np.array_equal(array[selection("[0, :3]")], array[0, :3])
    assert np.array_equal(array[selection("[1, 2, 0 4]")], array[1, 2, [0, 4]])
    assert np.array_equal(array[selection("[...]")], array)


def test_the_table_of_values_fits_the_table_of_checkpoints():
    """Every value belongs to a listed model, and the task of the model has the quantity."""
    quantities = {
        "fill-mask": {"last_hidden_state", "logits", "words"},
        "embed": {"last_hidden_state", "mean_hidden_state", "embedding", "similarity"},
        "classify": {"logits"},
        "sparse": {"sparse", "sparse_similarity"},
        "multi-vector": {"multi_vector"},
    }
    for model, values in RECORDED.items():
        for each in values:
            assert each.quantity in quantities[PUBLISHED[model].task], model
            inputs = (each.texts, each.pairs, each.token_ids)
            assert sum(map(bool, inputs)) == 1 and each.source and np.size(each.values), model
            assert len(selection(each.select)) <= 3, model
