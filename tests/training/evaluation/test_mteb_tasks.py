"""`gte-train mteb` without MTEB; tests/integrations/test_mteb_command.py runs it where MTEB is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from gte_deploy.core.errors import InputError, MissingDependencyError
from gte_deploy.core.exit_codes import OK, USAGE
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation.mteb_tasks import MtebRow, evaluate_on_mteb, table
from gte_deploy.training.mteb_options import MtebOptions


def test_without_mteb_the_extra_is_named(tiny_mlm: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["mteb", str(tiny_mlm), "--tasks", "NFCorpus"]) not in (OK, USAGE)
    said = capsys.readouterr().err
    assert "'mteb' is not installed" in said and "[mteb]" in said
    monkeypatch.setitem(sys.modules, "mteb", None)  # an import of it fails
    with pytest.raises(MissingDependencyError, match=r"'mteb' is not installed.*\[mteb\]"):
        evaluate_on_mteb([str(tiny_mlm)], ["NFCorpus"], options=MtebOptions())


def test_impossible_options_are_refused(capsys):
    assert main(["mteb", "a", "--tasks", "NFCorpus", "--batch-size", "0"]) == USAGE
    assert "--batch-size 0 is below 1" in capsys.readouterr().err
    with pytest.raises(InputError, match="4 tokens"):
        MtebOptions(max_length=3)


def test_the_table_has_a_column_for_each_model():
    metrics = {"NFCorpus": "ndcg_at_10", "STS": "cosine_spearman"}
    rows = [
        MtebRow("a-model", "embed", {"NFCorpus": 0.25, "STS": 0.75}, metrics, {}),
        MtebRow("its-bundle", "embed", {"NFCorpus": 0.2, "STS": 0.7}, metrics, {}),
    ]
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines == [
        ["task", "a-model", "its-bundle"],
        ["NFCorpus", "(ndcg_at_10)", "25.00", "20.00"],
        ["STS", "(cosine_spearman)", "75.00", "70.00"],
        ["mean", "50.00", "45.00"],
    ]
