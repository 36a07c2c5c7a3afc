"""Graphs that take token types, of each task and engine, against transformers; and the proof that sees them lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from transformers import GteConfig  # noqa: E402

from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.core.errors import ExportError  # noqa: E402
from gte_deploy.core.spec import ModelSpec, TensorSpec  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs, save_graph  # noqa: E402
from gte_deploy.exporters.graph.trace import trace  # noqa: E402
from gte_deploy.exporters.quantization.int8 import quantize_embeddings  # noqa: E402
from gte_deploy.exporters.targets.cuda.graph import cuda_graph  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx, PaddingFreeOnnx  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED, PADDING_FREE, trtexec_line  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.profiles import packed_profiles, parse_profile  # noqa: E402
from gte_deploy.exporters.verification.cases import Case, TokenSource, last_row_alone, make_batch  # noqa: E402
from gte_deploy.exporters.verification.emulation import cpu_emulation  # noqa: E402
from gte_deploy.exporters.verification.parity import Comparison, check_parity  # noqa: E402
from gte_deploy.exporters.verification.reference import TorchReference  # noqa: E402
from gte_deploy.exporters.verification.texts import builtin_texts, text_batches  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.families.gte import GTE  # noqa: E402
from gte_deploy.text.tokenization import load_tokenizer  # noqa: E402

SIZES: dict[str, Any] = {"hidden_size": 32, "heads": 2, "layers": 1, "max_positions": 256, "type_vocab_size": 2}
TASKS: dict[str, dict[str, Any]] = {
    "fill-mask": {"task": "fill-mask"},
    "fill-mask all": {"task": "fill-mask", "logits": "all"},
    "embed mean": {"task": "embed", "pooling": "mean"},
    "embed cls": {"task": "embed", "pooling": "cls"},
    "classify": {"task": "classify"},
    "token-classify": {"task": "token-classify"},
}
SITES = GTE.sites(GteConfig(num_hidden_layers=1))
_SLOW = ("fill-mask all", "embed cls")
ALL_TASKS = [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in TASKS]
TYPES = TensorSpec("token_type_ids", "int64", ("batch", "sequence"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    labels = {"classify": 3, "token-classify": 2}

    def get(task: str) -> Path:
        if task not in made:
            folder = tmp_path_factory.mktemp("typed") / task
            made[task] = make_checkpoint(folder, task=task, layout="native", num_labels=labels.get(task, 1), **SIZES)
        return made[task]

    return get


@pytest.fixture(scope="module")
def models(folders: Callable[[str], Path]) -> Callable[[str], Any]:
    return lambda name: load_model(folders(TASKS[name]["task"]), task=TASKS[name]["task"])


@pytest.fixture(scope="module")
def graphs(models: Callable[[str], Any]) -> Callable[[str], Any]:
    """`graphs("classify")`: engine -> graph; traced once."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = build_graphs(models(name), max_length=256, token_types=True, **TASKS[name])
        return built[name]

    return get


def spec_of(name: str, **fields: Any) -> ModelSpec:
    task = TASKS[name]
    labels = {"classify": 3, "token-classify": 2}.get(task["task"], 0)
    more = {"num_labels": labels, "token_types": True, "type_vocab_size": 2, **fields}
    return ModelSpec(max_length=256, vocab_size=256, hidden_size=32, pad_token_id=0, **{**task, **more})


def batch_of(name: str, lengths: tuple[int, ...] = (40, 17, 1, 33)) -> Batch:
    """Ragged rows of random ids and random types, a mask in each."""
    rng = np.random.default_rng(5)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(5, 256, mask.shape), 0)
    types = rng.integers(0, 2, mask.shape)  # padding as well, where they must not matter
    positions = np.stack([np.arange(len(lengths)), np.array(lengths) - 1], axis=1)
    return Batch(ids, mask, positions if TASKS[name]["task"] == "fill-mask" else None, types)


def by_transformers(model: Any, name: str, batch: Batch, **changed: Any) -> dict[str, np.ndarray]:
    """Hidden states and the task's output of transformers' own module."""
    inputs = {key: torch.from_numpy(getattr(batch, key)) for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        outputs = model(**{**inputs, **changed}, output_hidden_states=True, return_dict=True)
    hidden, mask = outputs.hidden_states[-1].numpy(), batch.attention_mask
    if name.startswith("embed"):
        pooled = hidden[:, 0] if name == "embed cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        return {"last_hidden_state": hidden, "sentence_embedding": pooled}
    logits = outputs.logits.numpy()
    return {
        "last_hidden_state": hidden,
        "logits": logits[tuple(batch.mask_positions.T)] if name == "fill-mask" else logits,
    }


def run(graph: Graph, batch: Batch) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in graph.outputs]
    feed = {tensor.name: getattr(batch, tensor.name) for tensor in graph.inputs}
    return dict(zip(names, session.run(names, feed), strict=True))


