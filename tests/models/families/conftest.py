"""Families of the tests, registered as a file and a line of the package would register them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gte_deploy.models import families


@pytest.fixture(scope="session")
def module_beside() -> Callable[..., ModuleType]:
    """Imports a file beside this one, under the name given."""

    def load(file: str, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


@pytest.fixture
def register_family(
    monkeypatch: pytest.MonkeyPatch, module_beside: Callable[..., ModuleType]
) -> Callable[[str, str], Any]:
    """Registers the family that a file beside this one defines, such as ("bert", "BERT"), and returns it."""

    def register(model_type: str, constant: str) -> Any:
        name = f"gte_deploy.models.families.{model_type}"
        loaded = module_beside(f"{model_type}.py", name)
        monkeypatch.setitem(sys.modules, name, loaded)
        monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, model_type: f"{model_type}:{constant}"})
        return getattr(loaded, constant)

    return register
