"""GLUE: metrics against hand-computed values, files in every published layout, the protocol, and that it learns."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gte_deploy
from factories import make_checkpoint
from glue_data import toy_rows, write_toy_glue
from gte_deploy.core.errors import InputError
from gte_deploy.models.checkpoint import copy_tokenizer, save_model
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation import glue as glue_module
from gte_deploy.training.evaluation.classifiers import open_encoder
from gte_deploy.training.evaluation.finetuning import Encoded, fine_tune, predict
from gte_deploy.training.evaluation.glue import glue, table
from gte_deploy.training.evaluation.glue_tasks import (
    GLUE_TASKS,
    Examples,
    accuracy,
    f1,
    load_split,
    matthews,
    spearman,
    tasks_in_order,
)
from gte_deploy.training.evaluation.published_glue import SYSTEMS
from gte_deploy.training.options import GlueOptions, Protocol

FAST = Protocol(max_length=32, batch_size=16, learning_rate=1e-3, epochs=6)


# --- metrics --------------------------------------------------------------------------------------------------------

PREDICTIONS = np.array([1, 1, 1, 0, 0, 0, 0, 1])
LABELS = np.array([1, 1, 0, 0, 0, 0, 1, 0])


def test_metrics_by_hand():
    # 2 true positives, 2 false positives, 1 false negative, 3 true negatives
    assert accuracy(PREDICTIONS, LABELS) == pytest.approx(100 * 5 / 8)
    assert f1(PREDICTIONS, LABELS) == pytest.approx(100 * 4 / 7)
    assert matthews(PREDICTIONS, LABELS) == pytest.approx(100 * (2 * 3 - 2 * 1) / (4 * 3 * 4 * 5) ** 0.5)
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4
    a, b = np.array([1.0, 2.0, 2.0, 9.0]), np.array([0.2, 0.1, 0.3, 0.4])
    assert spearman(a, b) == pytest.approx(100 * 3.0 / (4.5 * 5) ** 0.5)


def test_metrics_of_constant_predictions_are_zero_and_finite():
    zeros = np.zeros(8, dtype=int)
    assert (f1(zeros, LABELS), matthews(zeros, LABELS), spearman(zeros, LABELS)) == (0, 0, 0)


def test_metrics_are_those_of_scikit_learn_and_scipy():
    sklearn, scipy = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
        assert accuracy(a, b) == pytest.approx(100 * sklearn.accuracy_score(b, a))
        assert f1(a, b) == pytest.approx(100 * sklearn.f1_score(b, a))
        assert matthews(a, b) == pytest.approx(100 * sklearn.matthews_corrcoef(b, a))
        x, y = rng.integers(0, 9, 50) / 2, rng.normal(size=50)
        assert spearman(y, x) == pytest.approx(100 * scipy.spearmanr(x, y).statistic)


def test_the_metric_of_each_task_is_the_published_one():
    published = {"cola": matthews, "sst2": accuracy, "mrpc": f1, "stsb": spearman, "qqp": f1, "mnli": accuracy}
    published |= {"qnli": accuracy, "rte": accuracy}
    assert {name: task.score for name, task in GLUE_TASKS.items()} == published
    assert {name for name, task in GLUE_TASKS.items() if task.starts_from == "mnli"} == {"rte", "mrpc", "stsb"}


# --- data -----------------------------------------------------------------------------------------------------------

ARCHIVE = {
    "CoLA": {"train.tsv": 'gj04\t1\t\tw7 "w8 w9.\ngj04\t0\t*\tw9\u2028w8\n', "dev.tsv": "gj04\t1\t\tw5\n"},
    "SST-2": {"train.tsv": "sentence\tlabel\nw7 w8 \t1\n", "dev.tsv": "sentence\tlabel\nw5 \t0\n"},
    "MRPC": {
        "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\tw7\tw8\r\n",
        "dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n0\t70\t71\tw7\tw9\r\n",
    },
    "STS-B": {
        "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\t1\ts\ts\tw7\tw8\t3.800\n",
        "dev.tsv": "index\tsentence1\tsentence2\tscore\n0\tw7\tw8\t5.000\n",
    },
    "QQP": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tw7\tw8\t0\n4\t5\t6\tbroken\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tw7\tw8\t1\n",
    },
    "MNLI": {
        "train.tsv": "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\tw7\tw8\tneutral\tneutral\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        "0\tw7\tw8\tneutral\tentailment\tcontradiction\n",
    },
    "QNLI": {
        "train.tsv": "index\tquestion\tsentence\tlabel\n0\tw7\tw8\tnot_entailment\n",
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tw7\tw8\tentailment\n",
    },
    "RTE": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tw7\tw8\tnot_entailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tw7\tw8\tentailment\n",
    },
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A few lines of each task as its published archive writes them."""
    for folder, files in ARCHIVE.items():
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / "glue" / folder / name).write_text(text, encoding="utf-8", newline="")
    return tmp_path / "glue"


