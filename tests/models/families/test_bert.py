"""BERT, from a checkpoint that transformers wrote to a verified bundle's answers."""

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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

import gte_deploy  # noqa: E402
from factories import SPELLING, add_sparse_modules  # noqa: E402
from family_checkpoints import (  # noqa: E402
    LIMIT,
    SUFFIXES,
    assert_fills_as_the_pipeline,
    edit_config,
    make_family_checkpoint,
)
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ConfigError, ExportError  # noqa: E402
from gte_deploy.core.spec import SparseSpec  # noqa: E402
from gte_deploy.models import families  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.config import read_config, task_of  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.families.bert import BERT, HIDDEN_ACTIVATIONS  # noqa: E402
from gte_deploy.models.field_tables import document  # noqa: E402
from gte_deploy.training.model import model_config  # noqa: E402
from gte_deploy.training.recipe import load_recipe  # noqa: E402

LAYERS = 3
LENGTH = LIMIT
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TEXTS = ("the [MASK] is old.", "the city and [MASK] river")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertForMaskedLM with its tokenizer, saved by transformers itself."""
    return make_family_checkpoint(tmp_path_factory.mktemp("bert"), "bert", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return transformers.AutoModelForMaskedLM.from_pretrained(checkpoint).eval()


def test_weights_are_read_strictly(checkpoint, reference):
    model = load_model(checkpoint)
    assert type(model) is transformers.BertForMaskedLM and not model.training
    assert model.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    ids = torch.tensor([[2, 60, 61, 4, 3]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert.encoder.layer.1.output.dense.bias", r"1 missing: encoder\.layer\.1\.output\.dense\.bias"),
        ("cls.predictions.bias", r"1 missing: cls\.predictions\.bias"),
    ],
)
def test_a_missing_tensor_is_named(checkpoint, tmp_path, name, said):
    tensors = load_file(checkpoint / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path)


def test_a_field_that_the_model_cannot_honour_is_refused(checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "position_embedding_type": "relative_key"}))
    with pytest.raises(ConfigError, match=r"position_embedding_type is 'relative_key'; expected 'absolute'"):
        read_config(tmp_path)


def test_the_page_of_fields_shows_its_table():
    (section,) = [part for part in document().split("\n## ") if part.startswith(f"{BERT.fields.name}\n")]
    assert (
        "| `position_embedding_type` | **fixed** `'absolute'`: Only an embedding of each place is computed. |"
        in section
    )


def test_save_and_load_are_inverse(checkpoint, tmp_path):
    model = load_model(checkpoint)
    save_model(model, tmp_path, layout="native")
    again, own = load_model(tmp_path), transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and torch.equal(own.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="expected one of BertForMaskedLM, BertModel, .* in layout native$"):
        save_model(model, tmp_path, layout="original")


def test_the_encoder_alone(checkpoint, reference):
    encoder = load_model(checkpoint, task="embed")
    ids = torch.tensor([[2, 60, 61, 4, 3]])
    with torch.inference_mode():
        assert torch.equal(encoder(ids).last_hidden_state, reference.bert(ids).last_hidden_state)


def test_the_description(checkpoint):
    spec = describe(checkpoint).spec
    assert (spec.task, spec.max_length, spec.vocab_size, spec.hidden_size) == ("fill-mask", LENGTH, len(SPELLING), 32)
    assert spec.token_types and spec.type_vocab_size == 2


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("PASSES", {"attention": 3, "projections": 3, "skip_layer_norm": 6}),
        ("MERGED_PASSES", {"attention": 3, "qkv": 3, "skip_layer_norm": 6}),
    ],
)
def test_passes_fire_as_the_family_says(checkpoint, passes, expected):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph import fusion
    from gte_deploy.exporters.graph.trace import trace

    model = load_model(checkpoint)
    graph = trace(model, task="fill-mask", max_length=LENGTH, pooling=None, logits="masked", opset=20)
    chosen = getattr(fusion, passes)
    fired = fusion.fuse_graph(graph.clone(), sites=BERT.sites(model.config), passes=chosen)
    assert fired == expected
    # What the family does not list must not fire, and what it lists must.
    with pytest.raises(ExportError, match=r"'attention' fired 3 times, and this architecture has 0 sites"):
        fusion.fuse_graph(graph.clone(), sites={}, passes=chosen)
    with pytest.raises(ExportError, match=r"'rope' fired 0 times, and this architecture has 6 sites"):
        fusion.fuse_graph(graph.clone(), sites=families.family_of_type("gte").sites(model.config), passes=chosen)


@pytest.mark.parametrize(("task", "options"), [("fill-mask", {}), ("embed", {"pooling": "cls"})])
def test_the_last_layer_computes_only_the_rows_that_are_asked_for(checkpoint, reference, task, options):
    pytest.importorskip("onnxscript")
    import onnx_ir
    import onnxruntime

    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.graph.parts import parts_of

    ids = np.array([[2, 60, 61, 4, 3], [2, 62, 3, 0, 0]])
    feed = {
        "input_ids": ids,
        "attention_mask": (ids != 0).astype(np.int64),
        "mask_positions": np.array([[0, 3], [1, 1]]),
    }
    with torch.inference_mode():
        encoded = (torch.tensor(ids), torch.tensor(feed["attention_mask"]))
        first = reference.bert(*encoded).last_hidden_state[:, 0]
        expected = first if task == "embed" else reference(*encoded).logits[[0, 1], [3, 1]]
    spec = dataclasses.replace(describe(checkpoint).spec, task=task, **options)
    graphs = build_graphs(load_model(checkpoint, task=task), task=task, max_length=LENGTH, **options)
    for whole in graphs.values():
        part = parts_of(whole, spec)["answer"]
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(part.model).SerializeToString())
        found = session.run(None, {tensor.name: feed[tensor.name] for tensor in part.inputs})[0]
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
        assert any(str(node.name).startswith("asked_rows/") for node in part.model.graph)


def test_rows_without_padding_give_the_same_states(checkpoint):
    spec = describe(checkpoint).spec
    ids = np.full((2, 9), spec.pad_token_id)
    ids[0], ids[1, :4] = np.arange(5, 14), (2, 60, 4, 3)
    batch = Batch(ids, (ids != 0).astype(np.int64), np.array([[1, 2]]), token_type_ids=(ids > 8).astype(np.int64))
    padded, packed = (
        TorchBackend(load_model(checkpoint), spec, packed=packed).run(batch, ["last_hidden_state", "logits"])
        for packed in (False, True)
    )
    real = batch.attention_mask == 1
    np.testing.assert_allclose(packed["last_hidden_state"][real], padded["last_hidden_state"][real], rtol=0, atol=2e-5)
    np.testing.assert_allclose(packed["logits"], padded["logits"], rtol=0, atol=2e-5)


def test_training_refuses_it(checkpoint):
    with pytest.raises(ConfigError, match="model_type 'bert'; training knows GTE alone"):
        model_config(load_recipe("gte-en-mlm-tiny", overrides=[f"model={checkpoint}"]), checkpoint)


def test_the_reference_computes_with_the_heads_of_the_family(checkpoint):
    """By the definition of a splade head, log1p(relu(x)) of the largest logit among a row's tokens."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.verification.reference import TorchReference

    model = load_model(checkpoint)
    ids = np.array([[2, 40, 41, 3], [2, 42, 3, 0]])
    batch = Batch(ids, (ids != 0).astype(np.int64))
    with torch.inference_mode():
        logits = model(torch.tensor(ids), attention_mask=torch.tensor(batch.attention_mask)).logits.numpy()
    expected = np.log1p(np.maximum(np.where(ids[:, :, None] != 0, logits, 0.0).max(axis=1), 0.0))
    reference = TorchReference(model, task="sparse", pooling="mean", logits="masked", sparse=SparseSpec("splade"))
    np.testing.assert_allclose(reference.run(batch, ())["sparse_embedding"], expected, rtol=0, atol=2e-6)


