"""`gte-train mteb`: the scores of checkpoints and bundles are those that MTEB gives sentence-transformers' own model.

MTEB's data sets lie on the hub, so its mock tasks have texts of ours, as in test_mteb.py.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mteb", reason="needs mteb: make test-consumers")

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.mocks.mock_tasks import MockRerankingTask, MockRetrievalTask, MockSTSTask

from gte_deploy.core.errors import InputError
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation.mteb_tasks import evaluate_on_mteb, table
from gte_deploy.training.mteb_options import MtebOptions

QUERIES = ("the capital of france", "old man", "water and light", "the queen of the world")


def task_of(kind, texts):
    """MTEB's own task of a kind, with our texts: a query is answered by the document of its number."""

    class Task(kind):
        def load_data(self, num_proc=None, **kwargs):
            documents = [{"id": f"d{i}", "text": text, "title": ""} for i, text in enumerate(texts)]
            relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(QUERIES))}
            ranked = {query: [each["id"] for each in documents] for query in relevant}
            data = RetrievalSplitData(
                queries=Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)]),
                corpus=Dataset.from_list(documents),
                relevant_docs=relevant,
                top_ranked=None if kind is MockRetrievalTask else ranked,
            )
            self.dataset = {"default": dict.fromkeys(self.metadata.eval_splits, data)}
            if kind is MockSTSTask:
                columns = {"sentence1": texts[:-1], "sentence2": texts[1:], "score": [0.9, 0.1, 0.2, 0.8, 0.6, 0.3]}
                self.dataset = {"test": Dataset.from_dict(columns)}
            self.data_loaded = True

    return Task()


@pytest.fixture
def with_tasks(texts, monkeypatch):
    """MTEB knows the mock tasks by their names."""
    tasks = {kind.metadata.name: kind for kind in (MockRetrievalTask, MockRerankingTask, MockSTSTask)}
    real = mteb.get_tasks

    def get_tasks(tasks_=None, *, tasks=None, languages=None):
        (name,) = tasks
        return [task_of(known[name], texts)] if name in known else real(tasks=tasks, languages=languages)

    known = tasks
    monkeypatch.setattr(mteb, "get_tasks", get_tasks)
    return tasks


def score(model, kind, texts):
    result = mteb.evaluate(model, task_of(kind, texts), cache=None, overwrite_strategy="always", raise_error=True)
    return result.task_results[0].get_score()


def test_a_checkpoint_scores_as_the_librarys(embedder, texts, with_tasks):
    names = [MockRetrievalTask.metadata.name, MockSTSTask.metadata.name]
    (row,) = evaluate_on_mteb([str(embedder.path)], names, options=MtebOptions(device="cpu"))
    assert row.kind == "embed" and list(row.scores) == names
    for name, kind in zip(names, (MockRetrievalTask, MockSTSTask), strict=True):
        assert row.scores[name] == pytest.approx(score(embedder.theirs, kind, texts), abs=1e-4)
    assert any(0 < value < 1 for value in row.scores.values())
    assert row.mean == pytest.approx(sum(row.scores.values()) / 2)
    assert row.results[names[0]]["mteb_version"] == mteb.__version__
    text = table([row])
    assert f"{100 * row.mean:.2f}" in text and f"{names[0]} ({MockRetrievalTask.metadata.main_score})" in text


def test_a_reranker_scores_as_the_librarys(reranker, texts, with_tasks):
    name = MockRerankingTask.metadata.name
    (row,) = evaluate_on_mteb([str(reranker.path)], [name], options=MtebOptions(device="cpu"))
    assert row.kind == "rerank"
    assert row.scores[name] == pytest.approx(score(reranker.theirs, MockRerankingTask, texts), abs=1e-4)


def test_the_command_writes_mtebs_results(embedder, with_tasks, tmp_path, capsys):
    name = MockRetrievalTask.metadata.name
    command = ["mteb", str(embedder.path), "--tasks", name, "-o", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "mteb.json").read_text())
    assert printed[0]["results"][name]["task_name"] == name
    assert main(command) == 0
    assert str(embedder.path) in capsys.readouterr().out


def test_a_bundle_stands_beside_its_checkpoint(embedder, texts, with_tasks, tmp_path, capsys):
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"needs {module}, with which a bundle is made and run")
    from gte_deploy.exporters.export import export

    bundle, name = export(embedder.path, tmp_path / "bundle", max_length=32).path, MockRetrievalTask.metadata.name
    command = ["mteb", str(embedder.path), str(bundle), "--tasks", name, "--max-len", "32", "--device", "cpu", "--json"]
    assert main(command) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert second["model"] == str(bundle) and first["kind"] == second["kind"] == "embed"
    assert second["scores"][name] == pytest.approx(first["scores"][name], abs=1e-4)


def test_unknown_tasks_are_refused(embedder, with_tasks):
    with pytest.raises(InputError, match="MTEB has no task 'NoSuchTask'"):
        evaluate_on_mteb([str(embedder.path)], ["NoSuchTask"], options=MtebOptions())
