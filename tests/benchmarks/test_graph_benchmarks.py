"""The benchmarks of graphs: the variants on OpenVINO are one function, and a profile covers the whole run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def folder_of_benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def profile() -> ModuleType:
    return importlib.import_module("profile_graphs")


@pytest.fixture(scope="module")
def attention() -> ModuleType:
    return importlib.import_module("openvino_attention")


@pytest.fixture(scope="module")
def bundle(word_checkpoints: dict[str, Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(word_checkpoints["embed"])


@pytest.mark.parametrize("variant", ["sdpa", "folded", "folded-at-need"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_variant_is_the_same_function(attention: ModuleType, bundle: Path, variant: str, padded: bool):
    requests = [
        attention.compiled_request(bundle / "onnx/model_openvino.onnx", name, 1, "fp32") for name in ("plain", variant)
    ]
    inputs = attention.feeds(requests[0], 3, 20)
    if padded:
        inputs["attention_mask"][1, 12:] = 0
    plain, found = (np.array(request.infer(inputs)[0]) for request in requests)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
    inputs["attention_mask"][0, 5:] = 0
    assert np.abs(np.array(requests[1].infer(inputs)[0]) - found)[0].max() > 1e-3, "the variant ignores the mask"


def test_a_profile_is_printed_and_written(profile: ModuleType, bundle: Path, tmp_path: Path, capsys: Any):
    file = tmp_path / "profile.json"
    options = ["--shapes", "2x16", "--repeats", "2", "--threads", "1", "--json", str(file)]
    assert profile.main([str(bundle), *options]) == 0
    lines = json.loads(file.read_text())["lines"]
    for engine in ("onnx", "openvino"):
        kinds = {line["kind"]: line for line in lines if line["engine"] == engine}
        assert sum(line["share"] for line in kinds.values()) == pytest.approx(1)
        assert {"matrix products", "attention", "LayerNorm"} <= set(kinds)
        assert 0 < kinds["matrix products"]["of_peak"] < 2
    assert "| onnx | 2x16 | matrix products |" in capsys.readouterr().out
