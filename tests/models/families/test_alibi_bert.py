"""JinaBERT v2 and MosaicBERT, from published files to a verified bundle's answers.

Their own code is in the checkpoints and never runs. The judge is `alibi_checkpoints.Float64Alibi`, which computes the
answers in float64 from the stored tensors and the papers' formulas.
"""

from __future__ import annotations

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
from alibi_checkpoints import (  # noqa: E402
    JINA,
    LAYERS,
    MOSAIC,
    PADDED_VOCABULARY,
    Float64Alibi,
    make_alibi_checkpoint,
    published_config,
    ragged_ids,
    tensor_shapes,
)
from family_checkpoints import LIMIT, edit_config  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ConfigError, ExportError  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.config import read_config, task_of  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.families import FAMILIES, family_of, family_of_fields, family_of_type  # noqa: E402
from gte_deploy.models.networks.alibi_bert import alibi_slopes  # noqa: E402

KINDS = (JINA, MOSAIC)
TEXTS = ("the [MASK] is old.", "the city and [MASK] river")
# Kind, sizes and the published number of parameters in millions (model cards; MosaicBERT's paper).
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
PUBLISHED = [
    (JINA, {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}, 33),
    (JINA, BASE, 137),
    (JINA, LARGE, 435),
    (MOSAIC, BASE, 137),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes the checkpoint of a kind and a task once."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, task: str = "fill-mask") -> Path:
        if (kind, task) not in made:
            labels = ("no", "yes", "maybe") if "classify" in task else ()
            folder = tmp_path_factory.mktemp("alibi") / kind
            made[kind, task] = make_alibi_checkpoint(folder, kind, task, labels=labels)
        return made[kind, task]

    return make


# The registry: three families publish config.json with the model_type "bert".


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "bert"),
        ({"position_embedding_type": "alibi"}, "bert"),
        ({"auto_map": {"AutoModel": "somebody--modeling.BertModel"}, "architectures": ["BertModel"]}, "bert"),
        ({"feed_forward_type": "geglu"}, JINA),
        ({"architectures": ["JinaBertModel"]}, JINA),
        ({"auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}}, JINA),
        ({"alibi_starting_size": 512}, MOSAIC),
        ({"auto_map": {"AutoModelForMaskedLM": "mosaicml/mosaic-bert-base--bert_layers.BertForMaskedLM"}}, MOSAIC),
    ],
)
def test_the_family_is_told_from_the_fields(fields, kind):
    assert family_of_fields({"model_type": "bert", **fields}) is family_of_type(kind)


