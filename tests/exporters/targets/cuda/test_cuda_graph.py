"""The CUDA graph: against PyTorch on the CPU where its operators exist there, and through operators written from their
documentation where they do not; on a GPU the real ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402
from transformers import GteConfig  # noqa: E402

from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.onnxruntime import OnnxBackend  # noqa: E402
from gte_deploy.core.errors import ExportError, InputError  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, graph_of, save_graph  # noqa: E402
from gte_deploy.exporters.graph.fusion import fuse_graph  # noqa: E402
from gte_deploy.exporters.graph.fusion.padding import remove_padding  # noqa: E402
from gte_deploy.exporters.graph.trace import trace  # noqa: E402
from gte_deploy.exporters.targets.cuda.graph import cuda_graph  # noqa: E402
from gte_deploy.exporters.targets.cuda.target import CudaOptions, CudaTarget  # noqa: E402
from gte_deploy.exporters.verification.emulation import cpu_emulation  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.families.gte import GTE  # noqa: E402

TASKS: dict[str, dict[str, Any]] = {
    "mlm": {"task": "fill-mask"},
    "all": {"task": "fill-mask", "logits": "all"},
    "embed": {"task": "embed", "pooling": "mean"},
    "rerank": {"task": "classify"},
}
FOLDERS = {"mlm": "mlm", "all": "mlm", "embed": "embed_ntk", "rerank": "rerank"}
LAYERS = 2
SITES = GTE.sites(GteConfig(num_hidden_layers=LAYERS))
# Two FP32 runs of these ill-conditioned random models differ by this much; see test_graph.py.
HIDDEN_ATOL, HEAD_ATOL = 1e-4, 3e-4


@pytest.fixture(scope="module")
def models(golden_dir: Path) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = load_model(golden_dir / FOLDERS[name], task=TASKS[name]["task"])
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def traced(models: Callable[[str], Any]) -> Callable[[str], ir.Model]:
    """`traced("mlm")`: a copy of the trace, whose weights are the model's own. Tracing is nine tenths of the time."""
    kept: dict[str, ir.Model] = {}

    def get(name: str) -> ir.Model:
        if name not in kept:
            options = {"pooling": None, "logits": "masked", **TASKS[name]}
            kept[name] = trace(models(name), max_length=8192, opset=20, **options)
        return kept[name].clone()

    return get


@pytest.fixture(scope="module")
def graphs(models: Callable[[str], Any], traced: Callable[[str], ir.Model]) -> Callable[..., Graph]:
    """`graphs("mlm", "fp16", "remove")`; made once."""
    built: dict[tuple[str, ...], Graph] = {}

    def get(name: str, precision: str = "fp32", padding: str = "auto") -> Graph:
        key = (name, precision, padding)
        if key not in built:
            removes = padding == "remove" or (padding == "auto" and precision == "fp16")
            plain = graph_of(traced(name), {}, 20)
            built[key] = cuda_graph(plain, sites=SITES, precision=precision, removes_padding=removes)
        return built[key]

    return get


