"""RoBERTa and XLM-R: positions after the padding's row, their heads, their tokenizers, from checkpoint to bundle."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gte_deploy  # noqa: E402
from family_checkpoints import (  # noqa: E402
    LAYERS,
    LIMIT,
    MASKS,
    PREFIXES,
    SUFFIXES,
    assert_fills_as_the_pipeline,
    edit_config,
    make_embedder,
    make_family_checkpoint,
    make_reranker,
    unigram_pieces,
)
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.choice import int8_unit  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ConfigError, InputError  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.config import read_config, task_of  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.families import family_of, family_of_type  # noqa: E402

KINDS = ("roberta", "xlm-roberta")
PAD = 1
AUTO = {
    "fill-mask": "AutoModelForMaskedLM",
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "token-classify": "AutoModelForTokenClassification",
}
TEXTS = ("the river is old and the <mask> is old.", "Paris is <mask>")
# Model type, sizes that differ from RoBERTa's base, and the published number of the encoder's parameters.
PUBLISHED = [
    ("bert", {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}, 109_482_240),
    ("roberta", {"vocab_size": 50265}, 124_645_632),
    ("xlm-roberta", {"vocab_size": 250002}, 278_043_648),
    ("bert", {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "large": True}, 335_141_888),
    ("roberta", {"vocab_size": 50265, "large": True}, 355_359_744),
    ("xlm-roberta", {"vocab_size": 250002, "large": True}, 559_890_432),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes the checkpoint of a kind and a task once."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, task: str = "fill-mask") -> Path:
        if (kind, task) not in made:
            labels = ("no", "yes", "maybe") if "classify" in task else ("LABEL_0",)
            made[kind, task] = make_family_checkpoint(tmp_path_factory.mktemp("f") / kind, kind, task, labels=labels)
        return made[kind, task]

    return make


def ragged(rows: tuple[list[int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of rows that are padded on the right."""
    ids = np.full((len(rows), max(map(len, rows))), PAD)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


