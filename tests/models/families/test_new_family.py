"""A second architecture costs one file: `bert.py` beside this one, from a checkpoint to a verified bundle's answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

import gte_deploy  # noqa: E402
from factories import SPELLING  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ConfigError, ExportError  # noqa: E402
from gte_deploy.core.spec import SparseSpec  # noqa: E402
from gte_deploy.models import families  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.config import read_config, task_of  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.field_tables import document  # noqa: E402
from gte_deploy.models.heads import HeadOptions, make_heads  # noqa: E402
from gte_deploy.training.model import model_config  # noqa: E402

LAYERS = 3
LENGTH = 48
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TEXTS = ("the [MASK] is old.", "the city and [MASK] river")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertForMaskedLM with its tokenizer, saved by transformers itself."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(SPELLING),
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=LENGTH,
        # Far from the tiny weights of a fresh model: a missing or doubled part of the embedding must show.
        initializer_range=0.4,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    transformers.BertTokenizer({word: i for i, word in enumerate(SPELLING)}, model_max_length=LENGTH).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def bert(register_family: Any) -> Any:
    """The family, registered."""
    return register_family("bert", "BERT")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return transformers.AutoModelForMaskedLM.from_pretrained(checkpoint).eval()


def test_without_its_line_it_is_refused_by_name(checkpoint):
    for read in (task_of, read_config, describe, load_model):
        with pytest.raises(ConfigError, match=r"model_type is 'bert'; expected one of \"gte\", \"new\""):
            read(checkpoint)


def test_weights_are_read_strictly(bert, checkpoint, reference):
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
def test_a_missing_tensor_is_named(bert, checkpoint, tmp_path, name, said):
    tensors = load_file(checkpoint / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path)


def test_a_field_that_the_model_cannot_honour_is_refused(bert, checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "position_embedding_type": "relative_key"}))
    with pytest.raises(ConfigError, match=r"position_embedding_type is 'relative_key'; expected 'absolute'"):
        read_config(tmp_path)


def test_the_page_of_fields_shows_its_table(bert):
    (section,) = [part for part in document().split("\n## ") if part.startswith(f"{bert.fields.name}\n")]
    assert (
        "| `position_embedding_type` | **fixed** `'absolute'`: Only an embedding of each place is computed. |"
        in section
    )


def test_a_task_that_the_family_does_not_do_is_refused(bert, checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": ["BertForSequenceClassification"]}))
    assert task_of(tmp_path) == "classify"
    with pytest.raises(CheckpointError, match="task is 'classify'; expected one of fill-mask, embed$"):
        load_model(tmp_path)


def test_save_and_load_are_inverse(bert, checkpoint, tmp_path):
    model = load_model(checkpoint)
    save_model(model, tmp_path, layout="native")
    again, own = load_model(tmp_path), transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and torch.equal(own.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="expected one of BertForMaskedLM, BertModel in layout native$"):
        save_model(model, tmp_path, layout="original")


def test_the_encoder_alone(bert, checkpoint, reference):
    encoder = load_model(checkpoint, task="embed")
    ids = torch.tensor([[2, 60, 61, 4, 3]])
    with torch.inference_mode():
        assert torch.equal(encoder(ids).last_hidden_state, reference.bert(ids).last_hidden_state)


def test_the_description(bert, checkpoint):
    spec = describe(checkpoint).spec
    assert (spec.task, spec.max_length, spec.vocab_size, spec.hidden_size) == ("fill-mask", LENGTH, len(SPELLING), 32)
    assert spec.token_types and spec.type_vocab_size == 2


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("PASSES", {"rope": 0, "attention": 3, "projections": 3, "skip_layer_norm": 6}),
        ("MERGED_PASSES", {"rope": 0, "attention": 3, "qkv": 3, "up_gate": 0, "glu": 0, "skip_layer_norm": 6}),
    ],
)
def test_passes_fire_as_the_family_says(bert, checkpoint, passes, expected):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph import fusion
    from gte_deploy.exporters.graph.trace import trace

    model = load_model(checkpoint)
    graph = trace(model, task="fill-mask", max_length=LENGTH, pooling=None, logits="masked", opset=20)
    chosen = getattr(fusion, passes)
    assert fusion.fuse_graph(graph.clone(), sites=bert.sites(model.config), passes=chosen) == expected
    # What the family does not list must not fire, and what it lists must.
    with pytest.raises(ExportError, match=r"'attention' fired 3 times, and this architecture has 0 sites"):
        fusion.fuse_graph(graph.clone(), sites={}, passes=chosen)
    with pytest.raises(ExportError, match=r"'rope' fired 0 times, and this architecture has 6 sites"):
        fusion.fuse_graph(graph.clone(), sites=families.family_of_type("gte").sites(model.config), passes=chosen)


@pytest.mark.parametrize(("task", "options"), [("fill-mask", {}), ("embed", {"pooling": "cls"})])
def test_the_last_layer_computes_only_the_rows_that_are_asked_for(bert, checkpoint, reference, task, options):
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


def test_rows_without_padding_give_the_same_states(bert, checkpoint):
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


def test_training_refuses_it(bert, checkpoint):
    with pytest.raises(ConfigError, match="model_type 'bert'; training knows GTE alone"):
        model_config(str(checkpoint))


def test_a_splade_head_of_another_form_is_refused(bert, checkpoint):
    with pytest.raises(ConfigError, match="BertOnlyMLMHead has no dense, layer_norm, decoder"):
        make_heads(load_model(checkpoint), HeadOptions("sparse", sparse=SparseSpec("splade")))


def sparse_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with the modules of a SparseEncoder."""
    shutil.copytree(checkpoint, folder)
    types = "sentence_transformers.sparse_encoder.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{types}.MLMTransformer"},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{types}.SpladePooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_SpladePooling").mkdir()
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps({"pooling_strategy": "max"}))
    return folder