@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [
        ("cola", [(('w7 "w8 w9.',), 1), (("w9\u2028w8",), 0)], [(("w5",), 1)]),
        ("sst2", [(("w7 w8 ",), 1)], [(("w5 ",), 0)]),
        ("mrpc", [(("w7", "w8"), 1)], [(("w7", "w9"), 0)]),
        ("stsb", [(("w7", "w8"), 3.8)], [(("w7", "w8"), 5.0)]),
        ("qqp", [(("w7", "w8"), 0)], [(("w7", "w8"), 1)]),
        ("mnli", [(("w7", "w8"), 1)], [(("w7", "w8"), 2)]),
        ("qnli", [(("w7", "w8"), 1)], [(("w7", "w8"), 0)]),
        ("rte", [(("w7", "w8"), 1)], [(("w7", "w8"), 0)]),
    ],
)
def test_archives_are_read_as_published(archive: Path, task, train, dev):
    for split, expected in (("train", train), ("dev", dev)):
        examples = load_split(GLUE_TASKS[task], split, data=archive)
        assert examples.texts == [texts for texts, _ in expected]
        assert examples.labels.tolist() == pytest.approx([label for _, label in expected])
    assert examples.labels.dtype == (np.float32 if task == "stsb" else np.int64)


def test_rows_with_missing_columns_are_counted(archive: Path, caplog):
    load_split(GLUE_TASKS["qqp"], "train", data=archive)
    assert "left out 1 rows with missing columns" in caplog.text


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_hub_layout_is_read_from_files(tmp_path: Path, form):
    rows = [{"premise": "w7", "hypothesis": "w8", "label": i, "idx": i} for i in (2, 0, 1)]
    folder = tmp_path / "mnli"
    folder.mkdir()
    if form == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "validation_matched.jsonl").write_text(json.dumps({**rows[0], "label": "neutral"}) + "\n")
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for i, part in enumerate((rows[:2], rows[2:])):
            parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"train-{i:05d}-of-00002.parquet")
        table = pyarrow.Table.from_pylist([{**rows[0], "label": 1}])
        parquet.write_table(table, folder / "validation_matched-00000-of-00001.parquet")
    assert load_split(GLUE_TASKS["mnli"], "train", data=tmp_path).labels.tolist() == [2, 0, 1]
    assert load_split(GLUE_TASKS["mnli"], "dev", data=tmp_path).labels.tolist() == [1]


def test_hub_is_asked_for_the_published_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"premise": "w7", "hypothesis": "w8", "label": 2, "idx": 0}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_split(GLUE_TASKS["mnli"], "dev", data=None).labels.tolist() == [2]
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]


