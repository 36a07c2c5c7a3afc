"""One golden fill-mask model (2 layers, 32 wide), its two graphs, and the ranges of its layers on text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.core.spec import ModelSpec  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs  # noqa: E402
from gte_deploy.exporters.quantization.calibration import measure_ranges  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402

SPEC = ModelSpec(task="fill-mask", max_length=8192, vocab_size=256, hidden_size=32, pad_token_id=0)


@pytest.fixture(scope="session")
def torch_model(golden_dir: Path) -> Any:
    return load_model(golden_dir / "mlm", task="fill-mask")


@pytest.fixture(scope="session")
def fp32(torch_model: Any) -> dict[str, Graph]:
    """Engine -> its FP32 graph; not to be altered."""
    return build_graphs(torch_model, task="fill-mask", max_length=8192)


@pytest.fixture
def graph(fp32: dict[str, Graph]) -> Any:
    """`graph("openvino")`: a copy of that engine's graph, to be altered."""
    return lambda engine="onnxruntime": fp32[engine].model.clone()


@pytest.fixture(scope="session")
def batches() -> list[Batch]:
    rng = np.random.default_rng(3)
    made = []
    for rows, length in ((1, 5), (3, 40), (1, 200)):
        ids = rng.integers(5, 256, (rows, length))
        mask = (np.arange(length) < np.linspace(length, length // 2 + 1, rows)[:, None]).astype(np.int64)
        made.append(Batch(ids, mask, np.array([[row, 0] for row in range(rows)])))
    return made


@pytest.fixture(scope="session")
def ranges(fp32: dict[str, Graph], batches: list[Batch]) -> Any:
    return measure_ranges(fp32["onnxruntime"], SPEC, batches)


def run_model(model: ir.Model, batch: Batch) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(
        ["last_hidden_state", "logits"],
        {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "mask_positions": batch.mask_positions,
        },
    )


@pytest.fixture
def run() -> Any:
    """`run(model, batch)`: hidden states and logits from ONNX Runtime."""
    return run_model


@pytest.fixture
def cosines() -> Any:
    """`cosines(a, b)`: of the vectors along the last axis."""

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    return cosine


def add_outliers(checkpoint: Path, folder: Path, *, factor: float, channels: Sequence[int]) -> Path:
    """Copy a checkpoint and multiply the gammas of these channels of every LayerNorm by `factor`.

    The result is another model, with outlier channels like those of trained BERT models.
    """
    shutil.copytree(checkpoint, folder)
    weights = load_file(checkpoint / "model.safetensors")
    for name in [name for name in weights if re.search(r"(layer_?norm|_ln|head\.norm)\.weight$", name, re.IGNORECASE)]:
        weights[name] = weights[name].copy()
        weights[name][list(channels)] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def with_outliers() -> Any:
    """`with_outliers(checkpoint, folder, factor=20, channels=(2, 26))`: see `add_outliers`."""
    return add_outliers


@pytest.fixture(scope="session")
def outlier_fp32(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """Like `fp32`, with outlier channels."""
    checkpoint = add_outliers(
        golden_dir / "mlm", tmp_path_factory.mktemp("outliers") / "mlm", factor=20, channels=(2, 26)
    )
    return build_graphs(load_model(checkpoint, task="fill-mask"), task="fill-mask", max_length=8192)
