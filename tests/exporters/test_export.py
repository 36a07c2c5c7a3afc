"""The whole export, checkpoint in and bundle out, for every task and layout; and what happens when it fails."""

import importlib.util
import json
import resource
import stat

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

import gte_deploy  # noqa: E402
from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.onnxruntime import OnnxBackend  # noqa: E402
from gte_deploy.backends.openvino import has_native_bf16  # noqa: E402
from gte_deploy.bundle.inspection import check_graphs, inspect_onnx  # noqa: E402
from gte_deploy.bundle.manifest import open_bundle  # noqa: E402
from gte_deploy.core.errors import CheckpointError, InputError  # noqa: E402
from gte_deploy.core.exit_codes import FAILURE  # noqa: E402
from gte_deploy.core.files import sha256_file  # noqa: E402
from gte_deploy.core.spec import TensorSpec  # noqa: E402
from gte_deploy.exporters.cli import main  # noqa: E402
from gte_deploy.exporters.export import default_output, export  # noqa: E402
from gte_deploy.exporters.verification.report import format_table  # noqa: E402
from gte_deploy.exporters.verification.results import BoundMissedError  # noqa: E402

LENGTH = 32
HIDDEN = "last_hidden_state"


def read(path):
    return json.loads(path.read_text())


def run(bundle, batch):
    manifest = open_bundle(bundle)
    backend = OnnxBackend(bundle / manifest.graphs["onnxruntime"].path, manifest.spec)
    return backend.run(batch, backend.outputs)