def test_a_plain_bert_with_biased_scores_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "position_embedding_type": "alibi"}))
    with pytest.raises(ConfigError, match="position_embedding_type is 'alibi'; expected 'absolute'"):
        read_config(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_in_memory_names_the_family(kind, checkpoints):
    config = read_config(checkpoints(kind))
    assert config.model_type == kind and family_of(config) is family_of_type(kind)
    assert kind in FAMILIES


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (JINA, {"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'; expected 'alibi'"),
        (JINA, {"position_embedding_type": None}, "position_embedding_type is 'absolute'; expected 'alibi'"),
        (
            JINA,
            {"feed_forward_type": "swiglu"},
            "feed_forward_type is 'swiglu'; expected one of geglu, reglu, original",
        ),
        (JINA, {"emb_pooler": "max"}, "emb_pooler is 'max'; expected 'mean' or null"),
        (
            JINA,
            {"auto_map": {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"}},
            "auto_map names 'jinaai/jina-bert-v2-qk-post-norm.*also normalises queries and keys",
        ),
        (JINA, {"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'"),
        (MOSAIC, {"alibi_starting_size": 0}, "alibi_starting_size is 0; expected a whole number, 1 to "),
        (MOSAIC, {"is_decoder": True}, "is_decoder is True"),
        (MOSAIC, {"num_attention_heads": 5}, r"a multiple of num_attention_heads \(5\)"),
    ],
)
def test_a_value_that_the_network_cannot_honour_is_refused(kind, fields, said, tmp_path):
    config = {**published_config(kind), **fields}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ConfigError, match=said):
        read_config(tmp_path)


def test_a_missing_feed_forward_type_is_that_of_bert(tmp_path):
    folder = make_alibi_checkpoint(tmp_path, JINA, feed_forward_type="original")
    edit_config(folder, feed_forward_type=None)
    assert "mlp" not in dict(load_model(folder).bert.encoder.layer[0].named_children())


@pytest.mark.parametrize(("start", "longest"), [(16, LIMIT), (4 * LIMIT, 4 * LIMIT)])
def test_the_longest_text_of_mosaic_bert(start, longest, tmp_path):
    """Its code takes both lengths, and the checkpoints for 2,048 tokens keep BERT's max_position_embeddings of 512."""
    (tmp_path / "config.json").write_text(json.dumps(published_config(MOSAIC, alibi_starting_size=start)))
    config = read_config(tmp_path)
    assert family_of(config).max_tokens(config) == longest


# The network, against float64.


def test_the_slopes_are_those_that_the_authors_publish():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(12) == [*alibi_slopes(8), *(2.0**-n for n in (0.5, 1.5, 2.5, 3.5))]
    assert alibi_slopes(1) == [2.0**-8] and len(alibi_slopes(16)) == 16
    np.testing.assert_allclose(alibi_slopes(16), 2.0 ** -(np.arange(1, 17) / 2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (JINA, {}),
        (JINA, {"feed_forward_type": "reglu"}),
        (JINA, {"feed_forward_type": "original", "hidden_act": "relu"}),
        (JINA, {"num_attention_heads": 8}),
        (JINA, {"hidden_act": "tanh", "layer_norm_eps": 1e-2}),
        (MOSAIC, {}),
        (MOSAIC, {"num_attention_heads": 12}),
        (MOSAIC, {"hidden_act": "relu", "layer_norm_eps": 1e-2}),
    ],
)
def test_the_network_computes_what_the_papers_say(kind, fields, attention, tmp_path):
    folder = make_alibi_checkpoint(tmp_path, kind, **fields)
    model = load_model(folder, attn_implementation=attention)
    reference = Float64Alibi(folder)
    ids, mask, types = ragged_ids()
    hidden = reference.hidden(ids, mask, types)
    given = {"attention_mask": torch.tensor(mask), "token_type_ids": torch.tensor(types)}
    with torch.inference_mode():
        states = model.bert(torch.tensor(ids), **given).last_hidden_state.numpy()
        logits = model(torch.tensor(ids), **given).logits.numpy()
        # Without padding no mask is made, and the biases are the whole mask.
        alone = model.bert(torch.tensor(ids[:1])).last_hidden_state.numpy()
    real = mask == 1
    np.testing.assert_allclose(states[real], hidden[real], rtol=0, atol=5e-5)
    np.testing.assert_allclose(logits[real], reference.masked_lm(hidden)[real], rtol=0, atol=2e-4)
    np.testing.assert_allclose(alone, reference.hidden(ids[:1], mask[:1]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_of_a_trace_gives_the_same_states(kind, checkpoints):
    """Graphs are traced with eager attention and a mask [B, 1, 1, S] that is added to scores."""
    model = load_model(checkpoints(kind), task="embed", attn_implementation="eager")
    ids, mask, _ = ragged_ids()
    bias = (1.0 - torch.tensor(mask, dtype=torch.float32)) * -10_000.0
    with torch.inference_mode():
        states = model(torch.tensor(ids), attention_mask=bias[:, None, None]).last_hidden_state.numpy()
    np.testing.assert_allclose(
        states[mask == 1], Float64Alibi(checkpoints(kind)).hidden(ids, mask)[mask == 1], rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["classify", "token-classify"])
def test_classifiers_compute_what_the_papers_say(kind, task, checkpoints):
    folder = checkpoints(kind, task)
    assert task_of(folder) == task
    model, reference = load_model(folder), Float64Alibi(folder)
    ids, mask, types = ragged_ids()
    hidden = reference.hidden(ids, mask, types)
    with torch.inference_mode():
        given = {"attention_mask": torch.tensor(mask), "token_type_ids": torch.tensor(types)}
        logits = model(torch.tensor(ids), **given).logits.numpy()
    if task == "classify":
        np.testing.assert_allclose(logits, reference.classify(hidden), rtol=0, atol=1e-4)
    else:
        np.testing.assert_allclose(logits[mask == 1], reference.classify_tokens(hidden)[mask == 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_classifier_learns(kind, checkpoints):
    """`gte-train glue` fine-tunes the class."""
    model = load_model(checkpoints(kind, "classify")).train()
    ids, mask, _ = ragged_ids()
    model(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor([0, 2])).loss.backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    # The bias of the keys adds the same to all scores of a query, which changes no answer.
    assert [name for name in still if not name.endswith("key.bias")] == []


@pytest.mark.parametrize(("kind", "sizes", "millions"), PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(kind, sizes, millions, tmp_path):
    fields = published_config(kind, "embed", vocab_size=30528, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = {} if kind == JINA else {"add_pooling_layer": False}  # MosaicBERT publishes the masked LM alone
    with torch.device("meta"):
        model = family_of_type(kind).model_class("embed")(read_config(tmp_path), **options)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6) == millions
    shapes = tensor_shapes(fields, kind, "embed")
    assert count == sum(np.prod(shape) for name, shape in shapes.items() if kind == JINA or "pooler" not in name)


# Files.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["fill-mask", "embed", "classify"])
def test_both_layouts_keep_every_tensor(kind, task, checkpoints, tmp_path):
    folder = checkpoints(kind, task)
    model = load_model(folder, task=task)
    for layout in ("native", "original"):
        save_model(model, tmp_path / layout, layout=layout)
        again = load_model(tmp_path / layout, task=task)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    stored, written = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "original"))
    assert {name.removeprefix("bert.") for name in stored} == {name.removeprefix("bert.") for name in written}
    for name, tensor in written.items():
        assert torch.equal(tensor, stored[name]), name
    native, original = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("native", "original"))
    published = json.loads((folder / "config.json").read_text())
    for field in ("model_type", "architectures", "auto_map", "vocab_size", "max_position_embeddings"):
        assert original[field] == published[field], field
    # No library takes the weights for those of a plain BERT.
    assert native["model_type"] == kind
    assert kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def test_one_matrix_of_queries_keys_and_values_is_split(checkpoints):
    stored = load_file(checkpoints(MOSAIC) / "model.safetensors")["bert.encoder.layer.1.attention.self.Wqkv.weight"]
    attention = load_model(checkpoints(MOSAIC)).bert.encoder.layer[1].attention.self
    assert torch.equal(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]), stored)


@pytest.mark.parametrize(
    ("kind", "renamed", "said"),
    [
        (JINA, ("bert.encoder.layer.0.mlp.wo.bias", None), r"1 missing: encoder\.layer\.0\.mlp\.wo\.bias"),
        (
            JINA,
            ("bert.encoder.layer.0.mlp.wo.bias", "bert.encoder.layer.0.attention.self.layer_norm_q.weight"),
            r"1 unexpected: bert\.encoder\.layer\.0\.attention\.self\.layer_norm_q\.weight",
        ),
        (
            MOSAIC,
            ("bert.encoder.layer.0.attention.self.Wqkv.bias", None),
            r"layer\.0\.attention\.self\.query\.bias \(encoder\.layer\.0\.attention\.self\.Wqkv\.bias in the original",
        ),
    ],
)
def test_a_tensor_that_is_missing_or_unknown_is_named(kind, renamed, said, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(renamed[0])
    if renamed[1] is not None:
        tensors[renamed[1]] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize(
    ("fields", "task", "pooling"),
    [({"emb_pooler": "mean"}, "embed", "mean"), ({}, "fill-mask", "mean")],
)
def test_a_pooling_in_config_json_makes_an_embedding_model(fields, task, pooling, tmp_path):
    """jina-embeddings-v2 names the class for fill-mask in `architectures`."""
    folder = make_alibi_checkpoint(tmp_path, JINA, **fields)
    description = describe(folder)
    assert (description.task, description.spec.pooling) == (task, pooling)
    assert describe(folder, task="embed").spec.pooling == ("mean" if fields else "cls")
    assert describe(folder).spec.token_types and description.spec.vocab_size == PADDED_VOCABULARY


# Graphs and bundles.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", ["PASSES", "MERGED_PASSES"])
def test_passes_fire_as_the_family_says(kind, passes, checkpoints):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph import fusion
    from gte_deploy.exporters.graph.trace import trace

    model = load_model(checkpoints(kind))
    graph = trace(model, task="fill-mask", max_length=LIMIT, pooling=None, logits="masked", opset=20)
    # One table of biases for all layers, computed from the length.
    assert [node.op_type for node in graph.graph].count("Range") == 1
    sizes = {name: value.const_value.size for name, value in graph.graph.initializers.items()}
    assert all(size < LIMIT * LIMIT for name, size in sizes.items() if "weight" not in name)
    sites, chosen = family_of(model.config).sites(model.config), getattr(fusion, passes)
    fired = fusion.fuse_graph(graph, sites=sites, passes=chosen)
    assert fired == {each.name: sites[each.name] for each in chosen if each.name in sites}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("task", "options"), [("fill-mask", {}), ("embed", {"pooling": "cls"})])
def test_the_last_layer_computes_only_the_rows_that_are_asked_for(kind, task, options, checkpoints):
    pytest.importorskip("onnxscript")
    import dataclasses

    import onnx_ir
    import onnxruntime

    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.graph.parts import parts_of

    folder = checkpoints(kind)
    reference = Float64Alibi(folder)
    ids, mask, _ = ragged_ids()
    feed = {"input_ids": ids, "attention_mask": mask, "mask_positions": np.array([[0, 3], [1, 1]])}
    hidden = reference.hidden(ids, mask)
    expected = hidden[:, 0] if task == "embed" else reference.masked_lm(hidden[[0, 1], [3, 1]])
    spec = dataclasses.replace(describe(folder).spec, task=task, **options)
    for whole in build_graphs(load_model(folder, task=task), task=task, max_length=LIMIT, **options).values():
        part = parts_of(whole, spec)["answer"]
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(part.model).SerializeToString())
        found = session.run(None, {tensor.name: feed[tensor.name] for tensor in part.inputs})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
        assert any(str(node.name).startswith("asked_rows/") for node in part.model.graph)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_padding_are_refused_by_name(kind, checkpoints, tmp_path, monkeypatch):
    spec = describe(checkpoints(kind)).spec
    with pytest.raises(ConfigError, match=f"model_type '{kind}' have alibi positions, which attention without padding"):
        TorchBackend(load_model(checkpoints(kind)), spec, packed=True)
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    monkeypatch.setattr("gte_deploy.models.checkpoint.load_described", None)  # it is refused before that
    for target in ({"target": "cuda"}, {"format": "trt", "onnx_only": True}):
        with pytest.raises(ExportError, match=f"'{kind}', which have alibi positions: .*Export with padding='keep'"):
            export(checkpoints(kind), tmp_path / "bundle", precision="fp16", padding="remove", **target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_precision_is_that_of_all_its_layers(kind, checkpoints):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.quantization.weight_only import quantize_weights

    graphs = build_graphs(load_model(checkpoints(kind)), task="fill-mask", max_length=LIMIT)
    # Queries, keys, values, the output of attention and three of the gated unit; and the vocabulary's matrix.
    assert quantize_weights(graphs["onnxruntime"].model, 8)["int8_linears"] == 7 * LAYERS + 1


@pytest.fixture(scope="module")
def bundles(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that exports the checkpoint of a kind and a task once."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    from gte_deploy.exporters.export import export

    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, task: str) -> Path:
        if (kind, task) not in made:
            result = export(checkpoints(kind, task), tmp_path_factory.mktemp("bundle") / kind)
            assert {engine.engine for engine in result.parity.engines if engine.passed} == {"onnxruntime", "openvino"}
            (check,) = result.parity.checks
            assert check.passed and check.compared["answers"] > 0
            # The report says what stood in for the published code.
            (said,) = check.skipped
            assert f"never runs: the library ran this package's network for {kind}" in said
            assert check.compared["library"].endswith("with the network of gte-deploy")
            made[kind, task] = result.path
        return made[kind, task]

    return make


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_fills_masks_as_float64_does(kind, backend, checkpoints, bundles):
    folder = checkpoints(kind)
    reference, tokenizer = Float64Alibi(folder), transformers.AutoTokenizer.from_pretrained(folder)
    with gte_deploy.load(folder if backend == "torch" else bundles(kind, "fill-mask"), backend=backend) as model:
        for text in TEXTS:
            encoded = tokenizer(text, return_tensors="np")
            ids, mask, types = (encoded[n] for n in ("input_ids", "attention_mask", "token_type_ids"))
            (place,) = np.flatnonzero(ids[0] == tokenizer.mask_token_id)
            logits = reference.masked_lm(reference.hidden(ids, mask, types)[0, place])
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            best = [token for token in np.argsort(-probabilities) if token < len(tokenizer)][:5]
            found = model.fill_mask(text, top_k=5)
            assert [answer["token"] for answer in found] == best
            np.testing.assert_allclose([answer["score"] for answer in found], probabilities[best], rtol=1e-3)


def test_a_bundle_of_a_reranker_scores_as_float64_does(tmp_path):
    """jina-reranker-v1: one label, for pairs of texts."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    folder = make_alibi_checkpoint(tmp_path / "model", JINA, "classify", labels=["LABEL_0"])
    result = export(folder, tmp_path / "bundle")
    assert result.parity.passed
    tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), Float64Alibi(folder)
    pairs = [("the river", "the city is old."), ("is the city old", "and the river.")]
    expected = []
    for pair in pairs:
        encoded = tokenizer(*pair, return_tensors="np")
        hidden = reference.hidden(*(encoded[n] for n in ("input_ids", "attention_mask", "token_type_ids")))
        expected.append(1 / (1 + np.exp(-reference.classify(hidden)[0, 0])))
    with gte_deploy.load(result.path) as model:
        np.testing.assert_allclose(model.predict(pairs), expected, rtol=0, atol=1e-4)


def test_a_bundle_of_an_embedder_encodes_as_float64_does(tmp_path):
    """jina-embeddings-v2: the mean over the tokens, as its config.json says."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    folder = make_alibi_checkpoint(tmp_path / "model", JINA, emb_pooler="mean")
    result = export(folder, tmp_path / "bundle")
    assert result.parity.passed and (result.manifest.spec.task, result.manifest.spec.pooling) == ("embed", "mean")
    tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), Float64Alibi(folder)
    texts = ["the river is old.", "city"]
    expected = [
        reference.hidden(*(tokenizer(text, return_tensors="np")[n] for n in ("input_ids", "attention_mask")))[0].mean(0)
        for text in texts
    ]
    with gte_deploy.load(result.path) as model:
        np.testing.assert_allclose(model.encode(texts), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_library_takes_a_bundle_for_a_plain_bert(kind, bundles):
    """Its config.json is the published one, for engines that run the graph; there are no weights for PyTorch."""
    folder = bundles(kind, "fill-mask")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert" and "auto_map" not in config
    assert family_of_fields(config) is family_of_type(kind)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.AutoModel.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "target",
    [
        {"precision": "int8"},
        {"format": "trt", "onnx_only": True},
        {"format": "trt"},
        {"target": "cuda", "precision": "fp16"},
    ],
)
def test_each_family_is_exported_for_each_engine_within_its_bounds(kind, target, tmp_path):
    pytest.importorskip("onnxscript")
    if target.get("format") == "trt" and "onnx_only" not in target:
        pytest.importorskip("tensorrt_rtx")
    from gte_deploy.exporters.export import export

    # TensorRT fuses attention only for heads of a usual size.
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "scale": 0.08}
    folder = make_alibi_checkpoint(tmp_path / "model", kind, **sizes)
    result = export(folder, tmp_path / "bundle", **target)
    assert result.parity.passed and result.parity.checks[0].passed
    if target.get("precision") == "int8":
        # The search for mixed precision keeps some layers of a random model, whose noise a gated unit multiplies.
        assert result.manifest.graphs["onnxruntime"].fusions["int8_linears"] >= LAYERS