def test_a_shorter_bundle_keeps_the_rows_of_the_table_of_positions(checkpoint, tmp_path):
    """A library that reads the bundle's config.json takes the weights of the checkpoint."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    result = export(checkpoint, tmp_path / "bundle", max_length=16)
    assert result.manifest.spec.max_length == 16
    config = transformers.AutoConfig.from_pretrained(result.path)
    assert config.max_position_embeddings == LENGTH
    assert json.loads((result.path / "sentence_bert_config.json").read_text())["max_seq_length"] == 16
    assert transformers.AutoTokenizer.from_pretrained(result.path).model_max_length == 16
    model = transformers.AutoModelForMaskedLM.from_config(config)
    model.tie_weights()
    stored = load_file(checkpoint / "model.safetensors")
    stored.update({name: stored[source] for name, source in TIED.items()})
    model.load_state_dict(stored, strict=True)
    with gte_deploy.load(result.path) as ours, pytest.raises(gte_deploy.InputError, match="input 0 has"):
        ours.fill_mask("the river is old. " * 5 + "[MASK]")


def test_cuda_keeps_padding_alone(checkpoint, tmp_path):
    """Padding is removed around layers whose every operator works on token rows, which takes a gated unit."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    # Left to itself the target removes padding in fp16 where it can.
    result = export(checkpoint, tmp_path / "bundle", target="cuda", precision="fp16")
    assert result.parity.passed and result.manifest.graphs["onnxruntime"].fusions["flash"] == LAYERS
    refusal = "from models of model_type 'bert', which have absolute positions: .* rotary .*Export with padding='keep'"
    for target in ({"target": "cuda"}, {"format": "trt", "onnx_only": True}):
        with pytest.raises(ExportError, match=refusal):
            export(checkpoint, tmp_path / "other", precision="fp16", padding="remove", **target)


