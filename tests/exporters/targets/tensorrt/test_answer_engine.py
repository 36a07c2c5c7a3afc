"""Engines that give only the answer of their task: what is refused, bundles of their graphs, and real builds.

tests/exporters/graph/test_parts.py compares these graphs in every precision and layout with PyTorch.
"""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir
import pytest

from factories import make_checkpoint
from gte_deploy.backends.base import Batch
from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile
from gte_deploy.exporters.export import export
from gte_deploy.exporters.graph.build import build_graphs, graph_of, save_graph
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.graph.parts import parts_of
from gte_deploy.exporters.targets.tensorrt.engine import build_plan
from gte_deploy.exporters.targets.tensorrt.graph import QdqScheme, tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED, PADDING_FREE
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.profiles import parse_profile
from gte_deploy.exporters.targets.tensorrt.runtimes import choose_runtime
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.description import describe
from gte_deploy.models.families import fusion_sites

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ANSWERS = {"embed": "sentence_embedding", "classify": "logits", "fill-mask": "logits"}
SIZES = {"hidden_size": 64, "heads": 2, "intermediate": 128, "layers": 2, "max_positions": 64, "layout": "native"}
LENGTHS = (1, 40, 7, 64)
PROFILES = (Profile((1, 1), (2, 64), (8, 256)),)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Task -> a checkpoint whose answer needs few tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    more = {"embed": {"pooling": "cls"}, "classify": {"num_labels": 3}, "fill-mask": {}}
    return {task: make_checkpoint(folder / task, task=task, **options, **SIZES) for task, options in more.items()}


@pytest.fixture(scope="module")
def whole(checkpoints):
    """`whole(task, precision, layout)`: the model, its spec, and its graph of all outputs."""
    made = {}

    def graph(task, precision, layout):
        if task not in made:
            spec = describe(checkpoints[task]).spec
            model = load_model(checkpoints[task], task=task)
            made[task] = model, spec, build_graphs(model, task=task, max_length=64, pooling=spec.pooling)["openvino"]
        model, spec, plain = made[task]
        scheme = None
        if precision in ("int8", "fp8"):
            # The arithmetic does not depend on the values of the scales, and 4 is beyond nearly all of these values.
            amax = {linear.name: 4.0 for linear in find_linear_layers(plain.model)}
            scheme = QdqScheme(precision, amax, excluded=frozenset(("lm_head.decoder.weight",)))
        return model, spec, tensorrt_graph(plain, precision, sites=fusion_sites(model), scheme=scheme, layout=layout)

    return graph


def ragged(spec):
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, np.random.default_rng(0).integers(5, spec.vocab_size, mask.shape), 0)
    # Several masks of a text, none of another, and not in the order of the texts.
    places = np.array([(3, 0), (1, 39), (1, 2), (0, 0), (3, 63)])
    return Batch(ids, mask, places if spec.task == "fill-mask" else None)


def run(graph, model, spec, layout, outputs):
    emulation = layout.emulation(graph, spec, profiles=PROFILES, num_heads=model.config.num_attention_heads)
    with contextlib.closing(emulation):
        return emulation.run(ragged(spec), outputs)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("embed", {"pooling": "mean"}, "mean pooling needs"),
        ("fill-mask", {"logits": "all"}, "logits 'all' needs"),
        ("token-classify", {}, "task token-classify needs"),
    ],
)
def test_an_answer_that_needs_every_token_is_refused(tmp_path, task, options, says):
    folder = make_checkpoint(tmp_path / "model", task=task, **SIZES)
    with pytest.raises(InputError, match=f"for embeddings with CLS pooling, .*; {says} .*every token. Leave out --out"):
        export(folder, tmp_path / "bundle", format="trt", onnx_only=True, outputs="answer", **options)
    assert not (tmp_path / "bundle").exists()


def test_other_formats_have_no_such_option(checkpoints, tmp_path):
    with pytest.raises(InputError, match="outputs is 'answer'; that is for target tensorrt"):
        export(checkpoints["embed"], tmp_path / "bundle", outputs="answer")
    with pytest.raises(InputError, match="outputs"):
        export(checkpoints["embed"], tmp_path / "bundle", format="trt", outputs="hidden")


def transformers_answer(folder, task, batch):
    """The answers of transformers' own class in FP32."""
    kinds = {
        "embed": "AutoModel",
        "classify": "AutoModelForSequenceClassification",
        "fill-mask": "AutoModelForMaskedLM",
    }
    model = getattr(transformers, kinds[task]).from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask))
    if task == "embed":
        return found.last_hidden_state[:, 0].numpy()
    return found.logits[tuple(batch.mask_positions.T)].numpy() if task == "fill-mask" else found.logits.numpy()


@pytest.mark.parametrize(
    ("task", "padding"),
    [("embed", "keep"), ("classify", "remove"), pytest.param("fill-mask", "keep", marks=pytest.mark.slow)],
)
def test_a_bundle_of_the_graph_gives_what_transformers_does(checkpoints, whole, tmp_path, task, padding):
    """Only the graph is written; the export compares its emulation with PyTorch."""
    options = {"format": "trt", "onnx_only": True, "outputs": "answer", "padding": padding}
    result = export(checkpoints[task], tmp_path / "bundle", **options)
    graph = open_bundle(result.path).graphs["tensorrt"]
    assert [tensor.name for tensor in graph.outputs] == [ANSWERS[task]]
    (engine,) = result.parity.engines
    assert set(engine.cases[0].outputs) == {ANSWERS[task]} and engine.passed
    assert any("gives no hidden states" in caveat for caveat in result.parity.caveats)
    model, spec, _ = whole(task, "fp16", PADDED)
    layout = PADDED if padding == "keep" else PADDING_FREE
    model_file = ir.load(result.path / graph.path)
    found = run(graph_of(model_file, {}, graph.opset), model, spec, layout, [ANSWERS[task]])[ANSWERS[task]]
    expected = transformers_answer(checkpoints[task], task, ragged(spec))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["embed", "classify", "fill-mask"])
def test_tensorrt_rtx_fuses_the_attention_of_its_last_layer_too(whole, tmp_path, task, precision):
    """One query a text has a kernel of its own; the masks of fill-mask are selected behind the attention."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    _, spec, graph = whole(task, precision, PADDED)
    part = parts_of(graph, spec)["answer"]
    save_graph(part, tmp_path / "answer.onnx")
    profiles = (parse_profile("1x1:4x16:8x32"), parse_profile("1x33:2x48:4x64"))
    plan = build_plan(
        tmp_path / "answer.onnx",
        tmp_path,
        choose_runtime("rtx"),
        TensorRTOptions(),
        graph=part,
        num_layers=2,
        compute_capabilities=("8.9",),
        profiles=profiles,
    )
    assert [tensor.name for tensor in plan.outputs] == [ANSWERS[task]] and not plan.caveats
    assert plan.layers["fused_attention"] == 2 and "fp32_gemm" not in plan.layers
    assert plan.layers[f"{precision}_gemm"] >= 2 * 4
