"""`register` makes "gte" known to an older transformers, and changes nothing in one that knows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from environments import Unavailable, interpreter
from gte_deploy.integrations.transformers import register

ROOT = Path(__file__).resolve().parents[2]


def _run(python: str | Path, code: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([python, "-c", code], env=variables, capture_output=True, text=True, check=True).stdout


def test_it_does_nothing_where_transformers_knows_gte() -> None:
    transformers = pytest.importorskip("transformers")
    before = type(transformers.AutoConfig.for_model("gte"))
    register()
    assert type(transformers.AutoConfig.for_model("gte")) is before is transformers.GteConfig


def test_the_import_loads_no_library() -> None:
    loaded = _run(sys.executable, "import sys, gte_deploy.integrations.transformers; print(*sys.modules)").split()
    assert not {"torch", "transformers", "numpy"} & set(loaded)


@pytest.mark.consumers
@pytest.mark.parametrize("environment", ["onnx", "openvino", "infinity"])
def test_an_older_transformers_reads_the_config_of_a_bundle(environment: str, tmp_path: Path) -> None:
    try:
        python = interpreter(environment)
    except Unavailable as error:
        pytest.skip(f"register in {environment}: {error}")
    (tmp_path / "config.json").write_text('{"model_type": "gte", "hidden_size": 256, "id2label": {"0": "yes"}}')
    code = f"""
from transformers import AutoConfig
from gte_deploy.integrations.transformers import register
try:
    AutoConfig.from_pretrained({str(tmp_path)!r})
except ValueError:
    print("unknown")
register()
register()
config = AutoConfig.from_pretrained({str(tmp_path)!r})
print(config.model_type, config.hidden_size, config.num_labels)
"""
    assert _run(python, code).splitlines() == ["unknown", "gte 256 1"]
