"""The tokenizer that the tests of text use."""

from __future__ import annotations

from pathlib import Path

import pytest

from factories import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.json of 256 words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder
