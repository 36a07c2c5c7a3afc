"""What the page shows is what transformers and sentence-transformers answer on the checkpoints."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gte_deploy.models import builtin_path
from page_view import View, rows_of

MASKED = "The president of the united [MASK] of America."
TEXT = "The old river is in the city."
TEXTS = [TEXT, "the king is a good man", "a book to read"]

# The page shows four digits of a score, and a percentage with one or two decimals.
SCORE = 6e-5
PERCENTAGE = 6e-4


@pytest.fixture(scope="module")
def every_tool(site: Callable[..., str], served: dict[str, Any], builtin: Any) -> str:
    """The address of a server that answers every tool."""
    return site({"builtin": builtin, **served})


@pytest.fixture
def page(view: Callable[..., View], every_tool: str) -> View:
    return view(every_tool).open()


def test_every_tool_is_offered(page: View) -> None:
    tools = ["Fill mask", "Rank", "Similarity", "Matrix", "Sparse weights", "Entities", "Classify", "Tokens"]
    assert page.shown_tools() == tools


@pytest.mark.parametrize("text", [MASKED, "The [MASK] of the united [MASK] of America."])
def test_fill_mask(page: View, text: str) -> None:
    judge = transformers.pipeline("fill-mask", str(builtin_path()), dtype=torch.float32)
    expected: Any = judge(text, top_k=8)
    expected = expected if isinstance(expected[0], list) else [expected]
    panel = page.run("fill-mask", text=text, top="8")
    for found, wanted in zip(rows_of(panel), expected, strict=True):
        assert [name for name, _ in found] == [answer["token_str"] for answer in wanted]
        assert [score for _, score in found] == pytest.approx([answer["score"] for answer in wanted], abs=PERCENTAGE)
    best = [answers[0]["token_str"] for answers in expected]
    filled = "".join(part + word for part, word in zip(text.split("[MASK]"), [*best, ""], strict=True))
    assert panel.locator(".sentence").inner_text() == filled


def test_insert_mask_puts_it_where_the_cursor_is(page: View) -> None:
    panel = page.run("fill-mask", text="the of France")
    text = panel.get_by_label("Text with a mask")
    text.evaluate("area => area.setSelectionRange(4, 4)")
    panel.get_by_role("button", name="Insert [MASK]").click()
    page.page.keyboard.type(" ")
    assert text.input_value() == "the [MASK] of France"


@pytest.mark.parametrize("raw", [False, True])
def test_rank(page: View, task_checkpoints: dict[str, Path], raw: bool) -> None:
    from sentence_transformers import CrossEncoder

    judge = CrossEncoder(str(task_checkpoints["rank"]), device="cpu")
    activation = torch.nn.Identity() if raw else torch.nn.Sigmoid()
    expected = judge.rank("the river", TEXTS, activation_fn=activation)
    panel = page.run("rank", query="the river", passages="\n".join(TEXTS), raw=raw)
    (found,) = rows_of(panel)
    assert [name for name, _ in found] == [TEXTS[int(entry["corpus_id"])] for entry in expected]
    assert [score for _, score in found] == pytest.approx([float(entry["score"]) for entry in expected], abs=SCORE)


@pytest.fixture(scope="module")
def embedder(task_checkpoints: dict[str, Path]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(task_checkpoints["embed"]), device="cpu")


@pytest.mark.parametrize("prompt", ["", "query"])
def test_similarity(page: View, embedder: Any, prompt: str) -> None:
    vectors = embedder.encode(TEXTS[:2], prompt_name=prompt or None)
    page.run("similarity", model="embed")
    panel = page.run("similarity", first=TEXTS[0], second=TEXTS[1], prompt=prompt)
    found = float(panel.locator("output").inner_text())
    assert found == pytest.approx(float(embedder.similarity(vectors[:1], vectors[1:])), abs=SCORE)


def test_matrix(page: View, embedder: Any) -> None:
    expected = embedder.similarity(vectors := embedder.encode(TEXTS), vectors).numpy()
    page.run("matrix", model="embed")
    panel = page.run("matrix", texts="\n".join(TEXTS))
    cells = panel.locator("table.heat tbody td").all_inner_texts()
    np.testing.assert_allclose(np.array(cells, float).reshape(3, 3), expected, rtol=0, atol=6e-3)
    assert panel.locator("table.heat tbody th .text").all_inner_texts() == TEXTS


@pytest.mark.parametrize(("texts", "message"), [(["one"], "two texts or more"), (["text"] * 13, "13 texts")])
def test_a_matrix_of_too_few_or_too_many_texts_is_not_asked_for(page: View, texts: list[str], message: str) -> None:
    page.choose("matrix")
    before = [request.url for request in page.requests if request.method == "POST"]
    assert message in page.run("matrix", texts="\n".join(texts)).get_by_role("alert").inner_text()
    assert [request.url for request in page.requests if request.method == "POST"] == before


def test_sparse(page: View, task_checkpoints: dict[str, Path]) -> None:
    folder = task_checkpoints["mask"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    weights, ids = torch.log1p(torch.relu(logits)).amax(0).topk(6)
    (found,) = rows_of(page.run("sparse", text=TEXT, top="6"))
    names = [tokenizer.decode([number]).strip() or f"id {number}" for number in ids.tolist()]
    assert [name for name, _ in found] == names
    assert [weight for _, weight in found] == pytest.approx(weights.tolist(), abs=SCORE)


@pytest.mark.parametrize("strategy", ["simple", "none"])
def test_entities(page: View, task_checkpoints: dict[str, Path], strategy: str) -> None:
    judge: Any = transformers.pipeline(
        "token-classification", str(task_checkpoints["tags"]), aggregation_strategy=strategy, dtype=torch.float32
    )
    text = "A 😀 is in the old city"
    expected = judge(text)
    assert expected
    panel = page.run("entities", text=text, strategy=strategy)
    (found,) = rows_of(panel)
    label = "entity" if strategy == "none" else "entity_group"
    # transformers counts characters, as the page does; 😀 is one of them, and two units of JavaScript's strings.
    assert [name for name, _ in found] == [f"{text[each['start'] : each['end']]} ({each[label]})" for each in expected]
    assert [score for _, score in found] == pytest.approx([each["score"] for each in expected], abs=PERCENTAGE)


def test_classify(page: View, task_checkpoints: dict[str, Path]) -> None:
    folder = task_checkpoints["labels"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        scores = model(**tokenizer(TEXT, return_tensors="pt")).logits[0].softmax(-1).tolist()
    expected = sorted(
        ((model.config.id2label[number], score) for number, score in enumerate(scores)), key=lambda x: -x[1]
    )
    (found,) = rows_of(page.run("classify", text=TEXT))
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=SCORE)


def test_tokens(page: View, task_checkpoints: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin_path())
    text = "Antidisestablishmentarianism, naïve 中国 😀"
    expected = tokenizer(text)["input_ids"]
    panel = page.run("tokens", text=text, special=True)
    assert [int(found.split()[-1]) for found in panel.locator(".chips .id").all_text_contents()] == expected
    assert panel.locator(".summary").inner_text() == f"{len(expected)} tokens of 64 that the model takes"
    bare = page.run("tokens", text=text, special=False)
    assert bare.locator(".chips li").count() == len(expected) - 2


def test_tokens_are_shown_while_one_types(page: View) -> None:
    panel = page.run("tokens", text="one")
    panel.get_by_label("Text").press_sequentially(" two three")
    panel.get_by_text("5 tokens of 64").wait_for()


def test_the_curl_command_asks_for_the_same(page: View) -> None:
    panel = page.run("fill-mask", text='It\'s the "old" [MASK] \\ of $HOME `id`\n!')
    panel.get_by_text("Request and answer").click()
    command = panel.locator(".curl").inner_text()
    answer = subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(answer.stdout) == json.loads(panel.locator(".json").inner_text())
    assert len(json.loads(answer.stdout)) == 8


def test_time_and_tokens(page: View) -> None:
    panel = page.run("fill-mask", text=MASKED)
    figures = dict(text.split("\n") for text in panel.locator(".figures > div").all_inner_texts())
    assert figures.keys() >= {"Round trip", "In the server"}
    assert float(figures["Round trip"].split()[0]) >= float(figures["In the server"].split()[0]) > 0
