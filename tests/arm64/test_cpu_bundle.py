"""The CPU bundle on ARM64: the files that x86 exported give the same answers on emulated ARM CPUs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arm64

pytestmark = [pytest.mark.arm64, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("answers.py")


@pytest.fixture(scope="session")
def machine() -> Path:
    """The folder of the emulated machine."""
    if platform.machine() != "x86_64":
        pytest.skip(f"compares ARM64 with x86_64, and this machine is {platform.machine()}")
    try:
        return arm64.installed()
    except arm64.Unavailable as error:
        pytest.skip(f"no emulated ARM64 here: {error}")


def read(output: Path) -> dict[str, Any]:
    with np.load(output) as arrays:
        return {**arrays, **json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module", params=["fp32", "int8"])
def on_x86(request, machine, tmp_path_factory) -> tuple[str, Path, dict[str, Any]]:
    """The precision, the bundle of the built-in model, and its answers on this machine."""
    for module in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(module)
    from gte_deploy.exporters.export import export

    folder = tmp_path_factory.mktemp(request.param)
    export(None, folder / "bundle", precision=request.param, max_length=512)
    command = [sys.executable, SCRIPT, folder / "bundle", "onnx", folder / "here.npz"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(arm64.ROOT)})
    return request.param, folder / "bundle", read(folder / "here.npz")


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return np.einsum("ij,ij->i", a, b) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("cpu", arm64.CPUS)
def test_the_answers_are_those_of_x86(on_x86, machine, cpu, tmp_path):
    precision, bundle, expected = on_x86
    log = tmp_path / "instructions.log"
    arm64.run(machine, cpu, log, SCRIPT, bundle, "auto", tmp_path / "there.npz")
    found = read(tmp_path / "there.npz")
    assert (expected["machine"], found["machine"]) == ("x86_64", "aarch64")
    assert found["backend"] == expected["backend"] == "onnx"
    for name in ("embeddings", "alone", "scores"):
        largest = float(np.abs(found[name] - expected[name]).max())
        lowest = float(cosines(found[name], expected[name]).min())
        print(f"{precision} on {cpu}: {name}: largest difference {largest:.2g}, lowest cosine {lowest:.8f}")
        assert lowest >= (0.999999 if precision == "fp32" else 0.9999)
        assert precision == "int8" or largest <= 1e-5
    assert found["words"] == expected["words"]
    assert len(found["words"]) == 4
    # So each kind of CPU runs other code in an INT8 graph.
    products = {each.int8_products for each in arm64.CPUS.values() if arm64.reaches(log, *each.int8_products)}
    assert precision == "fp32" or products == {arm64.CPUS[cpu].int8_products}
