"""docs/checkpoints-verified.md, and the command without a hub."""

import json

import pytest

from gte_deploy.exporters.cli import main
from gte_deploy.exporters.published.page import NOT_RUN, checkpoints_page
from gte_deploy.exporters.published.recorded import RECORDED
from gte_deploy.exporters.published.results import PublishedResult, write_result
from gte_deploy.models.published import PUBLISHED

MODEL = "BAAI/bge-small-en-v1.5"


def row(text: str, model: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| [{model}](")]
    return found


def test_a_row_says_that_nobody_ran_it_until_there_is_a_result(tmp_path):
    text = checkpoints_page(tmp_path)
    assert all(row(text, model).endswith(f" {NOT_RUN} |") for model in PUBLISHED)
    numbers = {"source": "S", "quantity": "embedding", "largest": 1e-5, "bound": 1e-3, "found": [], "error": None}
    result = PublishedResult(
        model=MODEL,
        revision=None,
        commit="c0ffee1" + "0" * 33,
        target="cpu",
        precision="fp32",
        verdict="differs",
        date="2026-01-02T03:04:05+00:00",
        versions={"gte-deploy": "9.9"},
        machine={},
        expected=({**numbers, "passed": True, "count": 5}, {**numbers, "passed": False, "count": 2}),
    )
    write_result(tmp_path, result)
    text = checkpoints_page(tmp_path)
    said = "**differs** (cpu, fp32): `c0ffee1`, 5 of 7 recorded numbers, gte-deploy 9.9, 2026-01-02 |"
    assert row(text, MODEL).endswith(said)
    assert text.count(NOT_RUN) == len(PUBLISHED) - 1


def test_every_recorded_value_and_every_source_is_on_the_page(tmp_path):
    text = checkpoints_page(tmp_path)
    for model, values in RECORDED.items():
        for each in values:
            name = model if each.recorded_for is None else f"{model}, as {each.recorded_for}"
            assert f"| {name} | {each.quantity} | " in text and each.source in text
    for entry in PUBLISHED.values():
        assert all(f"| {entry.id} | {source} | {said} |" in text for source, said in entry.sources.items())


def test_values_of_a_conversion_are_not_shown_as_the_models_own(tmp_path):
    text = checkpoints_page(tmp_path)
    assert " | 18 of its conversion | " in row(text, "Alibaba-NLP/gte-base-en-v1.5")
    assert " | 3 and 18 of its conversion | " in row(text, "Alibaba-NLP/gte-multilingual-base")
    assert " | 18 | " in row(text, "alibaba-nlp-community/gte-base-en-v1.5")
    for model in (name for name in RECORDED if name.startswith("Alibaba-NLP/")):
        of_tests = [each for each in RECORDED[model] if "test_modeling_gte.py" in each.source]
        # These tests name the repositories of alibaba-nlp-community, and none of Alibaba-NLP.
        assert all(each.recorded_for == f"alibaba-nlp-community/{model.partition('/')[2]}" for each in of_tests)


def test_the_list_needs_no_hub(capsys):
    assert main(["verify-published", "--list", "--family", "nomic_bert"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(entry.family == "nomic_bert" for entry in PUBLISHED.values())
    assert lines[2].split()[:4] == ["nomic-ai/nomic-embed-text-v1.5", "nomic_bert", "embed", "b0753ae7"]
    assert lines[2].endswith("2 comparisons")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["unknown/model"], "'unknown/model' is none of the published checkpoints"),
        ([MODEL, "bge-small-en-v1.5"], f"{MODEL} is given more than once"),
        ([MODEL, "--family", "bert"], "give models or --family, not both"),
        ([MODEL, "--precision", "fp64"], "fp64"),
    ],
)
def test_wrong_words_are_refused_before_the_hub_is_asked(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["verify-published", *words, "--json"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and said in json.loads(printed.out)["error"]["message"]
    assert not list(tmp_path.iterdir())