def assert_same(found: dict[str, Any], expected: dict[str, Any], batch: Batch, atol: float) -> None:
    real = batch.attention_mask == 1
    for name, values in expected.items():
        by_token = values.ndim == 3
        one, two = (each[name][real] if by_token else each[name] for each in (found, expected))
        np.testing.assert_allclose(one, two, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_takes_types(graphs, models, name, engine):
    graph, batch = graphs(name)[engine], batch_of(name)
    assert TYPES in graph.inputs and graph.inputs[0].name == "input_ids"
    expected = by_transformers(models(name), name, batch)
    assert_same(run(graph, batch), expected, batch, 1e-4)
    without = by_transformers(models(name), name, batch, token_type_ids=None)
    assert np.abs(without["last_hidden_state"] - expected["last_hidden_state"]).max() > 0.3, "types matter here"


def test_the_same_passes_fire(graphs):
    fired = graphs("classify")["onnxruntime"].fusions
    assert fired == {"rope": 2, "attention": 1, "projections": 1, "skip_layer_norm": 2}


@pytest.mark.parametrize(("precision", "padding"), [("fp32", "remove"), ("fp16", "remove"), ("bf16", "keep")])
@pytest.mark.parametrize("name", ["classify", "fill-mask"])
def test_cuda(models, graphs, name, precision, padding):
    """Through the stand-in for operators that a CPU does not have."""
    options = {"precision": precision, "removes_padding": padding == "remove"}
    graph, batch = cuda_graph(graphs(name)["openvino"], sites=SITES, **options), batch_of(name)
    assert TYPES in graph.inputs
    atol = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.15}[precision]
    assert_same(run(cpu_emulation(graph), batch), by_transformers(models(name), name, batch), batch, atol)


@pytest.mark.parametrize("layout", [PADDED, PADDING_FREE])
@pytest.mark.parametrize("name", ALL_TASKS)
def test_tensorrt(graphs, models, tmp_path, name, layout):
    graph, batch = (
        tensorrt_graph(graphs(name)["openvino"], "fp16", sites=SITES, layout=layout),
        batch_of(name),
    )
    spec = spec_of(name)
    if layout is PADDING_FREE:
        assert dataclasses.replace(TYPES, shape=("tokens",)) in graph.inputs
        compiled: Any = PaddingFreeOnnx(graph, spec, profiles=[parse_profile("1x1:2x32:3x64")], num_heads=2)
    else:
        assert TYPES in graph.inputs
        compiled = PaddedOnnx(graph, spec, num_heads=2)
    found = compiled.run(batch, [tensor.name for tensor in graph.outputs])
    compiled.close()
    assert_same(found, by_transformers(models(name), name, batch), batch, 0.02)