# The last row spells the padding token in its text: its mask is 1, and transformers gives it no position.
IDS, MASK = ragged(([0, 20, 21, 22, 23, 24, 2], [0, 30, 2], [0, 40, PAD, 41, 2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", SUFFIXES)
def test_each_task_is_read_as_transformers_reads_it(kind, task, checkpoints, tmp_path):
    folder = checkpoints(kind, task)
    nameless = edit_config(shutil.copytree(folder, tmp_path / "nameless"), architectures=None)
    assert task_of(folder) == task_of(nameless) == task
    model, own = load_model(folder), getattr(transformers, AUTO[task]).from_pretrained(folder).eval()
    assert type(model) is type(own)
    with torch.inference_mode():
        found, expected = (each(torch.tensor(IDS), torch.tensor(MASK))[0] for each in (model, own))
    real = MASK == 1 if found.ndim == 3 else slice(None)
    torch.testing.assert_close(found[real], expected[real])
    save_model(model, tmp_path / "saved", layout="native")
    again = getattr(transformers, AUTO[task]).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["fill-mask", "classify", "token-classify"])
def test_rows_without_padding_give_the_same_logits(kind, task, checkpoints):
    folder = checkpoints(kind, task)
    own = getattr(transformers, AUTO[task]).from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = own(torch.tensor(IDS), torch.tensor(MASK)).logits.numpy()
    places = np.argwhere(MASK == 1)
    batch = Batch(IDS, MASK, places)
    for packed in (False, True):
        backend = TorchBackend(load_model(folder), describe(folder).spec, packed=packed)
        found = backend.run(batch, ["logits"])["logits"]
        if task == "classify":
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        else:
            at_places = found if task == "fill-mask" else found[tuple(places.T)]
            np.testing.assert_allclose(at_places, expected[tuple(places.T)], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_is_the_number_of_places(kind, checkpoints, tmp_path):
    folder = checkpoints(kind)
    assert describe(folder).spec.max_length == LIMIT
    config = read_config(folder)
    assert config.max_position_embeddings == LIMIT + 2 and family_of(config).max_tokens(config) == LIMIT
    # Without a limit of its own the tokenizer leaves it to the table.
    shutil.copytree(folder, tmp_path / "free")
    file = tmp_path / "free" / "tokenizer_config.json"
    stored = {name: value for name, value in json.loads(file.read_text()).items() if name != "model_max_length"}
    file.write_text(json.dumps(stored))
    assert describe(tmp_path / "free").spec.max_length == LIMIT
    with pytest.raises((IndexError, RuntimeError)), torch.inference_mode():  # the place after the last
        load_model(folder)(torch.full((1, LIMIT + 1), 20))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pad_token_id": 3}, r"pad_token_id is 3, and positions are counted from it; expected 1, the tokenizer's"),
        ({"pad_token_id": "one"}, "pad_token_id is 'one'"),
        ({"max_position_embeddings": 2}, r"max_position_embeddings is 2; expected more than pad_token_id \(1\) \+ 1"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; expected 'absolute'"),
    ],
)
def test_a_config_without_these_positions_is_refused(fields, said, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("xlm-roberta"), tmp_path / "edited")
    with pytest.raises(ConfigError, match=said):
        describe(edit_config(folder, **fields))


def test_padding_without_an_id_is_refused(checkpoints, tmp_path):
    raw = json.loads((checkpoints("roberta") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "pad_token_id": None}))
    with pytest.raises(ConfigError, match="pad_token_id is None; expected a whole number"):
        read_config(tmp_path)


def test_a_pooler_beside_the_head_is_left_out_and_named(checkpoints, tmp_path, caplog):
    """xlm-roberta-base and older cross-encoders have one that no head reads."""
    from safetensors.torch import load_file, save_file

    for task in ("fill-mask", "classify"):
        folder = shutil.copytree(checkpoints("xlm-roberta", task), tmp_path / task)
        tensors = load_file(folder / "model.safetensors")
        tensors["roberta.pooler.dense.weight"] = torch.zeros(32, 32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with caplog.at_level(logging.INFO, logger="gte_deploy"):
            load_model(folder)
        assert f"the task {task} has none: roberta.pooler.dense.weight" in caplog.text
        assert task_of(edit_config(folder, architectures=None)) == task
    with pytest.raises(CheckpointError, match="unexpected: classifier"):
        load_model(tmp_path / "classify", task="embed")


@pytest.mark.parametrize(("kind", "sizes", "count"), PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(kind, sizes, count, tmp_path):
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    table = {"max_position_embeddings": 514, "type_vocab_size": 1}
    fields = {**(large if "large" in sizes else base), **table, **sizes, "model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        model = family_of_type(kind).model_class("embed")(read_config(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_vocabulary_of_xlm_r_is_read_whole(tmp_path):
    """250,002 rows; the description and the weights need no second copy of the table."""
    folder = make_family_checkpoint(tmp_path, "xlm-roberta", "embed", vocab_size=250_002, num_hidden_layers=1)
    transformers.XLMRobertaTokenizer(vocab=unigram_pieces(250_002), model_max_length=LIMIT).save_pretrained(folder)
    own = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["the w249800 river", "река w7"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    assert encoded["input_ids"].max() > 240_000
    with gte_deploy.load(folder, backend="torch", task="embed") as model, torch.inference_mode():
        hidden = own(**encoded).last_hidden_state
        mask = encoded["attention_mask"][:, :, None]
        expected = hidden[:, 0] if model.spec.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(model.encode(texts), expected.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("passes", "merged"), [("PASSES", False), ("MERGED_PASSES", True)])
def test_passes_fire_as_the_family_says(passes, merged, checkpoints):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph import fusion
    from gte_deploy.exporters.graph.trace import trace

    model = load_model(checkpoints("roberta", "classify"))
    graph = trace(model, task="classify", max_length=LIMIT, pooling=None, logits="masked", opset=20)
    fired = fusion.fuse_graph(graph, sites=family_of(model.config).sites(model.config), passes=getattr(fusion, passes))
    projections = "qkv" if merged else "projections"
    wanted = {"attention": LAYERS, projections: LAYERS, "skip_layer_norm": 2 * LAYERS}
    assert fired == wanted


@pytest.fixture(scope="module")
def filled(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a RoBERTa for fill-mask."""
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    result = export(checkpoints("roberta"), tmp_path_factory.mktemp("bundle") / "roberta")
    assert result.parity.passed and result.parity.checks[0].compared["answers"] > 0
    return result.path


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_a_bundle_fills_masks_as_the_pipeline_of_transformers_does(backend, checkpoints, filled):
    pytest.importorskip("openvino")
    pipe = transformers.pipeline("fill-mask", model=str(checkpoints("roberta")), device="cpu")
    with gte_deploy.load(checkpoints("roberta") if backend == "torch" else filled, backend=backend) as model:
        assert_fills_as_the_pipeline(model, pipe, TEXTS)


def test_the_graph_counts_positions_as_transformers_does(checkpoints, filled):
    """Also for a padding token that a text spells, and up to the last place of the table."""
    import onnxruntime

    own = transformers.AutoModelForMaskedLM.from_pretrained(checkpoints("roberta")).eval()
    session = onnxruntime.InferenceSession(filled / "onnx" / "model.onnx")
    full = np.full((1, LIMIT), 20)
    for ids, mask in ((IDS, MASK), (full, np.ones_like(full))):
        feed = {"input_ids": ids, "attention_mask": mask}
        with torch.inference_mode():
            expected = own(torch.tensor(ids), torch.tensor(mask)).logits.numpy()[mask == 1]
        np.testing.assert_allclose(session.run(["logits"], feed)[0][mask == 1], expected, rtol=0, atol=1e-4)


def test_a_text_above_the_limit_is_refused(filled):
    with gte_deploy.load(filled) as model, pytest.raises(InputError, match="input 0 has"):
        model.fill_mask("the " * (LIMIT + 3) + MASKS["roberta"])


@pytest.mark.parametrize(
    ("kind", "pooling", "normalize", "prompts"),
    [
        ("bert", "cls", True, {}),
        ("xlm-roberta", "mean", True, {"query": "query: ", "passage": "passage: "}),
        ("modernbert", "cls", False, {}),
    ],
)
def test_an_embedder_answers_as_sentence_transformer_does(kind, pooling, normalize, prompts, tmp_path):
    """bge (BERT, first token), multilingual-e5 (XLM-R, mean) and gte-modernbert-base (first token)."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("sentence_transformers")
    from gte_deploy.exporters.export import export

    folder = make_embedder(tmp_path / "model", kind, pooling=pooling, normalize=normalize, prompts=prompts)
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("SentenceTransformer") and not check.skipped
    spec = result.manifest.spec
    assert (spec.pooling, spec.normalize) == (pooling, normalize)
    assert {name: prompt for name, prompt in spec.prompts.items() if prompt} == prompts


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert", "modernbert"])
def test_a_reranker_answers_as_cross_encoder_does(kind, tmp_path):
    """bge-reranker (XLM-R, own dense layer), ms-marco-MiniLM (BERT, pooler, token types), gte-reranker-modernbert."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("sentence_transformers")
    from gte_deploy.exporters.export import export

    folder = make_reranker(tmp_path / "model", kind)
    result = export(folder, tmp_path / "bundle")
    (check,) = result.parity.checks
    assert check.passed and check.compared["library"].startswith("CrossEncoder") and not check.skipped
    assert result.manifest.spec.token_types == (kind == "bert")


def test_queries_keys_and_values_are_quantized_together(tmp_path):
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.quantization.recipes import groups_of
    from gte_deploy.exporters.quantization.weight_only import quantize_weights

    folder = make_family_checkpoint(tmp_path, "xlm-roberta", "classify")
    graph = build_graphs(load_model(folder), task="classify", max_length=LIMIT)["onnxruntime"]
    groups = groups_of(graph, ())
    layer = "roberta.encoder.layer.0"
    assert {len(groups[f"{layer}.attention.self.qkv"]), len(groups[f"{layer}.intermediate.dense"])} == {3, 1}
    assert quantize_weights(graph.model, 8)["int8_linears"] == 6 * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize(
    ("target", "least_int8"),
    [
        # The search for mixed precision keeps some layers of a random model, above all with weights of 7 bits.
        ({"precision": "int8", "reduce_range": True}, LAYERS),
        pytest.param(
            {"precision": "int8"},
            6 * LAYERS,
            marks=pytest.mark.skipif(int8_unit() is None, reason="without VNNI, sums of 8-bit products overflow"),
        ),
        ({"format": "trt", "onnx_only": True}, 0),
        ({"format": "trt"}, 0),
    ],
)
def test_each_family_is_exported_for_each_engine_within_its_bounds(kind, target, least_int8, tmp_path):
    pytest.importorskip("onnxscript")
    if target.get("format") == "trt" and "onnx_only" not in target:
        pytest.importorskip("tensorrt_rtx")
    from gte_deploy.exporters.export import export

    # TensorRT fuses attention only for heads of a usual size.
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "initializer_range": 0.08}
    folder = make_family_checkpoint(tmp_path / "model", kind, "fill-mask", **sizes)
    result = export(folder, tmp_path / "bundle", **target)
    assert result.parity.passed and result.parity.checks[0].passed
    if least_int8:
        assert result.manifest.graphs["onnxruntime"].fusions["int8_linears"] >= least_int8
