"""Parts of graphs of every target and precision: against transformers in float64, and which rows their layers compute.

The models have two layers: the first computes all rows in a part too, the last only those that its head reads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402

from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.core.errors import ExportError  # noqa: E402
from gte_deploy.core.spec import ModelSpec, SparseSpec  # noqa: E402
from gte_deploy.exporters.graph.all_logits import all_logits_graph  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs, graph_of, save_graphs  # noqa: E402
from gte_deploy.exporters.graph.parts import parts_of  # noqa: E402
from gte_deploy.exporters.quantization.calibration import measure_amax, measure_ranges  # noqa: E402
from gte_deploy.exporters.quantization.int8 import int8_scheme, quantize_int8  # noqa: E402
from gte_deploy.exporters.quantization.weight_only import quantize_weights  # noqa: E402
from gte_deploy.exporters.targets.cuda.graph import cuda_graph  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.emulation import engine_arithmetic, packed_emulation  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.fp8_attention import measure_attention_amax  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.graph import QdqScheme, tensorrt_graph  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED, PADDING_FREE  # noqa: E402
from gte_deploy.exporters.verification.emulation import cpu_emulation  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.families import fusion_sites  # noqa: E402

HEADS, WIDTH, DENSE_WIDTH, VOCABULARY = 4, 32, 24, 256
TASKS: dict[str, dict[str, Any]] = {
    "cls": {"task": "embed", "pooling": "cls"},
    "dense": {"task": "embed", "pooling": "cls"},
    "rerank": {"task": "classify"},
    "typed": {"task": "classify"},
    "mlm": {"task": "fill-mask"},
}
FP32 = ("plain", "fused", "cuda", "cuda padding-free")
QUANTIZED = ("int8", "int8 dynamic", "int8 openvino", "weights 8", "weights 4")
TENSORRT = ("trt fp16", "trt int8", "trt fp8", "trt padding-free", "trt int8 padding-free")
FORMS = (*FP32, *QUANTIZED, "cuda fp16", *TENSORRT)
# Cosine with float64, from below. Fewer bits cost these tiny random models too much for a bound that says anything.
COSINES = {"cuda fp16": 0.9999, "trt fp16": 0.9999, "trt padding-free": 0.9999, "weights 8": 0.999}
# Sums in another order change the last bits in FP32, and in half precision what these round to.
SAME = {**dict.fromkeys((*FP32, *QUANTIZED), 1e-5), **dict.fromkeys(("cuda fp16", *TENSORRT), 4e-3)}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`model_of("cls")`: a tiny model; loaded once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            task, types = TASKS[name]["task"], {"typed": 2}.get(name, 1)
            folder = tmp_path_factory.mktemp("parts") / name
            sizes = {"hidden_size": WIDTH, "heads": HEADS, "intermediate": 64, "max_positions": 64, "seed": 7}
            make_checkpoint(folder, task=task, num_labels=2, type_vocab_size=types, **sizes)
            made[name] = load_model(folder, task=task)
            if name == "dense":
                torch.manual_seed(1)
                made[name].sentence_projection = torch.nn.Sequential(
                    torch.nn.Linear(WIDTH, DENSE_WIDTH), torch.nn.Tanh()
                )
        return made[name]

    return get


def spec_of(name: str) -> ModelSpec:
    types = {"token_types": True, "type_vocab_size": 2} if name == "typed" else {}
    labels = 2 if TASKS[name]["task"] == "classify" else 0
    return ModelSpec(
        max_length=64,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        pad_token_id=0,
        num_labels=labels,
        embedding_size=DENSE_WIDTH if name == "dense" else None,
        **TASKS[name],
        **types,
    )


@pytest.fixture(scope="module")
def traced(model_of: Any) -> Callable[[str], Any]:
    """`traced("cls")`: engine -> graph; traced once."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = build_graphs(model_of(name), max_length=64, token_types=name == "typed", **TASKS[name])
        return built[name]

    return get


@pytest.fixture(scope="module")
def calibrated(traced: Any) -> Callable[[str], Any]:
    """`calibrated("cls")`: the scheme of INT8, and the magnitudes for TensorRT; measured once."""
    found: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in found:
            graph, spec, batches = traced(name)["onnxruntime"], spec_of(name), [batch_of(name)]
            ranges = measure_ranges(graph, spec, batches)
            scheme = int8_scheme(graph.model, ranges)
            amax = measure_amax(graph, spec, batches, ranges, smoothing=scheme.smoothing, calibrator="max")
            found[name] = scheme, amax
        return found[name]

    return get


