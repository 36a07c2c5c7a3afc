"""Imports files that are in no package: tools, benchmarks, the models of a Triton repository, the tests' families."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_file(file: Path, name: str) -> ModuleType:
    """Run a Python file as a new module; `sys.modules` has it only while it runs."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
