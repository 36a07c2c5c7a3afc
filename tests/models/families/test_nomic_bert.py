"""Nomic BERT: the published layout against NumPy, that of transformers against transformers, up to bundles."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

import gte_deploy  # noqa: E402
from factories import SPELLING, add_sparse_modules  # noqa: E402
from family_checkpoints import LIMIT, SUFFIXES, edit_config, make_family_checkpoint, make_tokenizer  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ConfigError, InputError  # noqa: E402
from gte_deploy.exporters.conversion import convert  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.config import read_config, task_of  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.families.nomic_bert import NOMIC_BERT  # noqa: E402
from nomic_published import CLASSES, PUBLISHED_FIELDS, TINY, PublishedModel, make_published  # noqa: E402

LAYERS = TINY["n_layer"]
ROWS = ([2, 60, 61, 4, 36, 37, 3], [2, 62, 3], [2, *range(15, 15 + LIMIT - 2), 3])
TYPES = [0, 0, 0, 0, 1, 1, 1]
TEXTS = ("the [MASK] is old.", "the city and [MASK] river")
PROMPTS = {"query": "search_query: ", "document": "search_document: "}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes the published checkpoint of a task once, with a tokenizer."""
    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in made:
            made[task] = make_published(tmp_path_factory.mktemp("nomic") / task, task, words=len(SPELLING))
            make_tokenizer("nomic_bert").save_pretrained(made[task])
        return made[task]

    return make


