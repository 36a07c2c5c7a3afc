"""gte-deploy compare: two bundles side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from factories import add_multi_vector_modules
from gte_deploy import cli
from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core import exit_codes
from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tuning.agreement import (
    Agreement,
    Ground,
    agreement,
    answers_of,
    common_ground,
    rank_correlation,
)
from gte_deploy.tuning.compare import (
    TITLES,
    ComparisonResult,
    Side,
    compare_bundles,
    format_comparison,
    measure_rows,
)
from gte_deploy.tuning.compare_page import render_comparison
from runtime_models import make_word_checkpoint

TEXTS = ["w1 w2 w3", "w4 w5", "w1 w2 w9 w10", "w20 w21 w22 w23"]


def manifest(task: str, *, weights: str = "a", **facts) -> Manifest:
    spec = ModelSpec(task=task, max_length=8, vocab_size=9, hidden_size=4, pad_token_id=0, **facts)
    return Manifest(spec, "fp32", {}, {}, {}, {"name": "model", "sha256": weights})


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed):
    from scipy import stats

    a, b = np.random.default_rng(seed).integers(0, 6, (2, 30)).astype(float)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, a) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(np.ones(3), np.ones(3)) == 1 and rank_correlation(np.ones(3), np.arange(3.0)) == 0


def test_embeddings_by_hand():
    a = np.array([[1.0, 0], [0, 1], [1, 1]])
    b = np.array([[1.0, 0], [0, 2], [2, 1]])
    found = agreement(Ground("embed", True), a, b)
    least = 3 / np.sqrt(10)
    assert found.texts == pytest.approx([1, 1, least]) and found.measures["cosine_min"] == pytest.approx(least)
    assert found.measures["cosine_mean"] == pytest.approx((2 + least) / 3)
    # Similarities of the pairs (0,1), (0,2), (1,2): 0, .71, .71 on one side, and 0, .89, .45 on the other.
    assert found.measures["rank_correlation"] == pytest.approx(0.8660254)
    other = agreement(Ground("embed", False), a, np.hstack([b, b]))
    assert "cosine_mean" not in other.measures and other.measures["rank_correlation"] == pytest.approx(0.8660254)


def word(token: int, score: float) -> dict[str, object]:
    return {"token": token, "token_str": f"w{token}", "score": score}


def test_masks_by_hand():
    a = [[[word(1, 0.9), word(2, 0.1)]], [[word(3, 0.9), word(4, 0.1)]]]
    b = [[[word(1, 0.8), word(5, 0.1)]], [[word(4, 0.6), word(3, 0.4)]]]
    found = agreement(Ground("fill-mask", True), a, b)
    assert found.measures == {"same_best_word": 0.5, "top5_overlap": 0.75}
    assert found.texts == [0.5, 0.0] and found.answers[1] == ("w3 0.90, w4 0.10", "w4 0.60, w3 0.40")


def test_sparse_by_hand():
    a, b = [{"x": 3.0, "y": 4.0}, {}, {"x": 1.0}], [{"x": 4.0, "z": 3.0}, {}, {}]
    found = agreement(Ground("sparse", True), a, b)
    assert found.texts == pytest.approx([12 / 25, 1, 0])
    assert found.measures["top10_overlap"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_scores_of_a_reranker_are_ranked_for_each_query():
    pairs = [("q", "a"), ("q", "b"), ("q", "c"), ("r", "a"), ("r", "b")]
    a = np.array([[0.9], [0.5], [0.1], [0.2], [0.8]]), pairs
    b = np.array([[0.8], [0.1], [0.5], [0.9], [0.1]]), pairs
    found = agreement(Ground("classify", True), a, b).measures
    assert found["same_best_document"] == 0.5 and found["rank_correlation"] == pytest.approx((0.5 - 1) / 2)
    assert found["score_difference_max"] == pytest.approx(0.7)


def test_labels_of_tokens():
    def tokens(*labels):
        return [{"word": f"w{number}", "entity": label} for number, label in enumerate(labels)]

    found = agreement(
        Ground("token-classify", True), [tokens("O", "PER"), tokens("O")], [tokens("O", "LOC"), tokens("O")]
    )
    assert found.measures == {"same_label": pytest.approx(2 / 3)} and found.answers[0] == ("w1 PER", "w1 LOC")


def test_token_vectors():
    a = [np.eye(3), np.eye(3)[:2], np.eye(3)[1:]]
    found = agreement(Ground("multi-vector", True), a, [np.eye(3), np.eye(3)[:2], np.eye(3)[:2]])
    assert found.texts == pytest.approx([1, 1, 0])


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [(("embed", "hybrid"), "embed"), (("hybrid", "sparse"), "sparse"), (("hybrid", "hybrid"), "hybrid")],
)
def test_a_hybrid_bundle_is_compared_by_the_half_that_the_other_has(tasks, expected):
    ground = common_ground(*map(manifest, tasks), same_tokenizer=True)
    assert ground.task == expected and len(ground.notes) == (tasks[0] != tasks[1])


@pytest.mark.parametrize(
    ("a", "b", "same_tokenizer", "message"),
    [
        (manifest("embed"), manifest("fill-mask"), True, "A is for embed and B for fill-mask"),
        (manifest("fill-mask"), manifest("fill-mask"), False, "different tokenizers"),
        (
            manifest("classify", id2label={0: "yes"}),
            manifest("classify", id2label={0: "no"}),
            True,
            "labels.*: yes and no",
        ),
    ],
)
def test_bundles_without_common_ground_are_refused_by_name(a, b, same_tokenizer, message):
    with pytest.raises(InputError, match=message):
        common_ground(a, b, same_tokenizer=same_tokenizer)


def test_vectors_of_different_weights_are_compared_by_order_alone():
    ground = common_ground(manifest("embed"), manifest("embed", weights="b"), same_tokenizer=False)
    assert not ground.same_model and "different weights" in ground.notes[0]


def side(seconds: list[float]) -> Side:
    return Side(Path("bundle"), manifest("embed"), 10**6, "onnx fp32", seconds, 0)


def result_of(a: list[float], b: list[float]) -> ComparisonResult:
    found = Agreement({"cosine_mean": 0.5}, [0.2, 1.0, 0.9], [("a <b>", "c"), ("d", "d"), ("e", "f")])
    texts = ["one", "two", "three"]
    return ComparisonResult(side(a), side(b), Ground("embed", True), texts, found, ("A note.",), 1, "2026-01-01")


def test_only_a_clear_difference_in_speed_is_told():
    assert result_of([1.0, 1.1, 1.2], [0.5, 0.55, 0.6]).speed() == "B is 2.00 times as fast as A."
    assert result_of([1.0, 1.0, 1.0], [3.0, 3.0, 3.0]).speed() == "A is 3.00 times as fast as B."
    assert result_of([1.0, 2.0, 3.0], [0.9, 1.5, 2.9]).speed().startswith("No clear difference")


def test_people_see_the_answers_that_differ_most_first():
    result = result_of([1.0], [1.0])
    lines = format_comparison(result).splitlines()
    assert [line.strip() for line in lines[lines.index("Answers that differ most:") + 1 :]] == [
        *("1. one", "A: a <b>", "B: c", "3. three", "A: e", "B: f", "A note.")
    ]
    page = render_comparison(result)
    assert page.index("<h2>Agreement") < page.index("<h2>Speed and size") < page.index("<h2>Every text")
    assert "a &lt;b&gt;" in page and "<b>" not in page
    assert page.index(">one<") < page.index(">three<") < page.index(">two<")
    for outside in ("<script", "<link", "<img", "src=", "@import", "url("):
        assert outside not in page


def test_every_measure_has_a_name():
    measures = {name: 0.5 for name in TITLES} | {"dense_cosine_min": 0.5, "sparse_top10_overlap": 0.5}
    found = dataclasses.replace(result_of([1.0], [1.0]), found=Agreement(measures, [], []))
    named = dict(measure_rows(found))
    assert named["dense: smallest cosine"] == "0.500000" and named["sparse: ten heaviest tokens in common"] == "50.0%"
    assert len(named) == len(measures)


def test_the_page_fits_a_phone(chromium, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(render_comparison(result_of([1.0], [1.0])), encoding="utf-8")
    page = chromium.new_context(viewport={"width": 390, "height": 844}).new_page()
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_bundle_agrees_with_itself(bundle_of, word_checkpoints, tmp_path, capsys):
    bundle = str(bundle_of(word_checkpoints["embed"]))
    file, page = tmp_path / "texts.txt", tmp_path / "page.html"
    file.write_text("\n".join([*TEXTS, "", ""]))
    arguments = ["compare", bundle, bundle, "-i", str(file), "--repeats", "3", "--threads", "1", "--html", str(page)]
    assert cli.main([*arguments, "--json"]) == exit_codes.OK
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "embed" and found["same_model"] and len(found["a"]["seconds"]) == 3
    assert [entry["text"] for entry in found["texts"]] == TEXTS
    assert found["agreement"]["cosine_min"] == pytest.approx(1, abs=1e-6)
    assert found["agreement"]["rank_correlation"] == pytest.approx(1, abs=1e-6)
    size = sum(path.stat().st_size for path in Path(bundle).rglob("*") if path.is_file())
    assert found["a"]["bytes"] == found["b"]["bytes"] == size
    assert TEXTS[2] in page.read_text()


def test_what_cannot_be_compared_is_told_at_once(bundle_of, word_checkpoints, tmp_path, capsys):
    bundle = bundle_of(word_checkpoints["embed"])
    assert cli.main(["compare", str(bundle), str(word_checkpoints["embed"])]) == exit_codes.FAILURE
    assert "is not a bundle" in capsys.readouterr().err
    assert (
        cli.main(["compare", str(bundle), str(bundle), "--html", str(tmp_path / "no" / "x.html")]) == exit_codes.USAGE
    )
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(InputError, match="no texts"):
        compare_bundles(bundle, bundle, [])


def test_a_bundle_that_does_not_run_here_is_named(bundle_of, word_checkpoints, monkeypatch):
    bundle = bundle_of(word_checkpoints["embed"])
    monkeypatch.setattr("gte_deploy.tuning.compare.Contestant", "not callable")
    with pytest.raises(BackendError, match=f"A, {bundle}, does not run here"):
        compare_bundles(bundle, bundle, TEXTS)


PAIRS = [("w1 w2", text) for text in TEXTS]
SUBJECTS = [
    ("fill-mask", "fill-mask", ["w1 [MASK] w3"]),
    ("fill-mask", "fill-mask", ["w1 [MASK] w3", "[MASK] [MASK] w1"]),
    ("fill-mask", "sparse", TEXTS),
    ("classify", "classify", PAIRS),
    ("token-classify", "token-classify", TEXTS),
    ("token-classify", "hybrid", TEXTS),
    ("embed", "multi-vector", TEXTS),
]


@pytest.mark.parametrize(("made_for", "task", "texts"), SUBJECTS)
def test_the_answers_of_every_task_agree_with_themselves(made_for, task, texts, tmp_path):
    import gte_deploy

    source = make_word_checkpoint(tmp_path / "source", task=made_for, pooling="cls", num_labels=1)
    if task == "multi-vector":
        add_multi_vector_modules(source, library="sentence-transformers")
    with gte_deploy.load(source, backend="torch", task=task) as model:
        answers = [answers_of(model, task, texts) for _ in range(2)]
    found = agreement(Ground(task, True), *answers)
    assert found.texts == pytest.approx([1] * len(texts)) and all(a == b for a, b in found.answers)
    for name, value in found.measures.items():
        assert value == pytest.approx(0 if "difference" in name else 1), name
