"""One traced graph for all fusion tests; each takes its own copy, alters it, fuses it, runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from transformers import GteConfig  # noqa: E402

from gte_deploy.core.errors import ExportError  # noqa: E402
from gte_deploy.exporters.graph import fusion  # noqa: E402
from gte_deploy.exporters.graph.trace import trace  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.families.gte import GTE  # noqa: E402

LAYERS = 2


def sites(layers: int = LAYERS) -> Mapping[str, int]:
    """How often each pass must fire on a graph of GTE with so many layers."""
    return GTE.sites(GteConfig(num_hidden_layers=layers))


@pytest.fixture
def fuse() -> Callable[..., dict[str, int]]:
    """`fuse(model, layers=2, passes=PASSES)`: fuse a graph of GTE; how often each pass fired."""

    def run(
        model: ir.Model, *, layers: int = LAYERS, passes: Sequence[fusion.FusionPass] = fusion.PASSES
    ) -> dict[str, int]:
        return fusion.fuse_graph(model, sites=sites(layers), passes=passes)

    return run


@pytest.fixture(scope="session")
def torch_model(golden_dir: Path) -> Any:
    return load_model(golden_dir / "mlm", task="fill-mask")


@pytest.fixture(scope="session")
def traced_proto(torch_model: Any) -> Any:
    traced = trace(torch_model, task="fill-mask", max_length=8192, pooling=None, logits="masked", opset=20)
    return ir.to_proto(traced)


@pytest.fixture
def plain(traced_proto: Any) -> ir.Model:
    """The traced golden fill-mask model, 2 layers; to be altered."""
    return ir.from_proto(traced_proto)


@pytest.fixture
def apply() -> Callable[..., list[tuple[int, list[str]]]]:
    """`apply(model, "rope", passes=None)`: run the passes up to and including the one named; that one's result."""

    def run(model: ir.Model, last: str, passes: Sequence[fusion.FusionPass] | None = None) -> tuple[int, list[str]]:
        for each in passes or fusion.MERGED_PASSES:
            result = each(model)
            if each.name == last:
                return result
        raise KeyError(last)

    return run


@pytest.fixture
def refused() -> Callable[..., str]:
    """`refused(model)`: fuse a graph that must be refused; the message."""

    def run(
        model: ir.Model, *, layers: int = LAYERS, passes: Sequence[fusion.FusionPass] = fusion.MERGED_PASSES
    ) -> str:
        with pytest.raises(ExportError) as caught:
            fusion.fuse_graph(model, sites=sites(layers), passes=passes)
        return str(caught.value)

    return run


def make_feeds(rows: int = 3, tokens: int = 40, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids, ragged padding on the right, two masks."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, tokens - np.arange(rows) * max(1, tokens // (rows + 1)))
    return {
        "input_ids": rng.integers(5, 256, (rows, tokens)),
        "attention_mask": (np.arange(tokens)[None] < lengths[:, None]).astype(np.int64),
        "mask_positions": np.array([[0, tokens // 2], [rows - 1, 0]]),
    }


def run_graph(model: ir.Model, inputs: dict[str, np.ndarray], *, optimise: bool = True) -> Sequence[np.ndarray]:
    """The hidden states, and then the other outputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = sorted((str(value.name) for value in model.graph.outputs), key=lambda name: name != "last_hidden_state")
    return session.run(names, inputs)


@pytest.fixture
def feeds() -> Callable[..., dict[str, np.ndarray]]:
    return make_feeds


@pytest.fixture
def run() -> Callable[..., Sequence[np.ndarray]]:
    """`run(model, feeds, optimise=True)`: the graph's outputs from ONNX Runtime."""
    return run_graph


@pytest.fixture
def same_function(traced_proto: Any) -> Callable[..., None]:
    """`same_function(model)`: the graph computes what the traced one does, with and without the runtime's own fusions.

    The bounds are PyTorch's own distance from float64 on this model: 2.5e-5 in hidden states at 2,000 tokens, 1.2e-4
    in logits (of order 10, behind the head's LayerNorm). A wrong graph is off by 0.1 and more.
    """

    def check(model: ir.Model, *, lengths: Sequence[int] = (1, 2, 40)) -> None:
        reference = ir.from_proto(traced_proto)
        for tokens in lengths:
            inputs = make_feeds(1 if tokens == 1 else 3, tokens)
            real = inputs["attention_mask"].astype(bool)
            hidden, logits = run_graph(reference, inputs)
            for optimise in (True, False):
                found_hidden, found_logits = run_graph(model, inputs, optimise=optimise)
                np.testing.assert_allclose(found_hidden[real], hidden[real], rtol=0, atol=5e-5)
                np.testing.assert_allclose(found_logits, logits, rtol=0, atol=2e-4)

    return check


@pytest.fixture
def kinds() -> Callable[[ir.Model], list[str]]:
    """`kinds(model)`: operator types in order."""
    return lambda model: [node.op_type for node in model.graph]


@pytest.fixture
def find() -> Callable[..., ir.Node]:
    """`find(model, "Softmax", 1)`: the n-th node of an operator."""
    return lambda model, kind, index=0: [node for node in model.graph if node.op_type == kind][index]