@pytest.fixture(scope="module")
def whole_of(model_of: Any, traced: Any, calibrated: Any) -> Callable[[str, str], Graph]:
    """`whole_of("cls", "trt int8")`: the whole graph of a model, as it is exported; made once."""
    made: dict[tuple[str, str], Graph] = {}

    def quantized(name: str, form: str) -> Graph:
        engine = "openvino" if "openvino" in form else "onnxruntime"
        graph = traced(name)[engine]
        model = graph.model.clone()
        if form.startswith("weights"):
            quantize_weights(model, 4 if "4" in form else 8)
        else:
            activations = "dynamic" if "dynamic" in form else "static"
            quantize_int8(model, calibrated(name)[0], engine=engine, activations=activations)
        return graph_of(model, {}, graph.opset)

    def for_gpu(name: str, form: str) -> Graph:
        plain, sites = traced(name)["openvino"], fusion_sites(model_of(name))
        removes_padding = "padding-free" in form
        if form.startswith("cuda"):
            precision = "fp16" if "fp16" in form else "fp32"
            return cuda_graph(plain, sites=sites, precision=precision, removes_padding=removes_padding)
        precision = next((kind for kind in ("int8", "fp8") if kind in form), "fp16")
        scheme = None
        if precision != "fp16":
            base, amax = calibrated(name)
            attention = {}
            if precision == "fp8":
                attention = measure_attention_amax(plain, spec_of(name), [batch_of(name)], sites=sites)
            scheme = QdqScheme(precision, amax, base.smoothing, base.excluded, attention)
        layout = PADDING_FREE if removes_padding else PADDED
        return tensorrt_graph(plain, precision, sites=sites, scheme=scheme, layout=layout)

    def get(name: str, form: str) -> Graph:
        if (name, form) not in made:
            if form in ("plain", "fused"):
                made[name, form] = traced(name)["openvino" if form == "plain" else "onnxruntime"]
            else:
                made[name, form] = (quantized if form in QUANTIZED else for_gpu)(name, form)
        return made[name, form]

    return get


@pytest.fixture(scope="module")
def part_of(whole_of: Any) -> Callable[[str, str], Graph]:
    """`part_of("cls", "trt int8")`: the part with the answer alone; made once."""
    return functools.cache(lambda name, form: parts_of(whole_of(name, form), spec_of(name))["answer"])