def feeds_of(rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Random ids, ragged padding on the right, a mask in every row."""
    rng = np.random.default_rng(tokens)
    lengths = np.maximum(1, tokens - np.arange(rows) * max(1, tokens // (rows + 1)))
    return {
        "input_ids": rng.integers(5, 256, (rows, tokens)),
        "attention_mask": (np.arange(tokens)[None] < lengths[:, None]).astype(np.int64),
        "mask_positions": np.stack([np.arange(rows), lengths - 1], axis=1),
    }


def reference(model: Any, name: str, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [B, S, H], and the task's other output, of transformers' own module in FP32."""
    ids, mask = torch.from_numpy(feeds["input_ids"]), feeds["attention_mask"]
    with torch.no_grad():
        outputs = model(
            input_ids=ids, attention_mask=torch.from_numpy(mask), output_hidden_states=True, return_dict=True
        )
    hidden = outputs.hidden_states[-1].numpy()
    if name == "embed":
        return hidden, (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    logits = outputs.logits.numpy()
    return hidden, logits[tuple(feeds["mask_positions"].T)] if name == "mlm" else logits


def hidden_first(graph: Graph) -> list[str]:
    names = [tensor.name for tensor in graph.outputs]
    return sorted(names, key=lambda name: name != "last_hidden_state")


def run_on_cpu(graph: Graph, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return session.run(hidden_first(graph), {spec.name: feeds[spec.name] for spec in graph.inputs})


def assert_close(
    found: Any, expected: Any, name: str, feeds: dict[str, np.ndarray], hidden: float, head: float
) -> None:
    real = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=0, atol=hidden)
    pair = (found[1][real], expected[1][real]) if name == "all" else (found[1], expected[1])
    np.testing.assert_allclose(*pair, rtol=0, atol=head)


# --- operators of com.microsoft, from docs/ContribOperators.md ------------------------------------------------------


class RemovePadding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, counts):  # type: ignore[no-untyped-def]
        rows, length = x.shape[:2]
        tokens = [row * length + i for row in range(rows) for i in range(counts[row])]
        padding = [row * length + i for row in range(rows) for i in range(counts[row], length)]
        offset = np.array(tokens + padding, np.int32).reshape(rows, length)
        cumulated = np.cumsum([0, *counts]).astype(np.int32)
        return x.reshape(rows * length, -1)[tokens], offset, cumulated, np.array([max(counts)], np.int32)


class RestorePadding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, offset):  # type: ignore[no-untyped-def]
        restored = np.zeros((offset.size, x.shape[1]), x.dtype)
        restored[offset.ravel()[: len(x)]] = x
        return (restored.reshape(*offset.shape, -1),)


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int, scale: float) -> np.ndarray:
    """[T, N*D], [T, N*D], [T, N*E] -> [T, N*E], with FP32 scores and sums, as the kernels have them."""
    q, k, v = (each.astype(np.float32).reshape(len(each), heads, -1).transpose(1, 0, 2) for each in (query, key, value))
    scores = scale * q @ k.transpose(0, 2, 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    return mixed.transpose(1, 0, 2).reshape(len(query), -1).astype(query.dtype)


class PackedMultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, query, key, value, bias, offset, cumulated, num_heads=None, scale=None, **rest):  # type: ignore[no-untyped-def]
        assert bias is None and cumulated[-1] == len(query) and cumulated.dtype == offset.dtype == np.int32
        texts = [slice(*ends) for ends in zip(cumulated[:-1], cumulated[1:], strict=True)]
        parts = [attend(query[text], key[text], value[text], num_heads, scale) for text in texts]
        return (np.concatenate(parts),)


class MultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, query, key, value, num_heads=None, scale=None, **rest):  # type: ignore[no-untyped-def]
        return (np.stack([attend(*text, num_heads, scale) for text in zip(query, key, value, strict=True)]),)


class RotaryEmbedding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, positions, cos, sin, num_heads=None, interleaved=None, **rest):  # type: ignore[no-untyped-def]
        assert interleaved == 0 and x.ndim == 3 and positions.shape == x.shape[:2]
        lower, upper = np.split(x.reshape(*x.shape[:2], num_heads, -1), 2, axis=-1)
        c, s = (table[positions][:, :, None] for table in (cos, sin))
        return (np.concatenate([lower * c - upper * s, upper * c + lower * s], axis=-1).reshape(x.shape),)


class Gelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, **rest):  # type: ignore[no-untyped-def]
        return (torch.nn.functional.gelu(torch.from_numpy(x)).numpy(),)


OPERATORS = [RemovePadding, RestorePadding, PackedMultiHeadAttention, MultiHeadAttention, RotaryEmbedding, Gelu]


