"""The shipped model as graphs for TensorRT, traced once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.core.spec import ModelSpec  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs, save_graph  # noqa: E402
from gte_deploy.exporters.quantization.calibration import measure_amax, measure_ranges  # noqa: E402
from gte_deploy.exporters.quantization.int8 import int8_scheme  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.graph import QdqScheme, tensorrt_graph  # noqa: E402
from gte_deploy.exporters.verification.texts import builtin_texts, text_batches  # noqa: E402
from gte_deploy.models import resolve_checkpoint  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.families import fusion_sites  # noqa: E402
from gte_deploy.text.tokenization import load_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def model() -> Any:
    return load_model(resolve_checkpoint(None), task="fill-mask")


@pytest.fixture(scope="session")
def spec(model: Any) -> ModelSpec:
    config = model.config
    return ModelSpec("fill-mask", 8192, config.vocab_size, config.hidden_size, config.pad_token_id)


@pytest.fixture(scope="session")
def num_layers(model: Any) -> int:
    return model.config.num_hidden_layers


@pytest.fixture(scope="session")
def sites(model: Any) -> Mapping[str, int]:
    """How often each pass must fire on a graph of the model."""
    return fusion_sites(model)


@pytest.fixture(scope="session")
def plain(model: Any) -> dict[str, Graph]:
    """Engine -> its FP32 graph; not to be altered."""
    return build_graphs(model, task="fill-mask", max_length=8192)


@pytest.fixture(scope="session")
def calibrate(spec: ModelSpec) -> Any:
    """`calibrate(plain)(kind)`: every GEMM of the layers quantized, calibrated on a little text."""
    tokenizer = load_tokenizer(resolve_checkpoint(None))
    texts = builtin_texts("calibration")[:30]

    def schemes(plain: Mapping[str, Graph]) -> Any:
        batches = [batch for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=600)]
        fp32 = plain["onnxruntime"]
        ranges = measure_ranges(fp32, spec, batches)
        base = int8_scheme(fp32.model, ranges)
        amax = measure_amax(fp32, spec, batches, ranges, smoothing=base.smoothing, calibrator="max")
        return lambda kind: QdqScheme(kind, amax, base.smoothing, base.excluded | {"lm_head.decoder.weight"})

    return schemes


@pytest.fixture(scope="session")
def plan(plain: Any, calibrate: Any) -> Any:
    """`plan(kind)` for the shipped model; see `calibrate`."""
    return calibrate(plain)


@pytest.fixture(scope="session")
def graphs(plain: Any, plan: Any, sites: Mapping[str, int]) -> Any:
    """`graphs(precision)`: what TensorRT compiles."""
    made: dict[str, Graph] = {}

    def graph(precision: str) -> Graph:
        if precision not in made:
            quantized = plan(precision) if precision in ("int8", "fp8") else None
            made[precision] = tensorrt_graph(plain["openvino"], precision, sites=sites, scheme=quantized)
        return made[precision]

    return graph


@pytest.fixture(scope="session")
def saved(graphs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`saved(precision)`: the file."""
    folder = tmp_path_factory.mktemp("onnx")

    def save(precision: str) -> Path:
        file = folder / f"{precision}.onnx"
        if not file.exists():
            save_graph(graphs(precision), file)
        return file

    return save


@pytest.fixture(scope="session")
def make_batch(spec: ModelSpec) -> Any:
    """`make_batch(rows, length)`: random ids, the last rows shorter, a mask in each row."""

    def batch(rows: int, length: int) -> Batch:
        ids = np.random.default_rng(length).integers(1000, 20_000, (rows, length))
        mask = (np.arange(length) < np.linspace(length, length // 2 + 1, rows)[:, None]).astype(np.int64)
        return Batch(ids, mask, np.array([[row, length // 4] for row in range(rows)]))

    return batch
