"""ModernBERT, from a checkpoint that transformers wrote to a verified bundle's answers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import gte_deploy  # noqa: E402
from factories import add_multi_vector_modules, add_sparse_modules  # noqa: E402
from family_checkpoints import (  # noqa: E402
    LIMIT,
    SUFFIXES,
    assert_fills_as_the_pipeline,
    edit_config,
    make_family_checkpoint,
)
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ConfigError, ExportError, InputError  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.config import read_config, task_of  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.families.modernbert import MODERNBERT  # noqa: E402

LAYERS, GLOBAL_LAYERS = 5, 2
AUTO = {
    "fill-mask": "AutoModelForMaskedLM",
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "token-classify": "AutoModelForTokenClassification",
}
# The config.json of answerdotai/ModernBERT-base, as transformers 4 wrote it.
PUBLISHED: dict[str, Any] = {
    **{"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "vocab_size": 50368},
    **{"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152},
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50281, "classifier_activation": "gelu"},
    **{"classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281},
    **{"decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282},
    **{"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False},
    **{"hidden_activation": "gelu", "initializer_cutoff_factor": 2.0, "initializer_range": 0.02},
    **{"layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192},
    **{"mlp_bias": False, "mlp_dropout": 0.0, "norm_bias": False, "norm_eps": 1e-05, "pad_token_id": 50283},
    **{"position_embedding_type": "absolute", "reference_compile": None, "repad_logits_with_grad": False},
    **{"sep_token_id": 50282, "sparse_pred_ignore_index": -100, "sparse_prediction": False, "torch_dtype": "float32"},
    **{"tie_word_embeddings": True, "transformers_version": "4.47.0.dev0"},
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624}
# Longer than the window, so that tokens of local layers do not see each other; with padding.
IDS = np.full((3, 30), 265)
IDS[0], IDS[1, :21], IDS[2, :4] = np.arange(30, 60), np.arange(80, 101), np.arange(5, 9)
MASK = (IDS != 265).astype(np.int64)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes the checkpoint of a task once."""
    made: dict[str, Path] = {}

    def make(task: str = "fill-mask") -> Path:
        if task not in made:
            labels = ("no", "yes", "maybe") if "classify" in task else ("LABEL_0",)
            made[task] = make_family_checkpoint(tmp_path_factory.mktemp("f") / task, "modernbert", task, labels=labels)
        return made[task]

    return make


