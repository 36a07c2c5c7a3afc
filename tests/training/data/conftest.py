"""The tokenizer that the tests of text use."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, factories: ModuleType) -> Path:
    """A folder with a tokenizer.json of 256 words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    factories.write_tokenizer(folder)
    return folder
