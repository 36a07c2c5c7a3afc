"""XTREME-R from the hub's datasets: the same examples as from the authors' files, offline, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from gte_deploy.core.errors import InputError
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation.glue_tasks import GLUE_TASKS, load_split
from gte_deploy.training.evaluation.xtreme import xtreme
from gte_deploy.training.evaluation.xtreme_data import readers_of_files
from gte_deploy.training.evaluation.xtreme_hub import HUB_SOURCES, PARQUET_BRANCH, has_clones, readers_of_hub
from gte_deploy.training.xtreme_options import XtremeOptions
from xtreme_clones import write_clone, write_clones
from xtreme_data import LANGUAGES, write_toy_xtreme

COMMIT = "c" * 40


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """`datasets` keeps what it reads; nothing of it goes into the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_xtreme(tmp_path_factory.mktemp("files"), train=12, test=6)


@pytest.fixture(scope="module")
def clones(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clones(files, tmp_path_factory.mktemp("clones"), languages=LANGUAGES, xcopa=("it", "zh"))


def plain(found: Any) -> Any:
    """The content of what a reader returns, without numpy."""
    values = found if isinstance(found, list) else vars(found)
    if isinstance(values, list):
        return [vars(item) for item in values]
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    *((name, ()) for name in ("mnli", "siqa", "copa", "squad", "tydiqa_train", "squad_pairs", "mewslix_train")),
    *((name, (code,)) for name in ("xnli", "xcopa", "xquad", "mlqa") for code in ("zh",)),
    *((name, ("en", split)) for name in ("udpos", "wikiann") for split in ("train", "test")),
    *(("tydiqa", ("en",)), ("tatoeba", ("zh",)), ("lareqa", (LANGUAGES,)), ("mewslix", (LANGUAGES,))),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_the_hubs_datasets_are_the_authors_files(files: Path, clones: Path, name, arguments):
    expected = getattr(readers_of_files(files), name)(*arguments)
    found = getattr(readers_of_hub(clones), name)(*arguments)
    assert plain(found) == plain(expected) and plain(found)


def test_every_reader_is_compared():
    assert {name for name, _ in CALLS} == set(vars(readers_of_hub()))


def test_folders_of_clones_are_known(files: Path, clones: Path):
    assert has_clones(clones) and not has_clones(files)
    assert all((clones / source.name).is_dir() for source in HUB_SOURCES.values())


def test_scores_do_not_depend_on_the_source(tiny_mlm: Path, files: Path, clones: Path, tmp_path: Path):
    options = XtremeOptions(
        tasks=("xcopa",), languages=("zh",), device="cpu", max_length=16, batch_size=8, learning_rate=5e-3, epochs=1
    )
    first, second = (
        xtreme(str(tiny_mlm), output=tmp_path / name, data=data, options=options)
        for name, data in (("files", files), ("clones", clones))
    )
    assert first["scores"] == second["scores"]
    with pytest.raises(InputError, match=r"other settings \(data\)"):
        xtreme(str(tiny_mlm), output=tmp_path / "files", data=clones, options=replace(options))


# --- the hub itself ---------------------------------------------------------------------------------------------------


def rows(checksums: Any = None) -> Any:
    features = Features(
        {
            "premise": Value("string"),
            "hypothesis": Value("string"),
            "label": ClassLabel(names=["neutral", "contradiction", "entailment"]),
        }
    )
    table = Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [2]}, features=features)
    table.info.download_checksums = checksums
    return table


def test_the_hub_is_asked_for_the_published_datasets(monkeypatch: pytest.MonkeyPatch):
    """The names are those of tools/cache_data.py in izhx/nlu-evals; classes count by their names."""
    asked = []

    def load_dataset(name: str, config: str, **arguments: Any) -> Any:
        asked.append((name, config, arguments))
        return rows({f"hf://datasets/{name}@{COMMIT}/de/test.parquet": {}})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commits: dict[str, str] = {}
    assert readers_of_hub(commits=commits).xnli("de").labels.tolist() == [0]
    assert asked == [("facebook/xnli", "de", {"split": "test", "streaming": False})]
    assert commits == {"facebook/xnli": COMMIT}
    names = {source.name for source in HUB_SOURCES.values()}
    published = (
        "nyu-mll/glue facebook/xnli cambridgeltl/xcopa aps/super_glue allenai/social_i_qa izhx/xtreme-r-udpos "
        "unimelb-nlp/wikiann rajpurkar/squad google/xquad facebook/mlqa izhx/mewsli-x google-research-datasets/xquad_r "
        "mteb/tatoeba-bitext-mining"
    )
    assert names == {*published.split(), "google-research-datasets/tydiqa"}


