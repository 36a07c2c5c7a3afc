import json
import shutil

import pytest

from gte_deploy.models import builtin_path
from gte_deploy.text.fingerprint import fingerprint
from gte_deploy.text.tokenization import load_tokenizer


@pytest.fixture
def altered(tmp_path):
    """`altered(file, **fields)`: the fingerprint of the built-in tokenizer with other fields in one of its files."""

    def make(file="tokenizer.json", **fields):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (builtin_path() / name).is_file():
                shutil.copy(builtin_path() / name, folder)
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**data, **fields}, indent=5, sort_keys=True))
        return fingerprint(folder, load_tokenizer(folder))

    return make


def test_the_form_of_a_file_and_settings_without_effect(altered):
    own = fingerprint(builtin_path(), load_tokenizer(builtin_path()))
    assert altered() == own
    assert altered(truncation=None, padding=None, decoder=None) == own


def test_whatever_changes_token_ids(altered):
    own = altered()
    assert altered(normalizer=None) != own
    assert altered("tokenizer_config.json", truncation_side="left") != own
    model = json.loads((builtin_path() / "tokenizer.json").read_text())["model"]
    assert altered(model={**model, "max_input_chars_per_word": 7}) != own