def evaluate(graph: Graph, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The graph through onnx's reference implementation and the operators above."""
    session = ReferenceEvaluator(ir.to_proto(graph.model), new_ops=OPERATORS)
    return session.run(hidden_first(graph), {spec.name: feeds[spec.name] for spec in graph.inputs})


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 40)])
def test_padded_fp32_equals_pytorch_on_the_cpu_provider(graphs, models, name, rows, tokens):
    feeds = feeds_of(rows, tokens)
    found = run_on_cpu(graphs(name, "fp32", "keep"), feeds)
    assert_close(found, reference(models(name), name, feeds), name, feeds, HIDDEN_ATOL, HEAD_ATOL)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 40)])
def test_padding_free_fp32_equals_pytorch(graphs, models, name, rows, tokens):
    feeds = feeds_of(rows, tokens)
    expected = reference(models(name), name, feeds)
    graph = graphs(name, "fp32", "remove")
    for found in (evaluate(graph, feeds), run_on_cpu(cpu_emulation(graph), feeds)):
        assert_close(found, expected, name, feeds, HIDDEN_ATOL, HEAD_ATOL)
        assert not found[0][feeds["attention_mask"] == 0].any(), "padding comes back as zeros"


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_far_positions(graphs, models, padding):
    feeds = feeds_of(2, 2500)
    found = run_on_cpu(cpu_emulation(graphs("mlm", "fp32", padding)), feeds)
    # FP32 rounds the angles of far positions, alike on both sides.
    assert_close(found, reference(models("mlm"), "mlm", feeds), "mlm", feeds, 5e-4, 2e-3)


@pytest.mark.parametrize(
    ("precision", "padding", "bound"),
    [("fp16", "remove", 0.02), ("fp16", "keep", 0.02), ("bf16", "keep", 0.15)],
)
@pytest.mark.parametrize("name", ["mlm", "embed", "rerank"])
def test_half_precision_is_near_pytorch(graphs, models, name, precision, padding, bound):
    feeds = feeds_of(3, 40)
    expected = reference(models(name), name, feeds)
    found = run_on_cpu(cpu_emulation(graphs(name, precision, padding)), feeds)
    exact = run_on_cpu(cpu_emulation(graphs(name, "fp32", padding)), feeds)
    real = feeds["attention_mask"].astype(bool)
    off = np.abs(found[0][real] - expected[0][real]).max()
    assert np.abs(exact[0][real] - expected[0][real]).max() < off < bound * np.abs(expected[0]).max()
    assert all(output.dtype == np.float32 for output in found)


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_the_stand_in_rounds_as_half_precision_does(graphs, padding):
    """onnx's reference runs the FP16 graph in FP16 itself; the stand-in is as far from it as two FP16 runs are."""
    feeds = feeds_of(3, 20)
    graph = graphs("mlm", "fp16", padding)
    found, expected = run_on_cpu(cpu_emulation(graph), feeds), evaluate(graph, feeds)
    real = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=0, atol=0.05)


def test_the_stand_in_overflows_where_fp16_does(graphs, models, tmp_path):
    """Values beyond 65,504 in the gated unit: FP32 holds them, FP16 does not, and the proof must fail."""
    graph = graphs("mlm", "fp16")
    up = models("mlm").gte.layers[0].mlp.up_proj.weight
    feeds = feeds_of(1, 8)
    before = up.detach().clone()
    try:
        with torch.no_grad():
            up.mul_(2e5 / up.abs().max())
            up.clamp_(-6e4, 6e4)
        assert not np.isfinite(run_on_cpu(cpu_emulation(graph), feeds)[0]).all()
        with torch.no_grad():
            up.mul_(2)
        with pytest.raises(ExportError, match=r"up_gate_proj.*FLOAT16 cannot hold.*bf16"):
            save_graph(graph, tmp_path / "model.onnx")
    finally:
        with torch.no_grad():
            up.copy_(before)


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_a_row_is_the_same_in_any_batch(graphs, padding):
    feeds = feeds_of(3, 30)
    graph = cpu_emulation(graphs("embed", "fp16", padding))
    together = run_on_cpu(graph, feeds)
    changed = np.where(feeds["attention_mask"] == 1, feeds["input_ids"], 77)
    again = run_on_cpu(graph, {**feeds, "input_ids": changed})
    length = int(feeds["attention_mask"][2].sum())
    alone = run_on_cpu(graph, {name: value[2:, :length] for name, value in feeds.items()})
    np.testing.assert_allclose(again[1], together[1], rtol=0, atol=0)
    np.testing.assert_allclose(alone[1][0], together[1][2], rtol=0, atol=5e-3)