@pytest.fixture(scope="module")
def exported(golden_dir, tmp_path_factory):
    """Name -> bundle: one for each task, over the layouts; the golden checkpoints where there is one."""
    folder = tmp_path_factory.mktemp("exported")
    embed = make_checkpoint(
        folder / "embed",
        task="fill-mask",
        layout="native",
        pooling="mean",
        normalize=True,
        prompts={"query": "query: ", "document": ""},
        shards=2,
        layers=1,
        seed=1,
    )
    tokens = make_checkpoint(
        folder / "tokens", task="token-classify", num_labels=3, pack_qkv=False, dtype="float16", layers=1
    )
    results = {
        "fill-mask": export(golden_dir / "mlm", folder / "out/fill-mask", max_length=2048),
        "embed": export(embed, folder / "out/embed", task="embed", pooling="cls", max_length=LENGTH),
        "classify": export(golden_dir / "rerank", folder / "out/classify", max_length=64),
        "token-classify": export(tokens, folder / "out/token-classify", max_length=LENGTH),
    }
    return {task: (result.path, result) for task, result in results.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A fill-mask checkpoint of one layer: what its export leaves is not about depth."""
    return make_checkpoint(tmp_path_factory.mktemp("small") / "small", layers=1)


TASKS = ("fill-mask", "embed", "classify", "token-classify")
OUTPUTS = {
    "fill-mask": {"last_hidden_state": ("batch", "sequence", 32), "logits": ("num_masks", 256)},
    "embed": {"last_hidden_state": ("batch", "sequence", 32), "sentence_embedding": ("batch", 32)},
    "classify": {"last_hidden_state": ("batch", "sequence", 32), "logits": ("batch", 1)},
    "token-classify": {"last_hidden_state": ("batch", "sequence", 32), "logits": ("batch", "sequence", 3)},
}


@pytest.mark.parametrize("task", TASKS)
def test_the_bundle_is_whole_and_says_what_it_is(exported, task):
    bundle, result = exported[task]
    manifest = open_bundle(bundle)
    check_graphs(bundle, manifest)
    assert manifest == result.manifest
    assert manifest.spec.task == task and manifest.precision == "fp32"
    assert set(manifest.graphs) == {"onnxruntime", "openvino"}
    for graph in manifest.graphs.values():
        assert {output.name: output.shape for output in graph.outputs} == OUTPUTS[task]
        names = ["input_ids", "attention_mask"]
        if task == "fill-mask":  # and this checkpoint has two token types
            names += ["mask_positions", "token_type_ids"]
        assert [tensor.name for tensor in graph.inputs] == names
        for file in graph.files:
            assert inspect_onnx(bundle / file.path).external_files == {"model.onnx_data"}
        answers = [{output.name: output.shape for output in part.outputs} for part in graph.parts]
        assert answers == (
            [] if task == "token-classify" else [{k: v for k, v in OUTPUTS[task].items() if k != HIDDEN}]
        )
    assert manifest.graphs["onnxruntime"].fusions["attention"] == read(bundle / "config.json")["num_hidden_layers"]
    assert manifest.graphs["openvino"].fusions == {}
    assert {"torch", "onnx", "onnxruntime", "gte-deploy"} <= set(manifest.versions)
    tree = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert tree == {*manifest.files, "manifest.json"}


@pytest.mark.parametrize("task", TASKS)
def test_every_file_is_readable_by_others(exported, task):
    bundle, _ = exported[task]
    for path in (bundle, *bundle.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_the_source_is_named_without_the_path_of_this_machine(exported, golden_dir):
    bundle, result = exported["fill-mask"]
    weights = sha256_file(golden_dir / "mlm" / "model.safetensors")
    assert result.manifest.source == {"name": "mlm", "sha256": weights}
    assert len(exported["embed"][1].manifest.source["sha256"]) == 64  # of two shards
    for name in ("manifest.json", "report.json", "report.html", "config.json"):
        assert str(golden_dir.parent) not in (bundle / name).read_text()


def test_the_graphs_agree_with_the_golden_results(exported, golden_dir):
    golden = np.load(golden_dir / "mlm" / "expected.npz")
    batch = Batch(*(golden[name].astype(np.int64) for name in ("input_ids", "attention_mask", "mask_positions")))
    results = run(exported["fill-mask"][0], batch)
    real = batch.attention_mask.astype(bool)
    np.testing.assert_allclose(results["last_hidden_state"][real], golden["hidden"][real], atol=1e-4)
    np.testing.assert_allclose(results["logits"], golden["mask_logits"], atol=1e-4)
    ids = golden["long_input_ids"].astype(np.int64)
    long = run(exported["fill-mask"][0], Batch(ids, np.ones_like(ids)))
    np.testing.assert_allclose(long["last_hidden_state"][:, -8:], golden["long_hidden_tail"], atol=5e-4)

    golden = np.load(golden_dir / "rerank" / "expected.npz")
    batch = Batch(golden["input_ids"].astype(np.int64), golden["attention_mask"].astype(np.int64))
    np.testing.assert_allclose(run(exported["classify"][0], batch)["logits"], golden["scores"], atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_transformers_reads_config_and_tokenizer_without_remote_code(exported, task):
    from transformers import AutoConfig, AutoTokenizer

    bundle, result = exported[task]
    config = AutoConfig.from_pretrained(bundle)
    assert config.model_type == "gte" and config.hidden_size == 32
    assert config.max_position_embeddings == result.manifest.spec.max_length
    assert config.architectures[0].startswith("Gte")
    assert AutoTokenizer.from_pretrained(bundle)("w5 w6")["input_ids"] == [2, 5, 6, 3]
    if task == "token-classify":
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_sentence_transformers_reads_the_pooling(exported):
    Pooling = pytest.importorskip("sentence_transformers.models").Pooling

    hidden, mask = torch.randn(1, 3, 32), torch.tensor([[1, 1, 0]])
    for task, expected in (("fill-mask", hidden[:, :2].mean(1)), ("embed", hidden[:, 0])):
        pooling = Pooling.load(str(exported[task][0] / "1_Pooling"))
        pooled = pooling({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
        torch.testing.assert_close(pooled, expected)


def test_the_sentence_transformers_files(exported):
    bundle, _ = exported["embed"]
    kinds = [module["type"].rpartition(".")[2] for module in read(bundle / "modules.json")]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    assert read(bundle / "config_sentence_transformers.json")["prompts"] == {"query": "query: ", "document": ""}
    assert read(bundle / "sentence_bert_config.json")["max_seq_length"] == LENGTH
    plain = read(exported["fill-mask"][0] / "modules.json")
    assert [module["type"].rpartition(".")[2] for module in plain] == ["Transformer", "Pooling"]
    for task in ("classify", "token-classify"):
        assert not (exported[task][0] / "modules.json").exists()


def test_a_bundle_says_the_same_of_itself_as_its_checkpoint(exported, tmp_path):
    from gte_deploy.models.description import describe

    bundle, result = exported["embed"]
    assert describe(bundle, task="embed").spec == result.manifest.spec


@pytest.mark.parametrize("task", TASKS)
def test_the_report(exported, task):
    bundle, result = exported[task]
    report = read(bundle / "report.json")
    assert report["parity"] == json.loads(json.dumps(result.parity.to_json()))
    assert report["parity"]["passed"] is True
    bf16 = [("openvino", "bf16")] if has_native_bf16() else []
    engines = report["parity"]["engines"]
    expected = [("onnxruntime", "fp32"), ("openvino", "fp32"), *bf16]
    assert [(engine["engine"], engine["compute"]) for engine in engines] == expected
    claimed = result.manifest.graphs["openvino"].computes
    assert claimed == tuple(
        engine["compute"] for engine in engines if engine["engine"] == "openvino" and engine["passed"]
    )
    assert len(report["parity"]["not_proven"]) == ("bf16" not in claimed)
    for engine in engines:
        assert engine["max_abs"] <= 2e-4 or engine["compute"] == "bf16"
        assert {1, 2, 17, result.manifest.spec.max_length} <= {case["length"] for case in engine["cases"]}
        assert (engine["cases"][0]["top1"] is not None) == (engine["top1"] is not None) == (task == "fill-mask")
    names = {
        graph.path: [output.name for output in graph.outputs] for graph in result.manifest.graphs["onnxruntime"].files
    }
    assert report["graphs"]["onnxruntime"]["compared"] == names
    for engine in engines:
        assert all(set(case["parts"]) == set(OUTPUTS[task]) - {HIDDEN} for case in engine["cases"]) or len(names) == 1
    assert report["graphs"]["onnxruntime"]["fusions"] == result.manifest.graphs["onnxruntime"].fusions
    assert report["timings_s"]["trace and fuse"] > 0 and report["machine"]["cpus"] >= 1


def test_other_libraries_get_a_fill_mask_graph_that_the_runtime_never_opens(exported, monkeypatch):
    bundle, result = exported["fill-mask"]
    opened, open_graph = [], OnnxBackend._open
    monkeypatch.setattr(OnnxBackend, "_open", lambda backend, graph: opened.append(graph) or open_graph(backend, graph))
    for engine, name in (("onnxruntime", "model"), ("openvino", "model_openvino")):
        graph = result.manifest.graphs[engine]
        assert (graph.path, graph.all_logits.path) == (f"onnx/{name}_masked.onnx", f"onnx/{name}.onnx")
        assert [tensor.name for tensor in graph.all_logits.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
        assert graph.all_logits.outputs[0] == TensorSpec("logits", "float32", ("batch", "sequence", 256))
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        model.fill_mask("w20 [MASK] w30")
        model.encode("w20", output_value="token_embeddings")
    assert {graph.path.name for graph in opened} == {"model_answer.onnx", "model_masked.onnx"}
    report = read(bundle / "report.json")
    for engine in report["parity"]["engines"]:
        compared = [set(case["all_logits"]) for case in engine["cases"] if case["length"] * case["batch"] <= 512]
        assert all(names == ({HIDDEN, "logits"} if engine["compute"] == "fp32" else set()) for names in compared)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_wrong_graph_with_all_logits_is_not_exported(trace_once, spoil, small, tmp_path, engine):
    spoil(engine, lambda weight: weight * 1.01, "all_logits")
    with pytest.raises(BoundMissedError, match="by the graph with all logits") as error:
        export(small, tmp_path / "out", max_length=LENGTH)
    assert {found.engine for found in error.value.report.engines if not found.passed} == {engine}


def test_logits_of_every_token(small, tmp_path):
    result = export(small, tmp_path / "all", logits="all", max_length=LENGTH)
    assert result.manifest.spec.logits == "all"
    assert [tensor.name for tensor in result.manifest.graphs["onnxruntime"].inputs] == ["input_ids", "attention_mask"]
    ids = np.array([[2, 5, 4, 3]])
    logits = run(result.path, Batch(ids, np.ones_like(ids)))["logits"]
    assert logits.shape == (1, 4, 256) and np.isfinite(logits).all()


def test_another_task_and_pooling_than_the_checkpoints_own(exported):
    bundle, result = exported["embed"]
    assert result.manifest.spec.pooling == "cls"
    assert read(bundle / "1_Pooling/config.json")["pooling_mode_cls_token"] is True
    ids = np.array([[2, 5, 6, 3]])
    results = run(bundle, Batch(ids, np.ones_like(ids)))
    np.testing.assert_array_equal(results["sentence_embedding"], results["last_hidden_state"][:, 0])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"task": "sing"}, "task is 'sing'"),
        ({"precision": "fp12"}, "is 'fp12'; expected one of fp32, bf16, int8"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"logits": "some"}, "logits is 'some'"),
        ({"max_length": 7}, "expected 8 to 8,192"),
        ({"max_length": 8193}, "expected 8 to 8,192"),
        ({"task": "embed", "logits": "all"}, "fill-mask"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_work(small, tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        export(small, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_is_not_offered(small, tmp_path):
    with pytest.raises(InputError, match="opset must be an integer from 20 to 23, not 9"):
        export(small, tmp_path / "out", opset=9, max_length=LENGTH)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", layers=1)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "model, name",
    [
        (None, "gte-en-mlm-tiny-onnx-fp32"),
        ("Alibaba-NLP/gte-base-en-v1.5", "gte-base-en-v1.5-onnx-fp32"),
        ("/models/mine/", "mine-onnx-fp32"),
    ],
)
def test_the_default_output(model, name):
    assert str(default_output(model, precision="fp32")) == name


def test_the_default_output_of_this_folder(small, monkeypatch):
    monkeypatch.chdir(small)
    assert str(default_output(".", precision="fp32")) == "small-onnx-fp32"


def shift(weights):
    """As a wrong fusion would."""
    return weights + 0.01


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_wrong_part_of_a_graph_leaves_no_bundle(trace_once, small, tmp_path, spoil, engine):
    spoil(engine, shift, part="answer")
    says = f"(?s){engine} fp32 differs.*logits, by a part of the graph: max abs .*No bundle was written"
    with pytest.raises(BoundMissedError, match=says) as error:
        export(small, tmp_path / "out", max_length=LENGTH)
    assert {found.engine for found in error.value.report.engines if not found.passed} == {engine}
    assert "last_hidden_state" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_wrong_graph_leaves_no_bundle(trace_once, small, tmp_path, spoil, engine):
    spoil(engine, shift)
    with pytest.raises(BoundMissedError, match=f"(?s){engine} fp32 differs.*max abs .*No bundle was written") as error:
        export(small, tmp_path / "out", max_length=LENGTH)
    failed = {found.engine for found in error.value.report.engines if not found.passed}
    assert failed == {engine}
    assert list(tmp_path.iterdir()) == []


def test_without_openvino_there_is_no_graph_for_it_and_the_report_says_so(trace_once, small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    result = export(small, tmp_path / "out", max_length=LENGTH)
    assert set(result.manifest.graphs) == {"onnxruntime"} and "openvino" not in result.manifest.versions
    assert {"onnx/model.onnx", "onnx/model_masked.onnx", "onnx/model_answer.onnx", "onnx/model.onnx_data"} == {
        name for name in result.manifest.files if name.startswith("onnx")
    }
    (sentence,) = result.parity.caveats
    assert "openvino is not installed" in sentence
    assert sentence in (tmp_path / "out" / "report.html").read_text() and sentence in format_table(result.parity)


def test_a_cpu_without_bfloat16_leaves_it_unproven_and_the_report_says_so(trace_once, small, tmp_path, monkeypatch):
    monkeypatch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: False)
    result = export(small, tmp_path / "out", max_length=LENGTH)
    assert [engine.title for engine in result.parity.engines] == ["onnxruntime fp32", "openvino fp32"]
    assert len(result.parity.caveats) == 1 and "bfloat16" in result.parity.caveats[0]


def test_a_wrong_graph_leaves_the_old_bundle(trace_once, small, tmp_path, spoil):
    export(small, tmp_path / "out", max_length=LENGTH)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    spoil("onnxruntime", shift)
    with pytest.raises(BoundMissedError):
        export(small, tmp_path / "out", max_length=LENGTH, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_that_is_a_link_replaces_what_it_points_to(trace_once, small, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    result = export(small, link, max_length=LENGTH)
    assert result.path == link and link.is_symlink()
    assert open_bundle(tmp_path / "real").spec.max_length == LENGTH


def test_a_full_disk_leaves_the_old_bundle(trace_once, small, tmp_path, capsys):
    """RLIMIT_FSIZE stops every write beyond 64 kB, as a full disk would."""
    target = tmp_path / "out"
    export(small, target, max_length=LENGTH)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
    try:
        code = main([str(small), str(target), "--force", "--max-len", str(LENGTH)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == FAILURE
    assert f"gte-export: error: {target}: File too large" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_base_size_checkpoint_in_the_original_layout(tmp_path):
    checkpoint = make_checkpoint(
        tmp_path / "base",
        vocab_size=30528,
        hidden_size=768,
        layers=12,
        heads=12,
        intermediate=3072,
        rope_theta=500_000,
    )
    # Matrices as the family initialises them: those of the tiny checkpoints would make logits of some hundreds at this
    # width, of which float32 itself keeps no four decimals.
    weights = load_file(checkpoint / "model.safetensors")
    scaled = {name: value * (0.02 / value.std()) if value.ndim == 2 else value for name, value in weights.items()}
    save_file(scaled, checkpoint / "model.safetensors")
    result = export(checkpoint, tmp_path / "bundle")
    assert result.parity.passed
    assert {1, 17, 512, 2048, 8192} <= {case.case.length for case in result.parity.engines[0].cases}
    assert open_bundle(tmp_path / "bundle").spec.max_length == 8192
