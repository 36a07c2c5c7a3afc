"""The files of a checkpoint with any values in them are read, or refused by a message that names the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from battery import Attempts
from gte_deploy.core.errors import GteDeployError
from gte_deploy.models.description import describe
from json_documents import places, put
from runtime_models import make_word_checkpoint

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
LONGEST_MESSAGE = 5000
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 64, 1 << 31, 10**18])
words = st.text(st.characters(), max_size=12) | st.sampled_from(["mean", "[PAD]"])
leaves = st.none() | st.booleans() | numbers | words
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
# Which value is changed, and into what; ... leaves it out.
changes = st.lists(st.tuples(st.integers(0, 10_000), st.just(...) | values), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding model with each of the files. Read only."""
    folder = make_word_checkpoint(
        tmp_path_factory.mktemp("original") / "checkpoint", task="embed", pooling="cls", prompts={"query": "the: "}
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    assert [name for name in FILES if not (folder / name).is_file()] == []
    return folder


def read_or_refused(folder: Path, name: str, document: Any) -> bool:
    """Whether a checkpoint with this document in this file is read; every error but the package's ends the test."""
    kept = (folder / name).read_bytes()
    try:
        (folder / name).write_text(json.dumps(document))
        describe(folder)
    except GteDeployError as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE and str(folder) in str(error), str(error)[:1000]
        return False
    finally:
        (folder / name).write_bytes(kept)
    return True


def fuzz(folder: Path, name: str, examples: int) -> None:
    document = json.loads((folder / name).read_text())
    assert read_or_refused(folder, name, document)

    @settings(max_examples=examples, deadline=30_000, suppress_health_check=list(HealthCheck))
    @given(changes=changes)
    def changed(changes: list[tuple[int, Any]]) -> None:
        found = document
        for number, value in changes:
            if all_places := list(places(found)):
                found = put(found, all_places[number % len(all_places)], value)
        read_or_refused(folder, name, found)

    changed()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_any_values_in_a_file(original: Path, tmp_path: Path, name: str, examples: int, attempts: Attempts) -> None:
    fuzz(shutil.copytree(original, tmp_path / "checkpoint"), name, examples)
    attempts(f"checkpoints with other values in {name}", examples)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("document", [None, 0, "a", [], [[]], {}, [None], {"": 0}], ids=repr)
def test_another_document(original: Path, tmp_path: Path, name: str, document: Any) -> None:
    read_or_refused(shutil.copytree(original, tmp_path / "checkpoint"), name, document)