# --- the form -------------------------------------------------------------------------------------------------------


def kinds(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.model.graph]


@pytest.mark.parametrize(
    ("precision", "padding"),
    [("fp32", "keep"), ("fp32", "remove"), ("fp16", "remove"), ("fp16", "keep"), ("bf16", "keep")],
)
def test_operators_and_counts(graphs, precision, padding):
    graph = graphs("mlm", precision, padding)
    found = kinds(graph)
    attention = "MultiHeadAttention" if padding == "keep" else "PackedMultiHeadAttention"
    assert found.count(attention) == LAYERS and found.count("RotaryEmbedding") == 2 * LAYERS
    assert "Softmax" not in found and "SkipLayerNormalization" not in found
    assert [found.count(name) for name in ("RemovePadding", "RestorePadding")] == [padding == "remove"] * 2
    named = "packed_attention" if padding == "remove" else "flash"
    counts = {"rope": 2, "attention": 1, "qkv": 1, "up_gate": 1, "glu": 1, "skip_layer_norm": 2, named: 1}
    assert {name: n for name, n in graph.fusions.items() if name != "half_weights"} == {
        name: n * LAYERS for name, n in counts.items()
    }
    assert ("half_weights" in graph.fusions) == (precision != "fp32")
    # One GEMM for queries, keys and values, one for up and gate, one behind each; the head has its two.
    assert found.count("Gemm") + found.count("MatMul") == 4 * LAYERS + 2


def test_flash_attention_has_no_mask_and_heads_of_one_size(graphs):
    for node in graphs("mlm", "fp16", "keep").model.graph:
        if node.op_type == "MultiHeadAttention":
            assert len(node.inputs) == 3
            targets = [value.producer().inputs[1].const_value.numpy().tolist() for value in node.inputs]
            assert targets == [[0, 0, 4 * (8 + 8)]] * 3
            assert node.attributes["scale"].value == pytest.approx(8**-0.5)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)])
def test_weights_and_activations_are_half(graphs, models, precision, dtype):
    graph = graphs("embed", precision)
    assert {spec.dtype for spec in graph.inputs} == {"int64"} and {spec.dtype for spec in graph.outputs} == {"float32"}
    for value in graph.model.graph.initializers.values():
        assert value.dtype != ir.DataType.FLOAT or value.const_value.size <= 4 * 8, value.name
    for node in graph.model.graph:
        if node.op_type in ("Gemm", "Gelu", "LayerNormalization", "RotaryEmbedding", "MultiHeadAttention"):
            assert {value.dtype for value in (*node.inputs, *node.outputs) if value and value.dtype != 7} == {dtype}
    pooling = next(node for node in graph.model.graph if node.op_type == "MatMul" and "up_gate" not in node.name)
    assert {value.dtype for value in pooling.inputs} == {ir.DataType.FLOAT}, "sums of thousands of tokens are FP32"

    rotary = models("embed").rotary_emb
    cos, _ = rotary(torch.zeros(()), torch.arange(8192)[None])
    table = next(node for node in graph.model.graph if node.op_type == "RotaryEmbedding").inputs[2].const_value
    rounded = cos[0, :, : table.shape[1]].to(torch.float16 if precision == "fp16" else torch.bfloat16)
    np.testing.assert_array_equal(table.numpy().astype(np.float32), rounded.float().numpy())


