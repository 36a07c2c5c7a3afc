"""The table of published GLUE scores, and the command that runs its systems."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from every_family import KINDS, make_masked_lm
from family_checkpoints import make_family_checkpoint
from glue_data import write_toy_glue
from gte_deploy.core.errors import BackendError, CheckpointError, InputError
from gte_deploy.models.presets import PRESETS
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation import glue as glue_module
from gte_deploy.training.evaluation.glue import compare_systems, glue, systems_table
from gte_deploy.training.evaluation.glue_tasks import GLUE_TASKS
from gte_deploy.training.evaluation.published_glue import SYSTEMS, choose_systems, list_systems, system_of
from gte_deploy.training.options import GlueArguments, GlueOptions, Protocol

ONE_STEP = Protocol(max_length=16, batch_size=16, epochs=1)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_model_card():
    """GLUE column of the card of Alibaba-NLP/gte-en-mlm-base, with its sizes and lengths."""
    card = """
        gte-multilingual-mlm-base 306 8192 83.47
        gte-en-mlm-base           137 8192 85.61
        gte-en-mlm-large          435 8192 87.58
        MosaicBERT-base           137 128  85.4
        MosaicBERT-base-2048      137 2048 85
        JinaBERT-base             137 512  85
        nomic-bert-2048           137 2048 84
        MosaicBERT-large          434 128  86.1
        JinaBERT-large            434 512  83.7
        XLM-R-base                279 512  80.44
        RoBERTa-base              125 512  86.4
        RoBERTa-large             355 512  88.9
    """
    rows = [line.split() for line in card.strip().splitlines()]
    ours = [(s.name, s.parameters_millions, s.max_length, s.average) for s in SYSTEMS.values()]
    assert ours == [(name, int(size), int(length), float(glue)) for name, size, length, glue in rows]


def test_published_scores_average_to_the_published_average():
    """Scores are rounded to 0.1, those of nomic-bert-2048 to 1, and so are averages."""
    with_scores = [system for system in SYSTEMS.values() if system.scores is not None]
    assert len(with_scores) >= 6
    for system in with_scores:
        assert system.scores is not None and list(system.scores) != []
        assert system.scores.keys() == GLUE_TASKS.keys()
        rounding = 0.5 if system.name == "nomic-bert-2048" else 0.05
        mean = sum(system.scores.values()) / 8
        assert abs(mean - system.average) <= rounding + 1e-9, system.name
        assert all(0 < score < 100 for score in system.scores.values())


def test_every_score_has_a_source_and_every_missing_checkpoint_a_note():
    for name, system in SYSTEMS.items():
        assert name == system.name
        assert (system.scores is None) == (system.scores_from is None)
        assert system.scores_from is None or re.search(r"arXiv \d{4}\.\d{5}", system.scores_from)
        assert system.checkpoint is not None or system.note
        assert system.checkpoint is None or re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", system.checkpoint)


def test_a_system_is_known_by_its_name_and_its_hub_id():
    for system in SYSTEMS.values():
        assert system_of(system.name) is system
        if system.checkpoint is not None:
            assert system_of(system.checkpoint) is system
            assert system_of(system.checkpoint.partition("@")[0] + "@v1") is system
    assert system_of("runs/base/model") is None and system_of("") is None
    for name in SYSTEMS.keys() & PRESETS.keys():
        assert SYSTEMS[name].checkpoint == PRESETS[name]["hub_id"]


def test_the_list_names_every_system_and_its_source(capsys):
    assert main(["glue", "--list-systems"]) == 0
    text = capsys.readouterr().out
    assert text == list_systems() + "\n"
    for system in SYSTEMS.values():
        assert f"{system.average:.2f}" in text and (system.checkpoint or "none known") in text
        assert f"{system.name}: {system.scores_from or 'not known'}" in text
    assert main(["glue", "--list-systems", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(SYSTEMS) and all(row["average_from"] for row in rows)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_systems_are_chosen_in_the_order_of_the_table():
    chosen = choose_systems(["RoBERTa-base=./mine", "gte-en-mlm-base"])
    assert list(chosen.items()) == [
        ("gte-en-mlm-base", "Alibaba-NLP/gte-en-mlm-base"),
        ("RoBERTa-base", "./mine"),
    ]


def test_all_takes_every_system_and_the_checkpoints_that_are_given():
    chosen = choose_systems(["all", "JinaBERT-large=./jina"])
    assert list(chosen) == list(SYSTEMS)
    assert chosen["JinaBERT-large"] == "./jina" and chosen["MosaicBERT-large"] is None


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["BERT-base"], "unknown system 'BERT-base'; expected all, or of gte-multilingual-mlm-base, "),
        (["JinaBERT-large"], "JinaBERT-large has no known checkpoint.* Give JinaBERT-large=FOLDER"),
        (["RoBERTa-base", "RoBERTa-base=./a"], "expected each system once"),
        (["RoBERTa-base="], "expected each system once, as RoBERTa-base or RoBERTa-base=CHECKPOINT"),
    ],
)
def test_impossible_choices_are_refused(chosen, message):
    with pytest.raises(InputError, match=message):
        choose_systems(chosen)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of MODEL, --systems and --list-systems"),
        ({"model": "a", "systems": ("all",), "output": Path("out")}, "give one of"),
        ({"model": "a"}, "-o/--output is missing"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        GlueArguments(**fields)


def test_a_missing_download_is_named_before_anything_is_trained(tmp_path: Path, capsys):
    """The tests are offline: HF_HUB_OFFLINE is set, and the cache is empty."""
    arguments = ["glue", "--systems", "all", "-o", str(tmp_path / "out"), "--data", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    for system in SYSTEMS.values():
        if system.checkpoint is not None:
            assert system.checkpoint.partition("@")[0] in message, system.name
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_named_before_anything_is_trained(tmp_path: Path, toy_data: Path):
    (tmp_path / "mosaic").mkdir()
    (tmp_path / "mosaic" / "config.json").write_text("{}")
    (tmp_path / "mosaic" / "pytorch_model.bin").write_bytes(b"")
    chosen = choose_systems([f"MosaicBERT-large={tmp_path / 'mosaic'}"])
    with pytest.raises(CheckpointError, match="MosaicBERT-large .*pytorch_model.bin, which are pickles"):
        compare_systems(chosen, output=tmp_path / "out", options=GlueOptions(data=toy_data, device="cpu"))


# --- runs -------------------------------------------------------------------------------------------------------------

SPELT = {"signals": ("river", "city", "old"), "noise": ("the", "is", "and")}


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_glue(tmp_path_factory.mktemp("glue"), train=16, dev=8, **SPELT)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each family."""
    folder = tmp_path_factory.mktemp("families")
    return {kind: make_masked_lm(folder / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_takes_one_step_of_each_task_and_reports(kind, checkpoints, toy_data: Path, tmp_path: Path):
    options = GlueOptions(data=toy_data, device="cpu")
    summary = glue(str(checkpoints[kind]), output=tmp_path, options=options, protocol=ONE_STEP)
    assert list(summary["scores"]) == list(GLUE_TASKS)
    assert all(-100 <= score["mean"] <= 100 for score in summary["scores"].values())
    assert summary["average"] == pytest.approx(sum(score["mean"] for score in summary["scores"].values()) / 8)
    assert (tmp_path / "seed-0" / "mnli.safetensors").is_file()


def test_texts_are_cut_at_the_longest_text_of_the_model(checkpoints, toy_data: Path, tmp_path: Path):
    options = GlueOptions(data=toy_data, tasks=("cola",), device="cpu")
    summary = glue(str(checkpoints["bert"]), output=tmp_path, options=options, protocol=Protocol(epochs=1))
    assert summary["results"][0]["max_length"] == 48


def test_padding_is_removed_on_request_or_the_reason_is_named(checkpoints, toy_data: Path, tmp_path: Path):
    options = GlueOptions(data=toy_data, tasks=("cola",), device="cpu", padding="remove")
    summary = glue(str(checkpoints["new"]), output=tmp_path / "a", options=options, protocol=ONE_STEP)
    assert summary["results"][0]["padding"] == "removed"
    with pytest.raises(ValueError, match="without padding: attention_probs_dropout_prob is 0.1"):
        glue(str(checkpoints["bert"]), output=tmp_path / "b", options=options, protocol=ONE_STEP)


def test_a_tokenizer_of_its_own_folder(checkpoints, toy_data: Path, tmp_path: Path):
    bare = make_family_checkpoint(tmp_path / "bert", "bert")
    for file in (*bare.glob("tokenizer*"), *bare.glob("vocab*"), *bare.glob("special*")):
        file.unlink()
    options = GlueOptions(data=toy_data, tasks=("sst2",), device="cpu")
    with pytest.raises(CheckpointError, match="no file with a vocabulary"):
        glue(str(bare), output=tmp_path / "out", options=options, protocol=ONE_STEP)
    given = GlueOptions(data=toy_data, tasks=("sst2",), device="cpu", tokenizer=str(checkpoints["bert"]))
    scores = glue(str(bare), output=tmp_path / "out", options=given, protocol=ONE_STEP)["scores"]
    whole = glue(str(checkpoints["bert"]), output=tmp_path / "whole", options=options, protocol=ONE_STEP)["scores"]
    assert scores == whole
    with pytest.raises(InputError, match=r"other settings \(tokenizer\)"):
        glue(str(checkpoints["bert"]), output=tmp_path / "whole", options=given, protocol=ONE_STEP)


def test_systems_run_side_by_side_and_are_not_run_again(checkpoints, toy_data: Path, tmp_path: Path, capsys):
    chosen = [f"gte-en-mlm-base={checkpoints['new']}", f"RoBERTa-base={checkpoints['roberta']}"]
    fast = ["--max-length", "16", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--tasks", "cola", "rte"]
    arguments = ["glue", "-o", str(tmp_path), "--data", str(toy_data), *fast, "--systems", *chosen]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["system", *(task.folder for task in GLUE_TASKS.values()), "average"]
    assert lines[1].split()[:3] == ["gte-en-mlm-base", "this", "run"]
    assert lines[2].split() == ["published", *"57.00 93.40 86.70 92.10 90.20 88.80 91.90 84.80 85.61".split()]
    assert lines[4].split()[-1] == "86.40" and "did not follow the published protocol" in lines[5]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-0/*")}
    assert len(before) == 2 * 7  # two results, that of MNLI, MNLI's weights, and the losses of each
    assert main([*arguments[:1], "--json", *arguments[1:]]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "systems.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-0/*")} == before
    row = summary["systems"][1]
    assert row["name"] == "RoBERTa-base" and row["published"]["scores"]["cola"] == 63.6
    assert row["scores"].keys() == {"cola", "mnli", "rte"} and row["average"] is None and row["error"] is None


def test_one_failed_system_does_not_keep_the_others_from_running(checkpoints, toy_data, tmp_path, monkeypatch, capsys):
    real = glue_module.fine_tune

    def fail_for_bert(model, *args, **kwargs):
        if model.base_model_prefix == "bert":
            raise BackendError("this one fails")
        real(model, *args, **kwargs)

    monkeypatch.setattr(glue_module, "fine_tune", fail_for_bert)
    chosen = [f"MosaicBERT-base={checkpoints['bert']}", f"XLM-R-base={checkpoints['xlm-roberta']}"]
    fast = ["--max-length", "16", "--epochs", "1", "--device", "cpu", "--tasks", "cola"]
    assert main(["glue", "-o", str(tmp_path), "--data", str(toy_data), *fast, "--systems", *chosen]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "failed: this one fails" in lines[1] and lines[3].split()[0] == "XLM-R-base" and "failed" not in lines[3]


def test_a_system_without_a_checkpoint_is_listed(checkpoints, toy_data: Path, tmp_path: Path):
    options = GlueOptions(data=toy_data, tasks=("cola",), device="cpu")
    chosen = {"JinaBERT-large": None, "RoBERTa-base": str(checkpoints["roberta"])}
    summary = compare_systems(chosen, output=tmp_path, options=options, protocol=ONE_STEP)
    lines = systems_table(summary).splitlines()
    assert "not run: The model cards link no checkpoint." in lines[1]
    assert lines[2].split() == ["published", *["-"] * 8, "83.70"]
    assert lines[3].split()[0] == "RoBERTa-base"


def test_one_tokenizer_for_several_systems_is_refused(toy_data: Path, tmp_path: Path):
    with pytest.raises(InputError, match="a tokenizer is for one model"):
        compare_systems({}, output=tmp_path, options=GlueOptions(data=toy_data, tokenizer="x/y"))


def test_the_documented_table_is_the_same():
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    for system in SYSTEMS.values():
        (row,) = (row for row in rows if row[0] == system.name and len(row) == 11)
        scores = [None if cell == "–" else float(cell) for cell in row[2:10]]
        known = system.scores or {}
        assert scores == [known.get(task) for task in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")]
        assert float(row[1]) == system.average
        checkpoint = (system.checkpoint or "none known").partition("@")[0]
        assert row[10].strip("`") == checkpoint