@pytest.mark.parametrize(
    ("task", "file", "text", "message"),
    [
        ("rte", "train.tsv", "index\tsentence1\tlabel\n0\tw7\tentailment\n", "expected sentence1, sentence2, label"),
        ("rte", "train.tsv", "sentence1\tsentence2\tlabel\nw7\tw8\tmaybe\n", "row 1: the label is 'maybe'"),
        ("rte", "train.jsonl", '{"sentence1": "a", "sentence2": "b", "label": -1}\n', "the label is -1"),
        ("rte", "train.jsonl", "{\n", "line 1: not JSON"),
        ("stsb", "train.tsv", "sentence1\tsentence2\tscore\nw7\tw8\t7\n", "expected 0 to 5"),
        ("rte", "train.tsv", "sentence1\tsentence2\tlabel\n", "holds no example"),
        ("rte", "other.tsv", "", "has no train.tsv"),
    ],
)
def test_wrong_data_are_refused(tmp_path: Path, task, file, text, message):
    folder = tmp_path / GLUE_TASKS[task].folder
    folder.mkdir()
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        load_split(GLUE_TASKS[task], "train", data=tmp_path)


def test_missing_task_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no folder CoLA"):
        load_split(GLUE_TASKS["cola"], "train", data=tmp_path)


def test_a_chained_task_brings_mnli_with_it():
    assert [task.name for task in tasks_in_order(["stsb", "cola"])] == ["cola", "mnli", "stsb"]
    with pytest.raises(InputError, match="unknown GLUE tasks wnli"):
        tasks_in_order(["wnli"])


# --- token types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["input_ids", "attention_mask"]])
def test_a_trained_pair_classifier_answers_alike_wherever_it_is_loaded(tmp_path: Path, names):
    """It is trained with the token types that the runtime and CrossEncoder feed it with: the tokenizer's, or none."""
    from sentence_transformers import CrossEncoder

    folder = make_checkpoint(tmp_path / "mlm", type_vocab_size=2, layers=1, layout="native", max_positions=64)
    if names is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    # Which of the two texts has the word w10: types tell it best.
    noise = random.Random(0)
    texts = [[f"w{noise.randint(50, 255)}" for _ in range(3)] for _ in range(64)]
    labels = [number % 2 for number in range(32)]
    pairs = [(" ".join(texts[2 * i]), " ".join(texts[2 * i + 1])) for i in range(32)]
    pairs = [
        tuple("w10 " + t if at == label else t for at, t in enumerate(p))
        for p, label in zip(pairs, labels, strict=True)
    ]
    encoder = open_encoder(folder)
    model = encoder.classifier(num_labels=2, seed=0)
    data = Encoded.of(Examples(pairs, np.array(labels)), encoder=encoder, max_length=32)
    assert (data.type_ids is None) == (names is not None)
    fine_tune(model, data, protocol=Protocol(max_length=32, batch_size=8, learning_rate=1e-3, epochs=2), seed=0)
    trained = predict(model, data)

    save_model(model, tmp_path / "trained", layout="native")
    copy_tokenizer(folder, tmp_path / "trained")
    with gte_deploy.load(tmp_path / "trained") as runtime:
        np.testing.assert_allclose(runtime.predict(pairs), trained, atol=1e-4)
    theirs = CrossEncoder(str(tmp_path / "trained"), device="cpu").predict(pairs)
    np.testing.assert_allclose(theirs, trained, atol=1e-4)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(tiny_mlm: Path) -> Encoded:
    texts: list[tuple[str, ...]] = [("w7 w8 w9",), ("w7",), (" ".join(["w9"] * 40), "w5 w6")]
    return Encoded.of(Examples(texts, np.array([0, 1, 0])), encoder=open_encoder(tiny_mlm), max_length=16)