@pytest.mark.parametrize(
    ("precision", "padding"), [("fp32", "remove"), ("fp16", "remove"), ("fp16", "keep"), ("bf16", "keep")]
)
def test_types_and_shapes_are_accepted(graphs, tmp_path, precision, padding):
    """By onnx's checker, and by ONNX Runtime, which infers all types before it looks for kernels that a CPU lacks."""
    graph = graphs("all", precision, padding)
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    runs = (precision, padding) == ("fp16", "keep")
    try:
        session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.NotImplemented as error:
        assert not runs and ("RemovePadding" in str(error)) == (padding == "remove")
    else:
        assert runs
        assert [value.shape for value in session.get_outputs()] == [
            ["batch", "sequence", 256],
            ["batch", "sequence", 32],
        ]


def test_the_runtime_fuses_no_sum_into_layer_norm(graphs, tmp_path):
    """Its SkipLayerNormalization may sum in FP16 on CUDA; the same optimizer runs there."""
    save_graph(graphs("mlm", "fp32", "keep"), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert left.count("LayerNormalization") >= 2 * LAYERS and "SkipLayerNormalization" not in left


def test_precision_and_padding_go_together():
    def removes(precision: Any, padding: Any) -> bool:
        target = CudaTarget(CudaOptions(padding))
        target.check(precision)
        return target.removes_padding(precision)

    assert removes("fp16", "auto") and removes("fp32", "remove")
    assert not removes("bf16", "auto") and not removes("fp32", "auto")
    with pytest.raises(InputError, match="fp16 and fp32 only"):
        removes("bf16", "remove")
    with pytest.raises(InputError, match="expected one of auto, keep, remove"):
        removes("fp16", "some")


def test_padding_is_not_removed_from_another_graph(traced):
    model = traced("mlm")
    fuse_graph(model, sites=SITES)  # queries, keys and values apart: made for a CPU
    with pytest.raises(ExportError, match=r"padding cannot be removed.*not Split"):
        remove_padding(model)


# --- a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "padding", "bound"),
    [
        ("fp32", "keep", 1e-3),
        ("fp32", "remove", 1e-3),
        ("fp16", "remove", 0.02),
        ("fp16", "keep", 0.02),
        ("bf16", "keep", 0.15),
    ],
)
def test_cuda_equals_pytorch(graphs, models, golden_dir, tmp_path, precision, padding, bound):
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    save_graph(graphs("mlm", precision, padding), tmp_path / "model.onnx")
    folder = golden_dir / "mlm"
    model = models("mlm")
    backend = OnnxBackend(tmp_path / "model.onnx", describe(folder, task="fill-mask").spec, device="cuda")
    for rows, tokens in ((1, 1), (1, 128), (3, 40), (8, 512), (2, 2048), (1, 8192)):
        feeds = feeds_of(rows, tokens)
        expected, logits = reference(model, "mlm", feeds)
        found = backend.run(Batch(**feeds), ("last_hidden_state", "logits"))
        real = feeds["attention_mask"].astype(bool)
        off = np.abs(found["last_hidden_state"][real] - expected[real]).max()
        assert off < bound * np.abs(expected).max(), (rows, tokens)
        assert np.abs(found["logits"] - logits).max() < bound * np.abs(logits).max(), (rows, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "padding"), [("fp16", "keep"), ("fp16", "remove"), ("bf16", "keep")])
def test_the_flash_kernel_is_taken(graphs, tmp_path, precision, padding):
    """ONNX Runtime tells the kernel of each attention where ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO is set."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    save_graph(graphs("mlm", precision, padding), tmp_path / "model.onnx")
    script = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "session = ort.InferenceSession(sys.argv[1], providers=['CUDAExecutionProvider'])\n"
        "ids = np.ones((2, 600), np.int64)\n"
        "session.run(None, {'input_ids': ids, 'attention_mask': ids, 'mask_positions': np.zeros((0, 2), np.int64)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")],
        env={**os.environ, "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Operator=")]
    assert len(lines) == LAYERS
    assert all(re.search(r"\b(CUDNN_)?FLASH_ATTENTION", line) for line in lines), lines