def test_tensorrt_without_padding_is_refused(checkpoint):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph
    from gte_deploy.exporters.targets.tensorrt.layouts import PADDING_FREE

    model = load_model(checkpoint)
    plain = build_graphs(model, task="fill-mask", max_length=LENGTH)["openvino"]
    sites = families.fusion_sites(model)
    assert tensorrt_graph(plain, "fp16", sites=sites).fusions == {"qkv": LAYERS}
    with pytest.raises(ExportError, match="the attention of its family has no padding-free form"):
        tensorrt_graph(plain, "fp16", sites=sites, layout=PADDING_FREE)


def test_a_lower_precision_is_that_of_all_its_layers(checkpoint):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.quantization.weight_only import quantize_weights

    graphs = build_graphs(load_model(checkpoint), task="fill-mask", max_length=LENGTH)
    # Queries, keys, values, the output of attention and two of the MLP; and the vocabulary's matrix.
    assert quantize_weights(graphs["onnxruntime"].model, 8)["int8_linears"] == 6 * LAYERS + 1


@pytest.fixture(scope="module")
def bundles() -> dict[str, Path]:
    return {}


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_a_bundle_fills_masks_as_the_pipeline_of_transformers_does(
    checkpoint, reference, bundles, tmp_path_factory, backend
):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    from gte_deploy.exporters.export import export

    if "bert" not in bundles:
        result = export(checkpoint, tmp_path_factory.mktemp("bundle") / "bert")
        assert {engine.engine for engine in result.parity.engines if engine.passed} == {"onnxruntime", "openvino"}
        (check,) = result.parity.checks
        assert check.passed and check.compared["answers"] > 0 and not check.skipped
        assert "rotation frequencies" not in check.compared
        bundles["bert"] = result.path
    pipe = transformers.pipeline(
        "fill-mask", model=reference, tokenizer=transformers.AutoTokenizer.from_pretrained(checkpoint), device="cpu"
    )
    with gte_deploy.load(checkpoint if backend == "torch" else bundles["bert"], backend=backend) as model:
        assert_fills_as_the_pipeline(model, pipe, TEXTS)


@pytest.mark.parametrize("task", SUFFIXES)
def test_each_task_has_its_class_and_its_head(task, tmp_path):
    labels = ("no", "yes", "maybe") if "classify" in task else ("LABEL_0",)
    folder = make_family_checkpoint(tmp_path / "kept", "bert", task, labels=labels)
    names = edit_config(shutil.copytree(folder, tmp_path / "nameless"), architectures=None)
    assert task_of(folder) == task
    if task != "classify":  # its pooler could be that of a token classifier, see the next test
        assert task_of(names) == task
    own = transformers.AutoModelForSequenceClassification if task == "classify" else None
    model = load_model(folder)
    assert type(model).__name__ == BERT.classes[task]
    if own is not None:
        ids = torch.tensor([[2, 60, 61, 4, 3]])
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, own.from_pretrained(folder).eval()(ids).logits)
        assert dict(describe(folder).spec.id2label) == dict(enumerate(labels))


