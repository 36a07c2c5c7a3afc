"""Needles in long documents: where they lie, how long the documents are, and what a model finds, by others' counts."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import AutoTokenizer

from factories import SPELLING, make_checkpoint
from gte_deploy.core.errors import InputError
from gte_deploy.core.exit_codes import OK, USAGE
from gte_deploy.models import builtin_path
from gte_deploy.training.cli import main
from gte_deploy.training.data.vocabulary import read_tokenizer
from gte_deploy.training.evaluation.haystacks import Filler, Needle, generate_needles, read_filler
from gte_deploy.training.evaluation.needles import (
    find_needles,
    hide_needles,
    plot_needles,
    published_needles,
    table,
    wilson_interval,
)
from gte_deploy.training.finetune.opening import open_trained
from gte_deploy.training.needle_options import NeedleOptions
from gte_deploy.training.options import ReadOptions
from retrieval_layouts import LENGTHS, write_long_embed

SMALL = NeedleOptions(lengths=(320, 160), queries=6, documents=9, batch_tokens=640, device="cpu")
TOKENIZER = read_tokenizer(builtin_path() / "tokenizer.json")
TEXTS = tuple(
    " ".join(f"the old river {chr(97 + i % 26)}{chr(97 + j % 26)} is in the city." for j in range(30)) for i in range(9)
)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    return make_checkpoint(folder, task="embed", layout="native", vocab=SPELLING, pooling="mean", normalize=True)


@pytest.fixture(scope="module")
def haystacks(embedder: Path) -> Any:
    return hide_needles(TEXTS, embedder / "tokenizer.json", options=SMALL)


# --- the documents ----------------------------------------------------------------------------------------------------


def test_documents_have_their_length_and_one_needle(haystacks, embedder: Path):
    """The tokens are counted by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(embedder)
    assert list(haystacks) == [("passkey", 160), ("passkey", 320), ("needle", 160), ("needle", 320)]
    for (test, length), each in haystacks.items():
        needles = [needle.text for needle in generate_needles(test, 9, seed=0)]
        assert list(each.data.queries.values()) == [n.question for n in generate_needles(test, 9, seed=0)][:6]
        for i, (document, needle) in enumerate(zip(each.data.corpus.values(), needles, strict=True)):
            assert 0.94 * length < len(tokenizer(document)["input_ids"]) <= length
            assert [other in document for other in needles] == [at == i for at in range(9)]
            around = document.split(needle)
            assert all(
                part.strip() == "" or "".join(part.split()) in "".join("".join(TEXTS).split()) for part in around
            )


def test_needles_lie_at_their_depths(haystacks):
    for (test, length), each in haystacks.items():
        needles = generate_needles(test, 9, seed=0)
        assert sorted(each.depths.values()) == pytest.approx([(i + 0.5) / 6 for i in range(6)])
        for i in range(6):
            before, after = each.data.corpus[f"d{i}"].split(needles[i].text)
            # A sentence of the text has at most 20 tokens, of the 160 or 320 of the document.
            assert len(before) / (len(before) + len(after)) == pytest.approx(
                each.depths[f"q{i}"], abs=40 / (length - 60)
            )
            assert not before.strip() or before.rstrip().endswith(".") or before.endswith(" ")


def test_the_seed_decides(embedder: Path):
    other = NeedleOptions(**{**vars(SMALL), "seed": 1, "lengths": (160,), "tests": ("needle",)})
    same, again, changed = (
        hide_needles(TEXTS, embedder / "tokenizer.json", options=each)["needle", 160] for each in (SMALL, SMALL, other)
    )
    assert same == again and same.data.corpus != changed.data.corpus


def test_questions_are_about_different_names():
    for test, most in (("passkey", 400), ("needle", 360)):
        needles = generate_needles(test, most, seed=3)
        assert len({needle.question for needle in needles}) == most
        for needle in needles:
            name = re.search(r"[A-Z]\w+ [A-Z]\w+", needle.question.partition(" ")[2])
            assert name is not None and name[0] in needle.text
        with pytest.raises(InputError, match=f"more than the {most} names"):
            generate_needles(test, most + 1, seed=0)