def batch_of(name: str, lengths: tuple[int, ...] = (9, 4, 7), masks: int = 4) -> Batch:
    """Random texts with padding on the right; `masks` positions, several in the first row and none in the second."""
    rng = np.random.default_rng(len(lengths))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(5, VOCABULARY, mask.shape), 0)
    positions = np.array([(0, 0), (len(lengths) - 1, lengths[-1] - 1), (0, lengths[0] - 1), (0, lengths[0] // 2)])
    return Batch(
        ids,
        mask,
        positions[:masks] if name == "mlm" else None,
        token_type_ids=rng.integers(0, 2, mask.shape) if name == "typed" else None,
    )


def feeds_of(graph: Graph, batch: Batch) -> dict[str, np.ndarray]:
    """The inputs of a padded or a padding-free graph."""
    real = batch.attention_mask == 1
    feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    feeds |= {"mask_positions": batch.mask_positions, "token_type_ids": batch.token_type_ids}
    if any(spec.name == "query_lengths" for spec in graph.inputs):
        starts = np.concatenate(([0], real.sum(1).cumsum())).astype(np.int32)
        feeds |= {"query_lengths": starts, "kv_lengths": starts, "position_ids": np.nonzero(real)[1]}
        feeds["input_ids"] = batch.input_ids[real]
        if batch.token_type_ids is not None:
            feeds["token_type_ids"] = batch.token_type_ids[real]
        if batch.mask_positions is not None:
            row, column = batch.mask_positions.T
            feeds["mask_positions"] = starts[row] + column
    return {spec.name: feeds[spec.name] for spec in graph.inputs}


def on_cpu(graph: Graph, form: str) -> Graph:
    """What ONNX Runtime's CPU provider can run, node by node, of the graph."""
    if form.startswith("cuda"):
        return cpu_emulation(graph)
    if form.startswith("trt"):
        is_packed = "padding-free" in form
        return packed_emulation(graph, num_heads=HEADS) if is_packed else engine_arithmetic(graph)
    return graph


def opened(graph: Graph, form: str, profile: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if form in FORMS[len(FP32) + len(QUANTIZED) :] or profile is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    proto = ir.to_proto(on_cpu(graph, form).model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def answer(graph: Graph, form: str, batch: Batch) -> np.ndarray:
    name = next(spec.name for spec in graph.outputs if spec.name != "last_hidden_state")
    return opened(graph, form).run([name], feeds_of(graph, batch))[0]


def expected(model: Any, name: str, batch: Batch) -> np.ndarray:
    """The answer of transformers' model in float64."""
    model = copy.deepcopy(model).double().eval()
    ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
    types = {} if batch.token_type_ids is None else {"token_type_ids": torch.tensor(batch.token_type_ids)}
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, **types)
        if TASKS[name]["task"] == "embed":
            first = found.last_hidden_state[:, 0]
            return (model.sentence_projection(first) if name == "dense" else first).numpy()
    if batch.mask_positions is None:
        return found.logits.numpy()
    return found.logits[batch.mask_positions[:, 0], batch.mask_positions[:, 1]].numpy()


def check(found: np.ndarray, reference: np.ndarray, form: str) -> None:
    """Compare with float64, where the form is precise enough."""
    assert found.shape == reference.shape and found.dtype == np.float32
    if form in FP32:
        np.testing.assert_allclose(found, reference, rtol=0, atol=1e-4)
    elif form in COSINES:
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(reference, axis=-1)
        assert ((found * reference).sum(-1) / lengths).min() > COSINES[form]


def check_answers(whole: Graph, part: Graph, model: Any, name: str, form: str, batch: Batch) -> None:
    """Compare the answer of a part with transformers' and with that of the whole graph."""
    found = answer(part, form, batch)
    check(found, expected(model, name, batch), form)
    np.testing.assert_allclose(found, answer(whole, form, batch), rtol=0, atol=SAME[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["cls", "mlm"])
def test_every_form(model_of, whole_of, part_of, name, form):
    check_answers(whole_of(name, form), part_of(name, form), model_of(name), name, form, batch_of(name))


@pytest.mark.parametrize("form", ["plain", "fused", "int8", "trt fp16"])
@pytest.mark.parametrize("name", ["dense", "rerank", "typed"])
def test_every_head(model_of, whole_of, part_of, name, form):
    check_answers(whole_of(name, form), part_of(name, form), model_of(name), name, form, batch_of(name))


@pytest.mark.parametrize("form", ["plain", "fused", "int8", "weights 4", "cuda padding-free", "trt padding-free"])
@pytest.mark.parametrize("lengths", [(1,), (6,), (1, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("name", ["cls", "mlm"])
def test_sizes_of_batches(model_of, whole_of, part_of, name, form, lengths):
    """One row, one token, and rows without padding."""
    batch = batch_of(name, lengths, masks=2)
    check_answers(whole_of(name, form), part_of(name, form), model_of(name), name, form, batch)


@pytest.mark.parametrize("form", FORMS)
def test_no_masks(part_of, form):
    assert answer(part_of("mlm", form), form, batch_of("mlm", masks=0)).shape == (0, VOCABULARY)


PRODUCTS = ("Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits")


def rows_of(graph: Graph, form: str, batch: Batch, folder: Path) -> Counter[tuple[str, int]]:
    """(operator, rows) -> number of runs, by ONNX Runtime's profile, of linear layers and LayerNormalization."""
    session = opened(graph, form, folder / "profile")
    session.run(None, feeds_of(graph, batch))
    found: Counter[tuple[str, int]] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        arguments = event.get("args", {})
        kind = "linear" if arguments.get("op_name") in PRODUCTS else arguments.get("op_name")
        if kind not in ("linear", "LayerNormalization") or "input_type_shape" not in arguments:
            continue
        shapes = [next(iter(shape.values())) for shape in arguments["input_type_shape"]]
        if kind == "linear" and len(shapes) > 1 and len(shapes[1]) > 2:  # the profile leaves constants out
            continue  # a product of attention
        found[kind, int(np.prod(shapes[0][:-1]))] += 1
    return found


# Form -> linear layers of all rows and of asked rows, for "cls" and for "mlm" with its head of two. Separate GEMMs are
# seven in a layer; merged ones are four. Of dynamic INT8 only the down projection is left, because a scale of its input
# is that of all rows.
ROWS = {
    **dict.fromkeys(("plain", "fused", "int8", "int8 openvino", "weights 8", "weights 4"), ((9, 5), (10, 6))),
    **dict.fromkeys(("cuda", "cuda padding-free", "cuda fp16", *TENSORRT), ((5, 3), (5, 5))),
    "int8 dynamic": ((13, 1), (13, 3)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["cls", "mlm"])
def test_the_last_layer_computes_only_the_rows_of_its_head(part_of, name, form, tmp_path):
    batch = batch_of(name)
    found = rows_of(part_of(name, form), form, batch, tmp_path)
    asked = len(batch.input_ids if batch.mask_positions is None else batch.mask_positions)
    tokens = int(batch.attention_mask.sum()) if "padding-free" in form else batch.input_ids.size
    every, few = ROWS[form][name == "mlm"]
    assert {rows: found["linear", rows] for kind, rows in found if kind == "linear"} == {tokens: every, asked: few}
    if form != "int8 dynamic":
        norms = {rows: count for (kind, rows), count in found.items() if kind == "LayerNormalization"}
        in_last_layer_and_head = 2 + (name == "mlm")
        assert norms[asked] == in_last_layer_and_head and sum(norms.values()) == 3 + in_last_layer_and_head


def test_parts_of_each_task(model_of, traced):
    """No part for an answer that reads all rows; the hidden states alone where the head is costly."""
    graph, mlm = traced("cls")["onnxruntime"], spec_of("mlm")
    for spec, names in (
        (spec_of("cls"), ["answer"]),
        (dataclasses.replace(spec_of("cls"), pooling="mean"), []),
        (dataclasses.replace(spec_of("cls"), task="token-classify", num_labels=2), []),
        (dataclasses.replace(mlm, logits="all"), ["hidden"]),
        (dataclasses.replace(mlm, task="sparse", sparse=SparseSpec("splade")), ["hidden"]),
    ):
        assert list(parts_of(graph, spec)) == names


@pytest.mark.parametrize("form", ["plain", "fused", *QUANTIZED])
def test_the_graph_with_all_logits_gives_those_of_the_masks(whole_of, form):
    """Graphs of every CPU and precision; `test_all_logits` compares every token with transformers."""
    batch = batch_of("mlm", lengths=(9,))
    batch = dataclasses.replace(batch, mask_positions=np.argwhere(batch.attention_mask == 1))  # the same rows
    whole = whole_of("mlm", form)
    graph = all_logits_graph(whole)
    found = opened(graph, form).run(["logits", "last_hidden_state"], feeds_of(graph, batch))
    expected = opened(whole, form).run(["logits", "last_hidden_state"], feeds_of(whole, batch))
    np.testing.assert_allclose(found[0][0], expected[0], atol=SAME[form] * np.abs(expected[0]).max())
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_hidden_states_alone(model_of):
    """The part without the vocabulary's projection computes the same, and does not hold its nodes."""
    batch = batch_of("mlm")
    for engine, whole in build_graphs(model_of("mlm"), task="fill-mask", logits="all", max_length=64).items():
        part = parts_of(whole, dataclasses.replace(spec_of("mlm"), logits="all"))["hidden"]
        assert [spec.name for spec in part.outputs] == ["last_hidden_state"] and part.inputs == whole.inputs
        found = opened(part, engine).run(None, feeds_of(part, batch))[0]
        reference = copy.deepcopy(model_of("mlm")).double()
        with torch.no_grad():
            states = reference.base_model(torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask))
        real = batch.attention_mask == 1
        np.testing.assert_allclose(found[real], states.last_hidden_state.numpy()[real], rtol=0, atol=1e-4)
        assert not any("lm_head" in str(node.name) for node in part.model.graph)


@pytest.mark.parametrize("form", ["plain", "cuda padding-free"])
def test_a_part_has_the_inputs_and_the_fusions_of_the_whole(whole_of, form):
    whole = whole_of("mlm", form)
    before = ir.to_proto(whole.model).SerializeToString()
    part = parts_of(whole, spec_of("mlm"))["answer"]
    assert part.inputs == whole.inputs and part.outputs == whole.outputs[:1]
    assert (part.fusions, part.opset) == (whole.fusions, whole.opset)
    assert ir.to_proto(whole.model).SerializeToString() == before


def test_parts_add_nothing_to_the_weights(whole_of, tmp_path):
    for form in ("fused", "int8", "cuda fp16", "trt int8"):
        whole = whole_of("cls", form)
        save_graphs({tmp_path / "alone.onnx": whole}, tmp_path / "alone.data")
        parts = parts_of(whole, spec_of("cls"))
        save_graphs(
            {tmp_path / "both.onnx": whole, tmp_path / "part.onnx": parts["answer"]},
            tmp_path / "both.data",
        )
        assert (tmp_path / "both.data").read_bytes() == (tmp_path / "alone.data").read_bytes()


def test_a_head_that_is_not_known_is_an_error(traced):
    graph = traced("cls")["onnxruntime"]
    with pytest.raises(ExportError, match="0 nodes select the first or the masked tokens for sentence_embedding"):
        mean = build_mean(graph)
        parts_of(mean, spec_of("cls"))


def build_mean(graph: Graph) -> Graph:
    """A graph whose embedding is the mean of all tokens, while its spec says CLS."""
    model = graph.model.clone()
    hidden, embedding = model.graph.outputs
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([1])), type=ir.TensorType(ir.DataType.INT64))
    model.graph.register_initializer(axes)
    mean = ir.node("ReduceMean", [hidden, axes], {"keepdims": 0}, name="mean")
    model.graph.append(mean)
    mean.outputs[0].name, embedding.name = embedding.name, None
    mean.outputs[0].type, mean.outputs[0].shape = embedding.type, embedding.shape
    model.graph.outputs[1] = mean.outputs[0]
    return graph_of(model, graph.fusions, graph.opset)
