"""Families of the tests, registered as a file and a line of the package would register them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gte_deploy.models import families
from loading import load_file


@pytest.fixture
def register_family(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Registers the family that a file beside this one defines, such as ("bert", "BERT"), and returns it."""

    def register(model_type: str, constant: str) -> Any:
        name = f"gte_deploy.models.families.{model_type}"
        loaded = load_file(Path(__file__).with_name(f"{model_type}.py"), name)
        monkeypatch.setitem(sys.modules, name, loaded)
        monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, model_type: f"{model_type}:{constant}"})
        return getattr(loaded, constant)

    return register