def test_texts_without_spaces_take_a_needle(tmp_path: Path):
    """A character of Chinese is a token; the needle goes between sentences."""
    folder = make_checkpoint(tmp_path, vocab=(*SPELLING, *"河城旧水。"))
    filler = Filler(["旧河在城。水在旧城。" * 40], read_tokenizer(folder / "tokenizer.json"), most=1000)
    document = filler.document("the river", length=64, start=3, depth=0.5)
    before, after = document.split("the river")
    assert before.rstrip().endswith("。") and len(before) == pytest.approx(len(after), abs=12)


def test_words_that_are_cut_make_no_document_longer():
    """The rest of a word may have more tokens than it had in the word; the document is cut until it fits."""
    filler = Filler(["uncharacteristically antidisestablishmentarianism " * 30], TOKENIZER, most=10_000)
    lengths = [
        len(TOKENIZER.encode(filler.document("a key", length=48, start=start, depth=depth)).ids)
        for start in range(60)
        for depth in (0.0, 0.3, 1.0)
    ]
    assert max(lengths) == 48 and min(lengths) > 40


def test_too_little_is_refused(embedder: Path):
    file = embedder / "tokenizer.json"
    with pytest.raises(InputError, match="have 9 tokens, and a document needs 160"):
        hide_needles(["the old river"] * 3, file, options=SMALL)
    with pytest.raises(InputError, match="no token"):
        hide_needles([], file, options=SMALL)
    with pytest.raises(InputError, match="1 needles for 9 documents"):
        hide_needles(TEXTS, file, options=SMALL, needles=[Needle("a", "b")])
    with pytest.raises(InputError, match="is longer than 160 tokens"):
        hide_needles(TEXTS, file, options=SMALL, needles=[Needle("a " * 200, "b")] * 9)
    wrongs: list[dict[str, Any]] = [{"lengths": (8,)}, {"queries": 200}, {"tests": ()}, {"max_length": 1}]
    wrongs.append({"documents": 1, "queries": 1})
    for wrong in wrongs:
        with pytest.raises(InputError, match="expected|below 4"):
            NeedleOptions(**wrong)


# --- the scores -------------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_sentence_transformers(haystacks, embedder: Path):
    _, row = find_needles([str(embedder)], haystacks, options=SMALL)
    _, model = open_trained(str(embedder), device="cpu")
    for score, each in zip(row.scores, haystacks.values(), strict=True):
        data = each.data
        relevant = {query: set(found) for query, found in data.qrels.items()}
        evaluator = InformationRetrievalEvaluator(data.queries, data.corpus, relevant, accuracy_at_k=[1], batch_size=4)
        assert score.accuracy == pytest.approx(evaluator(model)["cosine_accuracy@1"])
        assert score.queries == 6 and score.documents == 9 and not score.is_cut