def test_profiles_and_the_trtexec_line_have_the_types():
    inputs = [
        TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    line = trtexec_line("m.onnx", [parse_profile("1x1:8x64:16x128")], inputs)
    for end, size in (("min", "1x1"), ("opt", "8x64"), ("max", "16x128")):
        assert f"--{end}Shapes=input_ids:{size},attention_mask:{size},token_type_ids:{size}" in line
    names = ("input_ids", "position_ids", "token_type_ids", "query_lengths", "kv_lengths")
    packed = [TensorSpec(name, "int64", ("tokens",)) for name in names]
    line = trtexec_line("m.onnx", packed_profiles(512)[:1], packed)
    assert "--optShapes=input_ids:256,position_ids:256,token_type_ids:256,query_lengths:3,kv_lengths:3" in line
    packed.pop(2)
    assert "token_type_ids" not in trtexec_line("m.onnx", packed_profiles(512), packed)


def test_tensorrt_rtx_builds_an_engine_of_it(graphs, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    from gte_deploy.exporters.targets.tensorrt.engine import build_plan
    from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
    from gte_deploy.exporters.targets.tensorrt.runtimes import choose_runtime

    graph = tensorrt_graph(graphs("classify")["openvino"], "fp16", sites=SITES)
    save_graph(graph, tmp_path / "model.onnx")
    profiles = [parse_profile("1x1:2x64:4x256")]
    arguments = {"graph": graph, "num_layers": 1, "compute_capabilities": ("8.9",), "profiles": profiles}
    plan = build_plan(tmp_path / "model.onnx", tmp_path, choose_runtime("rtx"), TensorRTOptions(), **arguments)
    assert TYPES in plan.inputs


def test_a_model_without_types_cannot_be_asked_for_them(tmp_path):
    folder = make_checkpoint(tmp_path / "model", task="classify", **{**SIZES, "type_vocab_size": 1})
    arguments = {"task": "classify", "max_length": 256, "pooling": None, "logits": "masked", "opset": 20}
    with pytest.raises(ExportError, match="token types need a type_vocab_size above 1; the model has 1"):
        trace(load_model(folder, task="classify"), token_types=True, **arguments)


def test_the_rows_of_types_stay_as_they_are(graphs):
    """An int8 table of two rows would save nothing; that of words is one."""
    model = graphs("classify")["onnxruntime"].model.clone()
    assert quantize_embeddings(model.graph) == 1
    table = next(name for name in model.graph.initializers if "token_type" in name)
    assert model.graph.initializers[table].dtype == ir.DataType.FLOAT


# --- the proof ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(folders("classify"))


def test_parity_batches_hold_pairs_as_the_tokenizer_makes_them(tokenizer, folders):
    from transformers import AutoTokenizer

    spec, tokens = spec_of("classify"), TokenSource.from_tokenizer(tokenizer)
    batch = make_batch(Case(64, 8, ragged=True), spec, tokens, np.random.default_rng(0), text_first=True)
    theirs = AutoTokenizer.from_pretrained(folders("classify"))
    kinds = []
    for ids, mask, types in zip(batch.input_ids, batch.attention_mask, batch.token_type_ids, strict=True):
        row, given = ids[mask == 1].tolist(), types[mask == 1].tolist()
        assert not types[mask == 0].any() and len(row) == mask.sum()
        first = given.index(1) if 1 in given else len(row)
        kinds.append(first < len(row))
        if kinds[-1]:
            one, two = row[1 : first - 1], row[first:-1]
            expected = theirs(*(" ".join(theirs.convert_ids_to_tokens(text)) for text in (one, two)))
            assert (row, given) == (expected["input_ids"], expected["token_type_ids"])
    assert any(kinds) and not all(kinds)
    alone = last_row_alone(batch)
    np.testing.assert_array_equal(alone.token_type_ids[0], batch.token_type_ids[-1, : alone.input_ids.shape[1]])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_parity_batches_of_few_tokens(tokenizer, length):
    tokens = TokenSource.from_tokenizer(tokenizer)
    batch = make_batch(Case(length), spec_of("classify"), tokens, np.random.default_rng(0), text_first=True)
    assert batch.input_ids.shape == batch.token_type_ids.shape == (1, length)
    untyped = make_batch(
        Case(length), spec_of("classify", token_types=False), tokens, np.random.default_rng(0), text_first=True
    )
    assert untyped.token_type_ids is None


class WithoutTypes:
    """What a graph is that forgets its types."""

    def __init__(self, model: Any) -> None:
        self._right = TorchReference(model, task="classify", pooling="mean", logits="masked")

    def run(self, batch: Batch, outputs: Any) -> Any:
        return self._right.run(dataclasses.replace(batch, token_type_ids=None), outputs)


def test_parity_sees_types_that_are_lost(models, tokenizer):
    model = models("classify")
    right = TorchReference(model, task="classify", pooling="mean", logits="masked")
    report = check_parity(
        right,
        {("onnxruntime", "fp32"): right, ("openvino", "fp32"): WithoutTypes(model)},
        Comparison(
            outputs=["last_hidden_state", "logits"],
            spec=spec_of("classify"),
            precision="fp32",
            tokens=TokenSource.from_tokenizer(tokenizer),
            cases=[Case(17), Case(32, 2, ragged=True)],
        ),
    )
    assert [engine.passed for engine in report.engines] == [True, False]


def test_the_reference_is_fed_types(models):
    model, batch = models("classify"), batch_of("classify")
    found = TorchReference(model, task="classify", pooling="mean", logits="masked").run(batch, [])
    assert_same(found, by_transformers(model, "classify", batch), batch, 1e-5)


def test_calibration_texts_of_a_classifier_hold_pairs(tokenizer):
    texts = builtin_texts("calibration")[:40]
    typed, untyped = (
        text_batches(texts, tokenizer, spec_of("classify", token_types=given), max_tokens=2000)
        for given in (True, False)
    )
    assert all(batch.token_type_ids is None for batch, _ in untyped)
    rows = [
        types[mask == 1]
        for batch, _ in typed
        for types, mask in zip(batch.token_type_ids, batch.attention_mask, strict=True)
    ]
    pairs = [types.any() for types in rows]
    assert any(pairs) and not all(pairs)
    sizes = [sum(int(batch.attention_mask.sum()) for batch, _ in batches) for batches in (typed, untyped)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)
    embed = text_batches(texts, tokenizer, spec_of("embed cls"), max_tokens=2000)
    assert not any(batch.token_type_ids.any() for batch, _ in embed), "single texts of this tokenizer are of type 0"