def test_a_sparse_checkpoint_is_refused_by_name(bert, checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    folder = sparse_checkpoint(checkpoint, tmp_path / "sparse")
    assert task_of(folder) == "sparse"
    refusal = "BertOnlyMLMHead has no dense, layer_norm, decoder. Take the task fill-mask"
    with pytest.raises(ConfigError, match=refusal):
        gte_deploy.load(folder, backend="torch")
    with pytest.raises(ConfigError, match=refusal):
        export(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with gte_deploy.load(folder, backend="torch", task="fill-mask") as model:
        assert len(model.fill_mask(TEXTS[0], top_k=2)) == 2


def test_a_head_that_the_family_does_not_have_is_refused_by_name(bert, checkpoint):
    with pytest.raises(ConfigError, match="'bert' have no head for token-classify; expected one of fill-mask$"):
        make_heads(load_model(checkpoint), HeadOptions("sparse", sparse=SparseSpec("token-weights")))


def test_the_reference_computes_with_the_heads_of_the_family(bert, checkpoint):
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


def test_a_shorter_bundle_keeps_the_rows_of_the_table_of_positions(bert, checkpoint, tmp_path):
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


def test_cuda_keeps_padding_alone(bert, checkpoint, tmp_path):
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


def test_tensorrt_without_padding_is_refused(bert, checkpoint):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph
    from gte_deploy.exporters.targets.tensorrt.layouts import PADDING_FREE

    model = load_model(checkpoint)
    plain = build_graphs(model, task="fill-mask", max_length=LENGTH)["openvino"]
    sites = families.fusion_sites(model)
    assert tensorrt_graph(plain, "fp16", sites=sites).fusions == {"qkv": LAYERS, "up_gate": 0}
    with pytest.raises(ExportError, match="the attention of its family has no padding-free form"):
        tensorrt_graph(plain, "fp16", sites=sites, layout=PADDING_FREE)


def test_a_lower_precision_is_that_of_all_its_layers(bert, checkpoint):
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
    bert, checkpoint, reference, bundles, tmp_path_factory, backend
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
        for text in TEXTS:
            expected = pipe(text, top_k=5)
            found = model.fill_mask(text, top_k=5)
            assert [answer["token"] for answer in found] == [answer["token"] for answer in expected]
            assert [answer["token_str"] for answer in found] == [answer["token_str"] for answer in expected]
            assert [answer["sequence"] for answer in found] == [answer["sequence"] for answer in expected]
            np.testing.assert_allclose(
                [answer["score"] for answer in found], [answer["score"] for answer in expected], rtol=1e-4
            )