@pytest.mark.parametrize(("successes", "trials"), [(0, 50), (1, 50), (25, 50), (49, 50), (50, 50), (3, 7)])
def test_intervals_are_those_of_scipy(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


class FirstWords:
    """A bag of the first words of a text, as a model that cuts texts sees them."""

    def __init__(self, words: int) -> None:
        self.max_seq_length = words

    def encode_document(self, texts: list[str], **_: Any) -> torch.Tensor:
        bags = torch.zeros(len(texts), 4096)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text)[: self.max_seq_length]:
                if word[0].isupper() and word != "What":  # names and places
                    bags[row, sum(map(ord, word)) * 31 % 4096] = 1
        return bags

    encode_query = encode_document

    def similarity(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return queries @ documents.T


def test_a_model_that_cuts_finds_only_what_lies_first(embedder: Path):
    options = NeedleOptions(tests=("passkey",), lengths=(160, 640), queries=30, documents=30, device="cpu")
    made = hide_needles(TEXTS, embedder / "tokenizer.json", options=options)

    @contextlib.contextmanager
    def opened(name: str, options: Any) -> Iterator[tuple[Any, Any]]:
        yield "embed", FirstWords(int(name))

    _, all_words, few = find_needles(["640", "190"], made, options=options, open_model=opened)
    assert [score.accuracy for score in all_words.scores] == [1.0, 1.0]
    assert [score.is_cut for score in few.scores] == [False, True] and few.scores[0].accuracy == 1.0
    long = few.scores[1]
    assert long.by_depth["first third"] == 1.0 and long.by_depth["last third"] <= 0.2  # by chance
    assert long.accuracy == pytest.approx(np.mean(list(long.by_depth.values()))) and few.mean("passkey") < 1
    text = table([all_words, few])
    assert "* the model cuts documents" in text and "*" in text.splitlines()[3] and "*" not in text.splitlines()[2]


class Letters:
    """A reranker that knows the answer from the last letter of a question."""

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> list[float]:
        return [float(f"cat {question[-2] * 3} " in text) for question, text in pairs]


def test_a_reranker_orders_all_documents(embedder: Path):
    """Also those that share no word with the question, which BM25 does not return."""
    needles = [Needle(f"the cat {chr(97 + i) * 3} sleeps", f"who {chr(97 + i)}?") for i in range(9)]
    made = hide_needles(TEXTS, embedder / "tokenizer.json", options=SMALL, needles=needles)
    assert list(made) == [("needle", 160), ("needle", 320)]

    @contextlib.contextmanager
    def opened(name: str, options: Any) -> Iterator[tuple[Any, Any]]:
        yield "rerank", Letters()

    bm25, row = find_needles(["letters"], made, options=SMALL, open_model=opened)
    assert bm25.mean("needle") < 0.5 and row.mean("needle") == 1.0


def test_published_tests_are_taken_by_length(tmp_path: Path):
    options = NeedleOptions(tests=("passkey",), lengths=LENGTHS)
    made = published_needles(str(write_long_embed(tmp_path)), options=options)
    (row,) = find_needles([], made, options=options)
    assert [(s.length, s.queries, s.documents, s.by_depth) for s in row.scores] == [(n, 2, 4, {}) for n in LENGTHS]
    assert row.mean("passkey") == 1.0  # BM25 finds the name
    with pytest.raises(InputError, match="no documents of 1024 tokens, but of 256, 512"):
        published_needles(str(tmp_path), options=NeedleOptions(tests=("passkey",), lengths=(1024,)))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(embedder: Path, tmp_path: Path, capsys):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    needles = [{"needle": f"the cat {chr(97 + i)} sleeps", "question": f"which cat {chr(97 + i)}?"} for i in range(4)]
    (tmp_path / "needles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in needles))
    command = ["needles", str(embedder), "--data", str(tmp_path / "texts.txt"), "-o", str(tmp_path / "out")]
    command += ["--lengths", "96", "--documents", "4", "--queries", "2", "--device", "cpu"]
    command += ["--needles", str(tmp_path / "needles.jsonl")]
    assert main([*command, "--json"]) == OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "needles.json").read_text())
    assert [row["kind"] for row in printed] == ["bm25", "embed"] and printed[0]["mean"] == {"needle": 1.0}
    assert (tmp_path / "out" / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == OK
    assert "needle: accuracy in percent" in capsys.readouterr().out


def test_the_command_refuses_by_name(tmp_path: Path, capsys):
    for arguments, message in (
        ([], "give either --data INPUT"),
        (["--data", "a", "--longembed", "b"], "give either --data INPUT"),
        (["--longembed", "b", "--needles", "c"], "LongEmbed has needles of its own"),
        (["--longembed", str(tmp_path)], r"corpus.jsonl cannot be read"),
        (["--data", str(tmp_path / "nothing.txt")], "names no file"),
    ):
        assert main(["needles", *arguments]) == USAGE
        assert message in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("a text")
    (tmp_path / "needles.jsonl").write_text('{"needle": "a"}\n')
    command = ["needles", "--data", str(tmp_path / "texts.txt"), "--needles", str(tmp_path / "needles.jsonl")]
    assert main(command) == USAGE
    assert "needles.jsonl, object 1: expected the texts needle and question" in capsys.readouterr().err


def test_texts_are_read_as_prepare_reads_them(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert list(read_filler([str(tmp_path)], ReadOptions(text_column="body"))) == ["one", "two"]


def test_plots_have_a_panel_for_each_test(haystacks, tmp_path: Path):
    plot_needles(find_needles([], haystacks, options=SMALL), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<svg" in text