def batch_of(rows: Sequence[Sequence[int]], mask_positions: Any = None) -> Batch:
    """Rows that are padded on the right."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    mask = np.array([[i < len(row) for i in range(ids.shape[1])] for row in rows], np.int64)
    return Batch(ids, mask, mask_positions)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_the_published_layout_computes_what_numpy_computes(activation, tmp_path):
    # Rounded up: the MLP to 512, the vocabulary to 128.
    folder = make_published(
        tmp_path, "fill-mask", words=70, activation_function=activation, n_inner=300, rotary_emb_base=500
    )
    model, reference = load_model(folder), PublishedModel(folder)
    assert type(model) is transformers.NomicBertForMaskedLM and not model.training
    assert model.config.vocab_size == 128 and model.config.intermediate_size == 512
    assert model.cls.predictions.decoder.weight is model.nomic_bert.embeddings.word_embeddings.weight
    for row, types in ((ROWS[0], TYPES), (ROWS[1], None), (ROWS[2], None)):
        given = None if types is None else torch.tensor([types])
        with torch.inference_mode():
            hidden = model.nomic_bert(torch.tensor([row]), token_type_ids=given).last_hidden_state[0]
            logits = model(torch.tensor([row]), token_type_ids=given).logits[0]
        np.testing.assert_allclose(hidden.numpy(), reference.hidden(row, types), rtol=0, atol=2e-5)
        np.testing.assert_allclose(logits.numpy(), reference.logits(row, types), rtol=0, atol=2e-4)


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_rows_of_a_batch_are_computed_as_numpy_computes_them_alone(task, packed, published):
    folder = published(task)
    assert task_of(folder) == task
    reference, places = PublishedModel(folder), np.array([[0, 3], [1, 1], [2, LIMIT - 2]])
    batch = batch_of(ROWS, places if task == "fill-mask" else None)
    backend = TorchBackend(load_model(folder), describe(folder, pooling="mean").spec, packed=packed)
    outputs = backend.run(batch, ["last_hidden_state", "sentence_embedding" if task == "embed" else "logits"])
    for found, row in zip(outputs["last_hidden_state"], ROWS, strict=True):
        np.testing.assert_allclose(found[: len(row)], reference.hidden(row), rtol=0, atol=2e-5)
    if task == "embed":
        expected = [reference.hidden(row).mean(axis=0) for row in ROWS]
    elif task == "classify":
        expected = [reference.labels(row) for row in ROWS]
    else:
        expected = [reference.logits(ROWS[row])[token] for row, token in places]
    np.testing.assert_allclose(outputs.get("logits", outputs.get("sentence_embedding")), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("task", SUFFIXES)
def test_a_checkpoint_of_transformers_is_read_as_transformers_reads_it(task, tmp_path):
    """save_pretrained stores the published names of tensors, with the head's biases; save_model those of the module."""
    labels = ("no", "yes", "maybe") if "classify" in task else ("LABEL_0",)
    folder = make_family_checkpoint(tmp_path / "saved", "nomic_bert", task, labels=labels)
    assert any("attn.Wqkv" in name for name in load_file(folder / "model.safetensors"))
    nameless = edit_config(shutil.copytree(folder, tmp_path / "nameless"), architectures=None)
    assert task_of(folder) == task_of(nameless) == task
    own, model = getattr(transformers, f"NomicBert{SUFFIXES[task]}").from_pretrained(folder).eval(), load_model(folder)
    assert type(model) is type(own)
    ids, mask = (torch.tensor(part) for part in (batch_of(ROWS).input_ids, batch_of(ROWS).attention_mask))
    with torch.inference_mode():
        found, expected = (each(ids, attention_mask=mask)[0] for each in (model, own))
    real = mask.bool() if found.ndim == 3 else slice(None)
    torch.testing.assert_close(found[real], expected[real])
    save_model(model, tmp_path / "native", layout="native")
    again = type(own).from_pretrained(tmp_path / "native")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_files_with_the_names_of_both_layouts_are_read_as_transformers_reads_them(published, tmp_path):
    """nomic-embed-text-v1.5 since 2026: the length of the training under one name, the limit under another."""
    folder = shutil.copytree(published("embed"), tmp_path / "both")
    fields = {
        **{"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 256},
        **{"hidden_act": "silu", "layer_norm_eps": 1e-12, "max_position_embeddings": 16, "vocab_size": 128},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    edit_config(folder, **fields)
    config = read_config(folder)
    own = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([ROWS[2]])  # above 16 tokens, and transformers has no limit of its own
    with torch.inference_mode():
        torch.testing.assert_close(load_model(folder)(ids).last_hidden_state, own(ids).last_hidden_state)
    assert config.max_position_embeddings == LIMIT
    for name, wrong in (("hidden_act", "gelu"), ("intermediate_size", 128), ("layer_norm_eps", 1e-5)):
        edit_config(folder, **{**fields, name: wrong})
        with pytest.raises(ConfigError, match=f"{name} is {wrong!r}; expected .*, as the original layout says"):
            read_config(folder)
    edit_config(folder, **fields | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    with pytest.raises(ConfigError, match=r"rotary_emb_base is 1000; expected 500.0, as rope_parameters.rope_theta"):
        read_config(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction is 0.5; expected 1"),
        ({"rotary_emb_fraction": None}, "rotary_emb_fraction is 0.0; expected 1"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved is True; expected false"),
        ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base is 512; expected none, or null"),
        ({"rotary_emb_base": 0}, "rotary_emb_base is 0; expected a number of at least 1"),
        ({"rotary_scaling_factor": "2"}, "rotary_scaling_factor is '2'; expected a number"),
        ({"rotary_head_dim": True}, "rotary_head_dim is True; expected false"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; expected one of swiglu, geglu"),
        ({"activation_function": "glu"}, "activation_function is 'glu'; expected one of swiglu, geglu"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias is True; expected false"),
        ({"mlp_fc1_bias": None}, "mlp_fc1_bias is True; expected false"),
        ({"mlp_fc2_bias": True}, "mlp_fc2_bias is True; expected false"),
        ({"prenorm": True}, "prenorm is True; expected false"),
        ({"parallel_block": True}, "parallel_block is True; expected false"),
        ({"use_rms_norm": True}, "use_rms_norm is True; expected false"),
        ({"causal": True}, "causal is True; expected false"),
        ({"num_heads_kv": 2}, "num_heads_kv is 2; expected 4, as n_head"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0; expected a whole number, 1 to "),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; expected true"),
        ({"n_head": 5}, r"hidden_size is 32; expected num_attention_heads \(5\) times an even head size"),
        ({"n_head": None}, "n_head is missing"),
        ({"n_layer": "2"}, "n_layer is '2'; expected a whole number, 1 to "),
        ({"n_inner": 0}, "n_inner is 0; expected a whole number, 1 to "),
        # nomic-embed-text-v2-moe
        (
            {"activation_function": "gelu", "mlp_fc1_bias": True, "moe_every_n_layers": 2, "num_experts": 8},
            "moe_every_n_layers is 2; expected 0. Mixtures of experts are not computed, such as nomic-embed-text-v2-",
        ),
        ({"num_experts": 8}, "num_experts is 8; expected 0. Mixtures of experts are not computed"),
    ],
)
def test_a_value_that_the_model_cannot_honour_is_refused(fields, said, published, tmp_path):
    shutil.copyfile(published("embed") / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=said):
        read_config(edit_config(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected one of silu, gelu"),
        ({"head_dim": 16}, "head_dim is 16; expected 8"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_theta": 1000.0, "factor": 2.0}}, "rope_parameters is .* no field factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*; expected none, or null"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
    ],
)
def test_a_value_of_transformers_layout_that_the_model_cannot_honour_is_refused(fields, said, tmp_path):
    config = transformers.NomicBertConfig(hidden_size=32, num_attention_heads=4)
    (tmp_path / "config.json").write_text(config.to_json_string())
    assert read_config(tmp_path).rope_parameters["rope_theta"] == 1000
    with pytest.raises(ConfigError, match=said):
        read_config(edit_config(tmp_path, **fields))


def test_lengths_at_which_the_frequencies_depend_on_the_text_are_refused(published, tmp_path):
    """Published code with a factor scales the base from max_trained_positions on; up to there it changes nothing."""
    folder = shutil.copytree(published("embed"), tmp_path / "scaled")
    edit_config(folder, n_positions=4 * LIMIT, max_trained_positions=16, rotary_scaling_factor=2)
    assert read_config(folder).max_position_embeddings == describe(folder).spec.max_length == 16
    with gte_deploy.load(folder, backend="torch") as model:
        with pytest.raises(InputError, match="16"):
            model.encode("the river is old. " * 8)
        with gte_deploy.load(published("embed"), backend="torch") as plain:
            np.testing.assert_array_equal(model.encode("the river is old"), plain.encode("the river is old"))
    edit_config(folder, rotary_scaling_factor=None)
    assert read_config(folder).max_position_embeddings == 4 * LIMIT
    assert read_config(edit_config(folder, n_positions=-1)).max_position_embeddings == 2048


def test_a_head_with_some_of_its_biases_is_refused(tmp_path):
    folder = make_family_checkpoint(tmp_path, "nomic_bert")
    tensors = load_file(folder / "model.safetensors")
    dense = tensors.pop("cls.predictions.transform.dense.bias")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: cls\.predictions\.transform\.dense\.bias"):
        load_model(folder)
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias") + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 missing: cls\.predictions\.bias"):
        load_model(folder)
    assert dense.any()


@pytest.mark.parametrize("task", CLASSES)
def test_there_and_back_between_the_layouts_is_bit_for_bit(task, published, tmp_path):
    native = convert(published(task), tmp_path / "native", layout="native")
    own = getattr(transformers, native.model_class).from_pretrained(tmp_path / "native").eval()
    with torch.inference_mode():
        expected = own(torch.tensor([ROWS[0]]))[0][0].numpy()
    reference = PublishedModel(published(task))
    compute = {"fill-mask": reference.logits, "embed": reference.hidden, "classify": reference.labels}[task]
    np.testing.assert_allclose(compute(ROWS[0]), expected, rtol=0, atol=2e-4)
    convert(tmp_path / "native", tmp_path / "again", layout="original")
    before, after = (load_file(folder / "model.safetensors") for folder in (published(task), tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, wanted = (read_config(tmp_path / name).to_dict() for name in ("again", "native"))
    assert {**again, "architectures": None} == {**wanted, "architectures": None}
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    raw = json.loads((published(task) / "config.json").read_text()) | {"vocab_size": 128}
    shared = fields.keys() & raw.keys() - {"pad_vocab_size_multiple", "embd_pdrop"}
    assert len(shared) > 20 and {name: fields[name] for name in shared} == {name: raw[name] for name in shared}


def test_what_the_published_layout_cannot_hold_is_refused(tmp_path):
    masked = load_model(make_family_checkpoint(tmp_path / "masked", "nomic_bert", intermediate_size=256))
    with pytest.raises(
        CheckpointError, match=r"cls\.predictions\.bias is not zero, and the original layout has no such"
    ):
        save_model(masked, tmp_path / "out", layout="original")
    tagger = load_model(make_family_checkpoint(tmp_path / "tagger", "nomic_bert", "token-classify"))
    with pytest.raises(ConfigError, match="the original layout of Nomic BERT has no class for token-classify"):
        save_model(tagger, tmp_path / "out", layout="original")
    narrow = load_model(make_family_checkpoint(tmp_path / "narrow", "nomic_bert", "embed", intermediate_size=80))
    with pytest.raises(ConfigError, match="intermediate_size is 80, and the original layout .* multiples of 256 alone"):
        save_model(narrow, tmp_path / "out", layout="original")


def test_the_number_of_parameters_is_the_published_one(tmp_path):
    """nomic-embed-text-v1 and -v1.5, in model.safetensors on the hub."""
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED_FIELDS, "architectures": ["NomicBertModel"]}))
    with torch.device("meta"):
        model = NOMIC_BERT.model_class("embed")(read_config(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == 136_731_648


def test_every_field_that_the_class_reads_or_the_published_files_have_is_in_the_table():
    from transformers.models.nomic_bert import modeling_nomic_bert

    read = set(re.findall(r"config\.([a-z]\w*)", inspect.getsource(modeling_nomic_bert)))
    assert {"hidden_act", "rope_parameters", "layer_norm_eps"} <= read
    own = [name for name, made in vars(transformers.NomicBertConfig).items() if not name.startswith("_")]
    own = [name for name in own if name in transformers.NomicBertConfig.__dataclass_fields__]
    assert [name for name in (*read, *own, *PUBLISHED_FIELDS) if NOMIC_BERT.fields.field(name) is None] == []


@pytest.mark.parametrize(("passes", "is_merged"), [("PASSES", False), ("MERGED_PASSES", True)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_passes_fire_as_the_family_says(passes, is_merged, activation, tmp_path):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph import fusion
    from gte_deploy.exporters.graph.trace import trace

    model = load_model(make_family_checkpoint(tmp_path, "nomic_bert", hidden_act=activation))
    graph = trace(model, task="fill-mask", max_length=LIMIT, pooling=None, logits="masked", opset=20)
    fired = fusion.fuse_graph(graph, sites=NOMIC_BERT.sites(model.config), passes=getattr(fusion, passes))
    own = dict.fromkeys(("qkv", "up_gate", "glu") if is_merged else ("projections",), LAYERS)
    wanted = {"rope": 2 * LAYERS, "attention": LAYERS, "skip_layer_norm": 2 * LAYERS, **own}
    assert fired == wanted


def graph_inputs(places: Sequence[Sequence[int]]) -> dict[str, Any]:
    batch = batch_of(ROWS)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "mask_positions": np.array(places, np.int64),
    }


def run_graph(graph: Any, feed: dict[str, Any]) -> Any:
    import onnx_ir
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph.model).SerializeToString())
    return session.run(None, {tensor.name: feed[tensor.name] for tensor in graph.inputs})


@pytest.mark.parametrize(("task", "options"), [("fill-mask", {}), ("embed", {"pooling": "cls"}), ("classify", {})])
def test_the_last_layer_computes_only_the_rows_that_are_asked_for(task, options, published):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.graph.parts import parts_of

    reference, places = PublishedModel(published(task)), [[0, 3], [1, 1], [2, LIMIT - 2]]
    spec = dataclasses.replace(describe(published(task)).spec, **options)
    expected = {
        "fill-mask": lambda: [reference.logits(ROWS[row])[token] for row, token in places],
        "embed": lambda: [reference.hidden(row)[0] for row in ROWS],
        "classify": lambda: [reference.labels(row) for row in ROWS],
    }[task]()
    for whole in build_graphs(load_model(published(task)), task=task, max_length=LIMIT, **options).values():
        part = parts_of(whole, spec)["answer"]
        np.testing.assert_allclose(run_graph(part, graph_inputs(places))[0], expected, rtol=0, atol=2e-4)
        assert any(str(node.name).startswith("asked_rows/") for node in part.model.graph)


@pytest.mark.parametrize("removes_padding", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_for_cuda_compute_what_numpy_computes(removes_padding, precision, published):
    """Emulated on the CPU: FP16 rounds after every operator."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.targets.cuda.graph import cuda_graph
    from gte_deploy.exporters.verification.emulation import cpu_emulation

    model, reference, places = (
        load_model(published("fill-mask")),
        PublishedModel(published("fill-mask")),
        [[0, 3], [1, 1]],
    )
    plain = build_graphs(model, task="fill-mask", max_length=LIMIT)["openvino"]
    sites = NOMIC_BERT.sites(model.config)
    graph = cuda_graph(plain, sites=sites, precision=precision, removes_padding=removes_padding)
    assert graph.fusions["packed_attention" if removes_padding else "flash"] == LAYERS
    found = dict(
        zip([o.name for o in graph.outputs], run_graph(cpu_emulation(graph), graph_inputs(places)), strict=True)
    )
    atol = 1e-4 if precision == "fp32" else 0.1  # of logits up to 30
    expected = [reference.logits(ROWS[row])[token] for row, token in places]
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=atol)
    for states, row in zip(found["last_hidden_state"], ROWS, strict=True):
        np.testing.assert_allclose(states[: len(row)], reference.hidden(row), rtol=0, atol=atol)


def test_gated_units_for_tensorrt_are_in_fp32_and_their_types_fit(published):
    """ONNX's own inference of types judges: an engine refuses a graph in which two operands differ."""
    pytest.importorskip("onnxscript")
    import onnx
    import onnx_ir

    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph
    from gte_deploy.exporters.targets.tensorrt.layouts import PADDED, PADDING_FREE

    model = load_model(published("fill-mask"))
    plain, sites = build_graphs(model, task="fill-mask", max_length=LIMIT)["openvino"], NOMIC_BERT.sites(model.config)
    for layout, attention in ((PADDED, "qkv"), (PADDING_FREE, "packed_attention")):
        graph = tensorrt_graph(plain, "fp16", sites=sites, layout=layout)
        assert graph.fusions == {attention: LAYERS, "up_gate": LAYERS}
        gates = [node for node in graph.model.graph if node.op_type == "Sigmoid" and "layers" in str(node.name)]
        assert len(gates) == LAYERS
        for gate in gates:
            (silu,) = (use.node for use in gate.outputs[0].uses())
            (product,) = (use.node for use in silu.outputs[0].uses())
            assert {node.op_type for node in (silu, product)} == {"Mul"}
            types = {value.dtype for node in (gate, silu, product) for value in (*node.inputs, *node.outputs)}
            assert types == {onnx_ir.DataType.FLOAT}
        if layout is PADDED:
            onnx.shape_inference.infer_shapes(onnx_ir.to_proto(graph.model), check_type=True, strict_mode=True)


def test_a_silu_alone_is_no_gated_unit():
    """As in the head of fill-mask: the product with the own sigmoid is not multiplied by another value."""
    import onnx_ir as ir

    from gte_deploy.exporters.graph.editing import Mismatch
    from gte_deploy.exporters.graph.fusion.gated_unit import require_gated_unit

    x, other = (ir.Value(name=name) for name in ("x", "other"))
    sigmoid = ir.node("Sigmoid", [x], name="sigmoid")
    silu = ir.node("Mul", [x, sigmoid.outputs[0]], name="silu")
    with pytest.raises(Mismatch, match="is used by nothing, not by one Mul"):
        require_gated_unit(sigmoid)
    up = ir.node("Mul", [silu.outputs[0], other], name="up")
    found = require_gated_unit(sigmoid)
    assert (found.gate, found.up, found.product) == (x, other, up)
    silu.replace_input_with(0, other)
    with pytest.raises(Mismatch, match="silu does not multiply sigmoid by its own input"):
        require_gated_unit(sigmoid)


@pytest.fixture(scope="module")
def bundles() -> dict[str, Path]:
    return {}


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_a_bundle_fills_masks_as_numpy_does(backend, published, bundles, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    from gte_deploy.exporters.export import export

    checkpoint = published("fill-mask")
    if not bundles:
        result = export(checkpoint, tmp_path_factory.mktemp("bundle") / "nomic")
        assert {engine.engine for engine in result.parity.engines if engine.passed} == {"onnxruntime", "openvino"}
        (check,) = result.parity.checks
        assert check.passed and check.compared["answers"] > 0 and not check.skipped
        assert check.compared["rotation frequencies"] == 4
        bundles["nomic"] = result.path
    reference, tokenizer = PublishedModel(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint)
    with gte_deploy.load(checkpoint if backend == "torch" else bundles["nomic"], backend=backend) as model:
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            logits = reference.logits(ids)[ids.index(tokenizer.mask_token_id)]
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            best = np.argsort(-scores[: len(SPELLING)])[:5]  # the other rows pad the vocabulary
            found = model.fill_mask(text, top_k=5)
            assert [answer["token"] for answer in found] == best.tolist()
            np.testing.assert_allclose([answer["score"] for answer in found], scores[best], rtol=1e-3)


def test_an_embedder_answers_as_sentence_transformer_does(published, tmp_path):
    """nomic-embed-text-v1.5: mean pooling, prompts for tasks, and leading dimensions that can be kept alone."""
    pytest.importorskip("onnxscript")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from gte_deploy.exporters.export import export

    folder = shutil.copytree(published("embed"), tmp_path / "model")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LIMIT, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS, "truncate_dim": 16}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("SentenceTransformer") and not check.skipped
    spec = result.manifest.spec
    assert (spec.pooling, spec.normalize, spec.truncate_dim, spec.max_length) == ("mean", True, 16, LIMIT)
    assert {name: prompt for name, prompt in spec.prompts.items() if prompt} == PROMPTS

    convert(folder, tmp_path / "native", layout="native")
    library = sentence_transformers.SentenceTransformer(str(tmp_path / "native"), device="cpu")
    texts = ["the river is old", "the city"]
    with gte_deploy.load(result.path) as model:
        for options in ({"prompt_name": "query"}, {"prompt_name": "document", "truncate_dim": 8}):
            expected = library.encode(texts, **options)
            assert expected.shape[1] == options.get("truncate_dim", 16)
            np.testing.assert_allclose(model.encode(texts, **options), expected, rtol=0, atol=2e-5)
        # The first dimensions of the mean of all tokens with the prompt, by NumPy.
        tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), PublishedModel(folder)
        pooled = reference.hidden(tokenizer(PROMPTS["query"] + texts[0])["input_ids"]).mean(axis=0)
        expected = pooled[:16] / np.linalg.norm(pooled) if spec.normalize else pooled[:16]
        np.testing.assert_allclose(model.encode(texts[0], prompt_name="query"), expected, rtol=0, atol=2e-5)


def test_a_reranker_answers_as_cross_encoder_does(published, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("sentence_transformers")
    from gte_deploy.exporters.export import export

    folder = make_published(tmp_path / "model", "classify", words=len(SPELLING), num_labels=1)
    make_tokenizer("nomic_bert").save_pretrained(folder)
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("CrossEncoder") and not check.skipped
    assert result.manifest.spec.token_types
    tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), PublishedModel(folder)
    encoded = tokenizer("the river", "the old city")
    assert 1 in encoded["token_type_ids"]
    logit = reference.labels(encoded["input_ids"], encoded["token_type_ids"])[0]
    with gte_deploy.load(result.path) as model:
        np.testing.assert_allclose(model.predict([("the river", "the old city")]), 1 / (1 + np.exp(-logit)), atol=1e-5)


def test_a_sparse_model_answers_as_sparse_encoder_does(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("sentence_transformers")
    from gte_deploy.exporters.export import export

    folder = add_sparse_modules(make_family_checkpoint(tmp_path / "splade", "nomic_bert", initializer_range=0.1))
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("SparseEncoder") and check.compared["answers"] > 0


def test_a_bundle_for_cuda_has_no_padding(published, tmp_path):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    result = export(published("embed"), tmp_path / "bundle", target="cuda", precision="fp16", pooling="mean")
    fusions = result.manifest.graphs["onnxruntime"].fusions
    assert result.parity.passed and fusions["packed_attention"] == LAYERS and fusions["glu"] == LAYERS