def test_a_classifier_with_a_pooler_is_not_guessed(tmp_path):
    """Token classifiers of old versions of transformers kept the pooler of the pretrained model."""
    folder = make_family_checkpoint(tmp_path / "ner", "bert", "token-classify", labels=("O", "B-PER", "I-PER"))
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    pooler = {"bert.pooler.dense.weight": torch.zeros(size, size), "bert.pooler.dense.bias": torch.zeros(size)}
    save_file(
        {**load_file(folder / "model.safetensors"), **pooler}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert task_of(folder) == "token-classify"
    own = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 60, 61, 4, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(load_model(folder)(ids).logits, own(ids).logits)

    edit_config(folder, architectures=None)
    with pytest.raises(ConfigError, match=r"architectures is None; .* or BertForTokenClassification, .*Name the task"):
        task_of(folder)
    assert type(load_model(folder, task="token-classify")).__name__ == "BertForTokenClassification"
    assert describe(folder, task="token-classify").spec.num_labels == 3
    for facts in (
        {"problem_type": "single_label_classification"},  # only BertForSequenceClassification writes it
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
    ):
        assert task_of(edit_config(shutil.copytree(folder, tmp_path / next(iter(facts))), **facts)) == "classify"


def test_names_of_the_first_checkpoints_and_their_pretraining_head(checkpoint, reference, tmp_path):
    """bert-base-uncased has LayerNorm.gamma and beta, the pooler, and a head for the next sentence."""
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {
        next((name.replace(new, first) for new, first in old.items() if new in name), name): tensor
        for name, tensor in tensors.items()
    }
    size = reference.config.hidden_size
    tensors |= {"bert.pooler.dense.weight": torch.zeros(size, size), "bert.pooler.dense.bias": torch.zeros(size)}
    tensors |= {"cls.seq_relationship.weight": torch.zeros(2, size), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, architectures=["BertForPreTraining"])
    assert task_of(folder) == "fill-mask"
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
    assert load_model(folder, task="embed").pooler is not None
    tensors["bert.surplus"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: bert\.surplus"):
        load_model(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'; expected one of gelu, gelu_new"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"num_attention_heads": 5}, r"hidden_size is 32; expected a multiple of num_attention_heads \(5\)"),
        ({"pad_token_id": 70}, "pad_token_id is 70; expected an id below vocab_size"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"id2label": {"1": "x"}}, "id2label is"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0; expected a whole number, 1 to "),
    ],
)
def test_a_value_that_the_model_cannot_honour_is_refused(fields, said, checkpoint, tmp_path):
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=said):
        read_config(edit_config(tmp_path, **fields))


def test_every_field_that_the_class_reads_is_in_the_table():
    from transformers.models.bert import modeling_bert

    read = set(re.findall(r"config\.([a-z]\w*)", inspect.getsource(modeling_bert))) - {"is_encoder_decoder"}
    assert {"hidden_act", "type_vocab_size", "layer_norm_eps"} <= read
    own = [name for name in transformers.BertConfig.__dataclass_fields__ if name in vars(transformers.BertConfig)]
    assert [name for name in (*read, *own) if BERT.fields.field(name) is None] == []


def test_every_activation_is_one_of_transformers():
    assert set(HIDDEN_ACTIVATIONS) <= set(transformers.activations.ACT2FN)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_each_activation_is_traced_as_transformers_computes_it(activation, tmp_path):
    pytest.importorskip("onnxscript")
    import onnx_ir
    import onnxruntime

    from gte_deploy.exporters.graph.build import build_graphs

    folder = make_family_checkpoint(tmp_path, "bert", num_hidden_layers=1, hidden_act=activation)
    own = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = np.array([[2, 60, 61, 4, 3]])
    graph = build_graphs(load_model(folder), task="fill-mask", max_length=LENGTH)["onnxruntime"]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph.model).SerializeToString())
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mask_positions": np.array([[0, 3]])}
    with torch.inference_mode():
        expected = own(torch.tensor(ids)).logits[0, [3]].numpy()
    np.testing.assert_allclose(session.run(["logits"], feed)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["fill-mask", "token-classify"])
def test_types_of_a_graph_in_half_precision_fit_each_other(task, tmp_path):
    """ONNX's own inference of types judges: an engine refuses a graph in which two operands differ."""
    pytest.importorskip("onnxscript")
    import onnx
    import onnx_ir

    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.graph.half import lower_to_half

    folder = make_family_checkpoint(tmp_path, "bert", task, labels=("A", "B", "C"))
    model = build_graphs(load_model(folder), task=task, max_length=LENGTH)["openvino"].model
    assert lower_to_half(model, onnx_ir.DataType.FLOAT16)
    onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model), check_type=True, strict_mode=True)


def test_a_bundle_of_sparse_embeddings_answers_as_sparse_encoder_does(tmp_path):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    folder = add_sparse_modules(make_family_checkpoint(tmp_path / "splade", "bert", initializer_range=0.1))
    assert task_of(folder) == "sparse"
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("SparseEncoder") and check.compared["answers"] > 0
    assert not check.skipped