def test_of_a_script_the_hubs_parquet_files_are_read(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*names: str, **arguments: Any) -> Any:
        asked.append((names, arguments))
        if "revision" not in arguments:
            raise RuntimeError("Dataset scripts are no longer supported, but found mlqa.py")
        answers = {"text": ["b"], "answer_start": [2]}
        return Dataset.from_list([{"id": "1", "question": "q", "context": "a b", "answers": answers}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (question,) = readers_of_hub().mlqa("de")
    assert question.answers == ("b",) and question.start == 2
    arguments = {"split": "test", "streaming": False}
    files = {"test": "mlqa.de.de/test/*.parquet"}
    assert asked == [
        (("facebook/mlqa", "mlqa.de.de"), arguments),
        (("facebook/mlqa",), {"data_files": files, "revision": PARQUET_BRANCH, **arguments}),
    ]


def test_the_command_reads_the_hub_and_says_what_it_could_not(tiny_mlm: Path, tmp_path: Path, capsys):
    """Tests are offline."""
    command = ["xtreme", str(tiny_mlm), "-o", str(tmp_path), "--tasks", "xcopa", "--device", "cpu"]
    assert main(command) != 0
    assert "allenai/social_i_qa default train cannot be opened: " in (said := capsys.readouterr().err)
    assert "HF_HUB_OFFLINE, or give the authors' files with --data" in said
    with pytest.raises(InputError, match=r"nyu-mll/glue cola train cannot be opened: .*give the files with --data"):
        load_split(GLUE_TASKS["cola"], "train", data=None)


def test_commits_are_in_the_results(tiny_mlm: Path, clones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local = readers_of_hub(clones)

    def readers(commits: dict[str, str]) -> Any:
        commits["cambridgeltl/xcopa"] = COMMIT
        return local

    monkeypatch.setattr("gte_deploy.training.evaluation.xtreme.readers_of_hub", readers)
    options = XtremeOptions(tasks=("xcopa",), languages=("zh",), device="cpu", max_length=16, batch_size=8, epochs=1)
    summary = xtreme(str(tiny_mlm), output=tmp_path, options=options)
    assert summary["data"] == "hub" and summary["results"][0]["commits"] == {"cambridgeltl/xcopa": COMMIT}
    assert json.loads((tmp_path / "seed-0" / "xcopa.json").read_text())["commits"] == {"cambridgeltl/xcopa": COMMIT}


@pytest.mark.parametrize(
    ("key", "config", "split", "row", "call", "message"),
    [
        (
            "xnli",
            "de",
            "test",
            {"premise": "a", "label": 1},
            ("xnli", "de"),
            "row 1: no hypothesis; it has premise, label",
        ),
        ("xnli", "de", "test", {"premise": "a", "hypothesis": "b", "label": 3}, ("xnli", "de"), "the label is 3"),
        ("xcopa", "et", "test", {"premise": "a", "label": "x"}, ("xcopa", "et"), "a label is 'x'"),
        ("xcopa", "et", "test", {"premise": "a", "choice1": "b", "label": 0}, ("xcopa", "et"), "no field 'question'"),
        ("udpos", "de", "test", {"tokens": ["a"], "pos_tags": ["B"]}, ("udpos", "de", "test"), "unknown tags 'B'"),
        ("udpos", "de", "test", {"tokens": ["a"], "pos_tags": []}, ("udpos", "de", "test"), "1 words and 0 tags"),
        (
            *("xquad", "xquad.de", "validation"),
            {"id": "1", "question": "q", "context": "c", "answers": {"text": [], "answer_start": []}},
            *(("xquad", "de"), "question '1' has no answer"),
        ),
        (
            *("tydiqa", "secondary_task", "validation"),
            {"id": "thai-1", "question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}},
            *(("tydiqa", "ko"), "no question whose id begins with 'korean-'"),
        ),
        ("xnli", "fr", "test", {"premise": "a"}, ("xnli", "de"), "facebook/xnli de test cannot be opened"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, key, config, split, row, call, message):
    write_clone(tmp_path / HUB_SOURCES[key].name, {(config, split): Dataset.from_list([row])})
    name, *arguments = call
    with pytest.raises(InputError, match=message):
        getattr(readers_of_hub(tmp_path), name)(*arguments)


def test_unknown_entities_are_refused(tmp_path: Path):
    tables = {
        ("candidate_entities", "test"): Dataset.from_list([{"entity_id": "Q1", "description": "c"}]),
        ("de", "test"): Dataset.from_list([{"mention": "m", "entity_id": "Q2"}]),
    }
    write_clone(tmp_path / HUB_SOURCES["mewslix"].name, tables)
    with pytest.raises(InputError, match="no candidate is the entity 'Q2'"):
        readers_of_hub(tmp_path).mewslix(["de"])