@pytest.mark.parametrize("task", SUFFIXES)
def test_each_task_is_read_as_transformers_reads_it(task, checkpoints, tmp_path):
    folder = checkpoints(task)
    assert task_of(folder) == task
    model, own = load_model(folder), getattr(transformers, AUTO[task]).from_pretrained(folder).eval()
    assert type(model) is type(own)
    with torch.inference_mode():
        found, expected = (each(torch.tensor(IDS), torch.tensor(MASK))[0] for each in (model, own))
    real = MASK == 1 if found.ndim == 3 else slice(None)
    torch.testing.assert_close(found[real], expected[real])
    save_model(model, tmp_path / "saved", layout="native")
    again = getattr(transformers, AUTO[task]).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_encoder_of_a_masked_lm_is_an_embedding_model(checkpoints):
    encoder, whole = load_model(checkpoints(), task="embed"), load_model(checkpoints())
    ids = torch.tensor(IDS[:1])
    with torch.inference_mode():
        assert torch.equal(encoder(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"unexpected: classifier\.bias"):
        load_model(checkpoints("classify"), task="embed")


def test_without_a_name_the_tensors_of_a_classifier_do_not_tell_its_task(checkpoints, tmp_path):
    for task in ("fill-mask", "embed"):
        named = shutil.copytree(checkpoints(task), tmp_path / task)
        assert task_of(edit_config(named, architectures=None)) == task
    for task in ("classify", "token-classify"):
        folder = edit_config(shutil.copytree(checkpoints(task), tmp_path / task), architectures=None)
        said = "expected ModernBertForSequenceClassification or ModernBertForTokenClassification.*--task classify"
        with pytest.raises(ConfigError, match=said):
            task_of(folder)
        assert type(load_model(folder, task=task)).__name__ == MODERNBERT.classes[task]


def test_the_published_config_is_read_as_transformers_reads_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    ours, own = read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for name in own.to_dict().keys() - {"global_attn_every_n_layers", "dtype", "transformers_version"}:
        if MODERNBERT.fields.field(name) is None or MODERNBERT.fields.field(name).effect == "honoured":
            assert getattr(ours, name) == getattr(own, name), name
    assert ours.layer_types.count("full_attention") == 8 and ours.layer_types[21] == "full_attention"
    ours.save_pretrained(tmp_path / "new")  # in the form of transformers 5
    assert "global_rope_theta" not in json.loads((tmp_path / "new" / "config.json").read_text())
    again = read_config(tmp_path / "new")
    assert (again.layer_types, again.rope_parameters) == (ours.layer_types, ours.rope_parameters)


@pytest.mark.parametrize(
    ("sizes", "task", "count"),
    [
        # https://huggingface.co/Alibaba-NLP/gte-modernbert-base, answerdotai/ModernBERT-base and -large
        ({}, "embed", 149_014_272),
        ({}, "fill-mask", 149_655_232),
        (LARGE, "embed", 394_781_696),
        (LARGE, "fill-mask", 395_881_664),
    ],
)
def test_the_number_of_parameters_is_the_published_one(sizes, task, count, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **sizes}))
    with torch.device("meta"):
        model = MODERNBERT.model_class(task)(read_config(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_activation": "gelu_10"}, "hidden_activation is 'gelu_10'; expected one of gelu, gelu_new"),
        ({"classifier_activation": None}, "classifier_activation is None; expected one of gelu"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'; expected one of cls, mean"),
        ({"norm_bias": 1}, "norm_bias is 1; expected true or false"),
        ({"num_attention_heads": 5}, r"hidden_size is 768; expected num_attention_heads \(5\) times an even head size"),
        ({"head_dim": 32}, "head_dim is 32; expected 64"),
        ({"local_attention": 0}, "local_attention is 0; expected a whole number, 1 to "),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0"),
        ({"layer_types": ["full_attention"]}, r"layer_types is .*; expected a list of num_hidden_layers \(22\) times"),
        ({"layer_types": ["full_attention"] * 22}, r"expected what global_attn_every_n_layers \(3\) says"),
        ({"layer_types": ["chunked_attention"] * 22}, "layer_types is .*; expected a list"),
        ({"local_rope_theta": None}, "local_rope_theta is None; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*angles of rotation are not scaled"),
        ({"rope_parameters": ROPE}, "rope_parameters is .*; expected an object with full_attention and sliding_attent"),
        ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention is .* base of global_rope_the"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 160000.0}}},
            "rope_parameters.full_attention is .*alone: the angles are not scaled",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"pad_token_id": 50368}, "pad_token_id is 50368; expected an id below vocab_size"),
    ],
)
def test_a_value_that_the_model_cannot_honour_is_refused(fields, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    with pytest.raises(ConfigError, match=said):
        read_config(tmp_path)


def test_every_field_that_the_class_reads_is_in_the_table():
    from transformers.models.modernbert import modeling_modernbert

    read = set(re.findall(r"config\.([a-z]\w*)", inspect.getsource(modeling_modernbert)))
    assert {"hidden_activation", "norm_bias", "layer_types", "sliding_window"} <= read
    own = [n for n in transformers.ModernBertConfig.__dataclass_fields__ if n in vars(transformers.ModernBertConfig)]
    assert [name for name in (*read, *own, *PUBLISHED) if MODERNBERT.fields.field(name) is None] == []


def layer_norm(x: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[np.float64] | float) -> Any:
    """LayerNorm of the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: NDArray[np.float64]) -> Any:
    """x Φ(x), with the error function of the standard library."""
    import math

    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def in_numpy(tensors: dict[str, NDArray[np.float64]], ids: list[int], *, window: int, bases: dict[bool, float]) -> Any:
    """Hidden states [S, H] and logits [S, V] of one text, from the paper (arXiv 2412.13663) and the stored tensors.

    Layers 0, 3, 6, … see all tokens and rotate by the base `bases[True]`; the others see window / 2 tokens on both
    sides and rotate by `bases[False]`. A layer adds attention and a gated unit to its input; both begin with a
    LayerNorm, but the first layer's attention reads the normalised embeddings as they are.
    """

    def norm(x: NDArray[np.float64], name: str) -> Any:
        return layer_norm(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias", 0.0))

    def linear(x: NDArray[np.float64], name: str) -> Any:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    table = tensors["model.embeddings.tok_embeddings.weight"]
    x = norm(table[ids], "model.embeddings.norm")
    length, heads, size = len(ids), 4, x.shape[1] // 4
    places = np.arange(length)
    for layer in range(LAYERS):
        prefix, is_global = f"model.layers.{layer}", layer % 3 == 0
        angles = places[:, None] * bases[is_global] ** (-np.arange(0, size, 2) / size)
        turns = np.exp(1j * angles)  # dimension i and i + size/2 are one complex number
        normed = x if layer == 0 else norm(x, f"{prefix}.attn_norm")
        q, k, v = linear(normed, f"{prefix}.attn.Wqkv").reshape(length, 3, heads, size).transpose(1, 2, 0, 3)
        q, k = ((t[..., : size // 2] + 1j * t[..., size // 2 :]) * turns for t in (q, k))
        scores = (q @ k.conj().transpose(0, 2, 1)).real / np.sqrt(size)
        if not is_global:
            scores = np.where(np.abs(places[:, None] - places) <= window // 2, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(attended.transpose(1, 0, 2).reshape(length, -1), f"{prefix}.attn.Wo")
        gated, factor = np.split(linear(norm(x, f"{prefix}.mlp_norm"), f"{prefix}.mlp.Wi"), 2, axis=-1)
        x = x + linear(gelu(gated) * factor, f"{prefix}.mlp.Wo")
    hidden = norm(x, "model.final_norm")
    return hidden, norm(gelu(linear(hidden, "head.dense")), "head.norm") @ table.T + tensors["decoder.bias"]


@pytest.mark.parametrize("biases", [False, True])
def test_the_model_computes_what_the_paper_says(biases, checkpoints, tmp_path):
    """Torch and both graphs, against float64 in NumPy; rows with padding too."""
    pytest.importorskip("onnxscript")
    import onnx_ir
    import onnxruntime

    from gte_deploy.exporters.graph.build import build_graphs

    folder, bases, window = checkpoints(), {True: 160_000.0, False: 10_000.0}, 8
    if biases:
        bases, window = {True: 900.0, False: 70.0}, 7
        names = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
        rope = {kind: {"rope_type": "default", "rope_theta": bases[kind == "full_attention"]} for kind in KINDS}
        options = {**dict.fromkeys(names, True), "local_attention": window, "rope_parameters": rope}
        folder = make_family_checkpoint(tmp_path, "modernbert", **options)
    with safe_open(folder / "model.safetensors", framework="np") as stored:
        tensors = {name: stored.get_tensor(name).astype(np.float64) for name in stored.keys()}  # noqa: SIM118
    rows = [row[mask == 1].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    expected = [in_numpy(tensors, row, window=window, bases=bases) for row in rows]
    model = load_model(folder)
    with torch.inference_mode():
        logits = model.double()(torch.tensor(IDS), torch.tensor(MASK)).logits.numpy()
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i, : len(row)], expected[i][1], rtol=0, atol=1e-4)  # FP32 angles
    places = np.argwhere(MASK == 1)
    feed = {"input_ids": IDS, "attention_mask": MASK, "mask_positions": places}
    for graph in build_graphs(model.float(), task="fill-mask", max_length=LIMIT).values():
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph.model).SerializeToString())
        hidden, found = session.run(["last_hidden_state", "logits"], feed)
        wanted = [np.concatenate(parts) for parts in zip(*expected, strict=True)]
        np.testing.assert_allclose(hidden[MASK == 1], wanted[0], rtol=0, atol=2e-4)
        np.testing.assert_allclose(found, wanted[1], rtol=0, atol=4e-4)


KINDS = ("full_attention", "sliding_attention")


@pytest.mark.parametrize("task", ["fill-mask", "classify", "token-classify"])
def test_rows_without_padding_give_the_same_logits(task, checkpoints):
    folder = checkpoints(task)
    own = getattr(transformers, AUTO[task]).from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = own(torch.tensor(IDS), torch.tensor(MASK)).logits.numpy()
    places = np.argwhere(MASK == 1)
    for packed in (False, True):
        backend = TorchBackend(load_model(folder), describe(folder).spec, packed=packed)
        found = backend.run(Batch(IDS, MASK, places), ["logits"])["logits"]
        if task == "classify":
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        else:
            at_places = found if task == "fill-mask" else found[tuple(places.T)]
            np.testing.assert_allclose(at_places, expected[tuple(places.T)], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("passes", "rest"),
    [
        ("PASSES", {"local_attention": LAYERS - GLOBAL_LAYERS, "projections": GLOBAL_LAYERS}),
        ("MERGED_PASSES", {"qkv": 2, "up_gate": 5, "glu": 5}),
    ],
)
def test_passes_fire_as_the_family_says(passes, rest, checkpoints):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph import fusion
    from gte_deploy.exporters.graph.trace import trace

    model = load_model(checkpoints())
    graph = trace(model, task="fill-mask", max_length=LIMIT, pooling=None, logits="masked", opset=20)
    fired = fusion.fuse_graph(graph, sites=MODERNBERT.sites(model.config), passes=getattr(fusion, passes))
    wanted = {"rope": 2 * LAYERS, "attention": GLOBAL_LAYERS, **rest, "skip_layer_norm": 2 * LAYERS}
    assert fired == wanted


@pytest.fixture(scope="module")
def filled(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for fill-mask."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    result = export(checkpoints(), tmp_path_factory.mktemp("bundle") / "modernbert")
    (check,) = result.parity.checks
    assert result.parity.passed and check.passed and check.compared["answers"] > 0
    # Two bases, each for a head of 8 dimensions.
    assert check.compared["rotation frequencies"] == 8
    return result.path


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_a_bundle_fills_masks_as_the_pipeline_of_transformers_does(backend, checkpoints, filled):
    pytest.importorskip("openvino")
    pipe = transformers.pipeline("fill-mask", model=str(checkpoints()), device="cpu")
    texts = ("the river is old and the [MASK] is old.", "Paris is [MASK]", "река [MASK]")
    with gte_deploy.load(checkpoints() if backend == "torch" else filled, backend=backend) as model:
        assert_fills_as_the_pipeline(model, pipe, texts)


@pytest.mark.parametrize(
    ("task", "options"), [("classify", {}), ("classify", {"classifier_pooling": "mean"}), ("token-classify", {})]
)
def test_a_classifier_answers_as_transformers_does(task, options, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("sentence_transformers")
    from gte_deploy.exporters.export import export

    labels = ("no", "yes", "maybe")
    folder = make_family_checkpoint(tmp_path / "model", "modernbert", task, labels=labels, **options)
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert result.parity.passed and check.passed and check.compared["answers"] > 0 and not check.skipped
    # Only a classifier of the first token has a part that computes the last layer for this token alone.
    parts = result.manifest.graphs["onnxruntime"].parts
    assert len(parts) == (task == "classify" and not options)


def test_sparse_embeddings_are_those_of_sparse_encoder(tmp_path):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    folder = make_family_checkpoint(tmp_path / "splade", "modernbert", initializer_range=0.1, decoder_bias=False)
    assert task_of(add_sparse_modules(folder)) == "sparse"
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("SparseEncoder") and check.compared["answers"] > 0


@pytest.mark.parametrize(
    ("task", "options", "layers"),
    [
        ("fill-mask", {}, 5),
        ("embed", {"pooling": "cls"}, 4),
        ("classify", {}, 5),
        pytest.param("fill-mask", {}, 4, marks=pytest.mark.slow),
        pytest.param("embed", {"pooling": "cls"}, 5, marks=pytest.mark.slow),
        pytest.param("classify", {}, 4, marks=pytest.mark.slow),
    ],
)
def test_the_last_layer_computes_only_the_rows_that_are_asked_for(task, options, layers, tmp_path):
    """Of 4 layers the last one has global attention, of 5 local."""
    pytest.importorskip("onnxscript")
    import onnx_ir
    import onnxruntime

    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.graph.parts import parts_of

    folder = make_family_checkpoint(tmp_path, "modernbert", task, num_hidden_layers=layers)
    places = np.array([[0, 3], [1, 20], [2, 1]])
    own = getattr(transformers, AUTO[task]).from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = own(torch.tensor(IDS), torch.tensor(MASK))[0].numpy()
    if task != "classify":
        expected = expected[tuple(places.T)] if task == "fill-mask" else expected[:, 0]
    feed = {"input_ids": IDS, "attention_mask": MASK, "mask_positions": places}
    spec = dataclasses.replace(describe(folder).spec, **options)
    graphs = build_graphs(load_model(folder), task=task, max_length=LIMIT, **options)
    for whole in graphs.values():
        part = parts_of(whole, spec)["answer"]
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(part.model).SerializeToString())
        found = session.run(None, {tensor.name: feed[tensor.name] for tensor in part.inputs})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert any(str(node.name).startswith("asked_rows/") for node in part.model.graph)


def test_a_graph_for_cuda_keeps_padding(tmp_path):
    """Emulated on a CPU. The weights of a trained model are smaller than those of the other tests."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    folder = make_family_checkpoint(tmp_path / "model", "modernbert", "embed", initializer_range=0.08)
    result = export(folder, tmp_path / "bundle", target="cuda", precision="fp16")
    fusions = result.manifest.graphs["onnxruntime"].fusions
    assert result.parity.passed and (fusions["flash"], fusions["glu"]) == (GLOBAL_LAYERS, LAYERS)
    with pytest.raises(ExportError, match="Export with padding='keep'"):
        export(folder, tmp_path / "other", target="cuda", precision="fp16", padding="remove")


def test_a_lower_precision_is_that_of_all_its_layers(checkpoints):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.quantization.recipes import groups_of
    from gte_deploy.exporters.quantization.weight_only import quantize_weights

    graph = build_graphs(load_model(checkpoints()), task="fill-mask", max_length=LIMIT)["onnxruntime"]
    groups = groups_of(graph, ())
    layer = "model.layers.1"
    assert {name: len(groups[f"{layer}.{name}"]) for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")} == {
        **{"attn.Wqkv": 3, "attn.Wo": 1, "mlp.Wi": 2, "mlp.Wo": 1}
    }
    # Queries, keys, values, the output of attention, gate, up and down; and the vocabulary's matrix.
    assert quantize_weights(graph.model, 8)["int8_linears"] == 7 * LAYERS + 1


def test_a_missing_tensor_is_named(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.attn.Wqkv.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.1\.attn\.Wqkv\.weight"):
        load_model(folder)


@pytest.mark.parametrize("length", [9, 10])
def test_queries_are_lengthened_within_the_window(length, tmp_path):
    """As gte-moderncolbert: documents far longer than the window, and [MASK]s in queries that no token attends to."""
    pytest.importorskip("sentence_transformers", minversion="6.2")
    from gte_deploy.exporters.export import export

    source = make_family_checkpoint(tmp_path / "model", "modernbert", "embed", local_attention=16)
    config = {"query_prefix": "[SEP]", "document_prefix": "[SEP]", "query_length": length, "document_length": LIMIT}
    add_multi_vector_modules(source, config=config)
    if length > 9:
        with pytest.raises(InputError, match="lengthened to 10 tokens.*local attention sees 8"):
            export(source, tmp_path / "bundle")
        return
    bundle = export(source, tmp_path / "bundle")
    (answers,) = [check for check in bundle.parity.checks if check.name == "answers"]
    assert bundle.parity.passed and answers.compared["library"].startswith("MultiVectorEncoder")