def test_batches_are_padded_and_cut(encoded: Encoded):
    inputs, labels = encoded.batch(np.array([1, 0]), torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[2, 7, 3, 0, 0], [2, 7, 8, 9, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert labels.tolist() == [1, 0]
    long = encoded.batch(np.array([2]), torch.device("cpu"))[0]["input_ids"][0].tolist()
    assert long == [2, *[9] * 11, 3, 5, 6, 3]  # the longer text is cut, the second stays whole


def test_rows_of_a_batch_are_predicted_as_alone(tiny_mlm: Path, encoded: Encoded):
    model = open_encoder(tiny_mlm).classifier(num_labels=2, seed=0).eval()
    together = predict(model, encoded)
    for i in range(len(encoded)):
        inputs, _ = encoded.batch(np.array([i]), torch.device("cpu"))
        np.testing.assert_allclose(together[i], model(**inputs).logits[0].detach(), atol=1e-5)


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def encode_rows(rows: list[tuple[str, int]], folder: Path) -> Encoded:
    examples = Examples([(text,) for text, _ in rows], np.array([label for _, label in rows]))
    return Encoded.of(examples, encoder=open_encoder(folder), max_length=32)


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight tasks, learnable, as .tsv in the published layout."""
    return write_toy_glue(tmp_path_factory.mktemp("glue"))


def test_a_learnable_task_is_learnt_and_a_random_one_is_not(tiny_mlm: Path):
    rows, noise, scores = toy_rows(300, 0), random.Random(2), {}
    random_rows = [(text, noise.randrange(2)) for text, _ in rows]
    for name, train in (("learnable", rows[:200]), ("random", random_rows[:200])):
        model = open_encoder(tiny_mlm).classifier(num_labels=2, seed=0)
        fine_tune(model, encode_rows(train, tiny_mlm), protocol=FAST, seed=0)
        unseen = encode_rows(rows[200:], tiny_mlm)
        scores[name] = accuracy(predict(model, unseen).argmax(1), unseen.labels)
    assert scores["learnable"] >= 95
    assert scores["random"] <= 75


def test_fine_tuning_is_reproducible(tiny_mlm: Path):
    outputs = []
    for seed in (0, 0, 1):
        model = open_encoder(tiny_mlm).classifier(num_labels=2, seed=0)
        data = encode_rows(toy_rows(40, 0), tiny_mlm)
        fine_tune(model, data, protocol=Protocol(learning_rate=1e-3, epochs=1), seed=seed)
        outputs.append(predict(model, data))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[0], outputs[2])


@pytest.fixture(scope="module")
def whole_run(tiny_mlm: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("results")
    return output, glue(str(tiny_mlm), output=output, options=GlueOptions(data=toy_data, device="cpu"), protocol=FAST)


def test_eight_tasks_are_run_and_averaged(whole_run: tuple[Path, dict[str, Any]]):
    output, summary = whole_run
    assert list(summary["scores"]) == list(GLUE_TASKS)
    means = {task: score["mean"] for task, score in summary["scores"].items()}
    assert summary["average"] == pytest.approx(sum(means.values()) / 8)
    assert min(means.values()) > 65, means  # every task is learnable, the regression too
    stored = json.loads((output / "glue.json").read_text())
    assert stored["average"] == summary["average"]
    assert (output / "seed-0" / "mnli.safetensors").is_file()


def test_published_averages_stand_beside_the_result(whole_run: tuple[Path, dict[str, Any]]):
    summary = whole_run[1]
    text = table(summary)
    for name, average in (("base", "85.61"), ("large", "87.58")):
        assert any(f"gte-en-mlm-{name}" in line and average in line for line in text.splitlines())
    assert "83.47" in text and "did not follow the published protocol" in text
    assert summary["published"] is None  # of this checkpoint


def test_published_scores_stand_beside_those_of_the_same_system(whole_run: tuple[Path, dict[str, Any]]):
    summary = {**whole_run[1], "published": SYSTEMS["gte-en-mlm-base"].to_dict()}
    lines = {line.split()[0]: line.split() for line in table(summary).splitlines()[:10] if line}
    assert lines["CoLA"][3] == "57.00" and lines["average"][4] == "85.61"


def test_the_result_says_how_texts_were_cut_and_padded(whole_run: tuple[Path, dict[str, Any]]):
    assert {(result["max_length"], result["padding"]) for result in whole_run[1]["results"]} == {(32, "kept")}


def test_scores_and_losses_are_plotted(whole_run: tuple[Path, dict[str, Any]]):
    for name in ("glue.png", "losses.png"):
        assert (whole_run[0] / name).read_bytes().startswith(b"\x89PNG")
    losses = json.loads((whole_run[0] / "seed-0" / "sst2.losses.json").read_text())
    assert len(losses) == 6 * 160 / 16 and sum(losses[-10:]) < sum(losses[:10])


def test_finished_tasks_are_not_run_again(whole_run, tiny_mlm: Path, toy_data: Path, monkeypatch):
    output, summary = whole_run
    monkeypatch.setattr(glue_module, "fine_tune", lambda *args, **kwargs: pytest.fail("ran again"))
    again = glue(str(tiny_mlm), output=output, options=GlueOptions(data=toy_data, device="cpu"), protocol=FAST)
    assert again["scores"] == summary["scores"]


def test_results_of_another_protocol_are_refused(whole_run, tiny_mlm: Path, toy_data: Path):
    with pytest.raises(InputError, match=r"other settings \(protocol\)"):
        glue(str(tiny_mlm), output=whole_run[0], options=GlueOptions(data=toy_data, device="cpu"))


def test_a_task_stopped_midway_is_run_again_alone(tiny_mlm: Path, toy_data: Path, tmp_path: Path, monkeypatch):
    started: list[str] = []
    real: Callable[..., Any] = load_split

    def record(task: Any, split: str, **kwargs: Any) -> Examples:
        if split == "train":
            started.append(task.name)
            if started == ["cola", "sst2"]:
                raise KeyboardInterrupt
        return real(task, split, **kwargs)

    monkeypatch.setattr(glue_module, "load_split", record)
    options = GlueOptions(data=toy_data, tasks=("cola", "sst2"), device="cpu")
    protocol = Protocol(max_length=16, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        glue(str(tiny_mlm), output=tmp_path, options=options, protocol=protocol)
    summary = glue(str(tiny_mlm), output=tmp_path, options=options, protocol=protocol)
    assert started == ["cola", "sst2", "sst2"]
    assert summary["average"] is None and "needs all eight tasks" in table(summary)


def test_chained_tasks_start_from_the_mnli_weights(whole_run, tiny_mlm: Path, toy_data: Path, monkeypatch):
    output, _ = whole_run
    starts: dict[str, dict[str, torch.Tensor]] = {}

    def record(model: Any, train: Encoded, **kwargs: Any) -> None:
        starts[f"{model.num_labels}"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    monkeypatch.setattr(glue_module, "fine_tune", record)
    (output / "seed-0" / "rte.json").unlink()
    (output / "seed-0" / "qnli.json").unlink()
    mnli = load_file(output / "seed-0" / "mnli.safetensors")
    name = "gte.layers.1.mlp.down_proj.weight"
    options = GlueOptions(data=toy_data, device="cpu")
    glue(str(tiny_mlm), output=output, options=replace(options, tasks=("rte",)), protocol=FAST)
    assert torch.equal(starts["2"][name], mnli[name])
    assert starts["2"]["classifier.weight"].shape == (2, 32)
    glue(str(tiny_mlm), output=output, options=replace(options, tasks=("qnli",)), protocol=FAST)
    assert not torch.equal(starts["2"][name], mnli[name])


def test_several_seeds_are_averaged(tiny_mlm: Path, toy_data: Path, tmp_path: Path):
    protocol = Protocol(max_length=16, learning_rate=1e-3, epochs=1)
    options = GlueOptions(data=toy_data, tasks=("cola",), seeds=(0, 1, 0), device="cpu")
    summary = glue(str(tiny_mlm), output=tmp_path, options=options, protocol=protocol)
    by_seed = summary["scores"]["cola"]["by_seed"]
    assert list(by_seed) == [0, 1] and summary["scores"]["cola"]["mean"] == pytest.approx(sum(by_seed.values()) / 2)
    assert "deviation" in table(summary)


def test_command(tiny_mlm: Path, toy_data: Path, tmp_path: Path, capsys):
    fast = ["--tasks", "sst2", "--max-length", "16", "--epochs", "1", "--learning-rate", "1e-3", "--device", "cpu"]
    arguments = ["glue", str(tiny_mlm), "-o", str(tmp_path / "out"), "--data", str(toy_data), *fast]
    assert main(arguments) == 0
    assert "SST-2" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["learning_rate"] == 1e-3
    assert main(["glue", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "no config.json" in capsys.readouterr().err
