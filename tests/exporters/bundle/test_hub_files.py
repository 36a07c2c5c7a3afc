"""A bundle's Hugging Face files say what the bundle does, and the bundle does what the checkpoint's library does."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

import gte_deploy  # noqa: E402
from factories import make_checkpoint  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions  # noqa: E402

TEXTS = ["w5 w6 w7", "W9 w8 [MASK]", "w10 " * 40, "w11"]
PAIRS = [("w5 w6", "w7 W8"), ("w9", "w10 w11 w12"), ("w13 " * 30, "w14 " * 9)]
WIDTH = 24
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"


def read(path):
    return json.loads(path.read_text())


def edit(path, **fields):
    path.write_text(json.dumps({**(read(path) if path.exists() else {}), **fields}))


def with_dense(folder, *, pooling):
    """Lower-cased texts, a default prompt, two Dense modules, a Normalize module, a limit, and vectors cut short."""
    from sentence_transformers.models import Dense

    torch.manual_seed(3)
    for name, layer in {
        "2_Dense": Dense(32, 48),
        "3_Dense": Dense(48, WIDTH, activation_function=torch.nn.Identity(), use_residual=True),
    }.items():
        (folder / name).mkdir()
        layer.save(str(folder / name))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Dense", "Dense")]
    kinds.append(("4_Normalize", "Normalize"))
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(kinds)
            ]
        )
    )
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    edit(folder / "sentence_bert_config.json", do_lower_case=True, max_seq_length=24)
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"q": "w20 w21 "},
        default_prompt_name="q",
        similarity_fn_name="dot",
        truncate_dim=16,
    )
    return folder


@pytest.fixture(scope="module", params=["cls", "mean"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "checkpoint"
    make_checkpoint(folder, task="embed", layout="native", pooling=request.param, layers=1, seed=2)
    return with_dense(folder, pooling=request.param)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    from sentence_transformers import SentenceTransformer

    return partial(SentenceTransformer(str(checkpoint)).encode)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("dense") / "bundle").path


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_embeddings_behind_dense_modules(bundle, theirs, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    with gte_deploy.load(bundle, backend=backend) as model:
        assert model.spec.max_length == 24 and model.spec.embedding_width == WIDTH
        np.testing.assert_allclose(model.encode(TEXTS, truncation=True), theirs(TEXTS), atol=2e-6)
        whole = model.encode(TEXTS, truncation=True, truncate_dim=WIDTH, prompt="")
        np.testing.assert_allclose(whole, theirs(TEXTS, truncate_dim=WIDTH, prompt=""), atol=2e-6)
        other = {"cls": "mean", "mean": "cls"}[model.spec.pooling]
        with pytest.raises(gte_deploy.InputError, match="Dense modules follow its own pooling"):
            model.encode(TEXTS, truncation=True, pooling=other)


def test_the_files_of_the_bundle_say_what_it_does(bundle, checkpoint, theirs):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    assert read(bundle / "tokenizer_config.json")["model_max_length"] == 24
    assert len(AutoTokenizer.from_pretrained(bundle)("w20 " * 50, truncation=True)["input_ids"]) == 24
    config = read(bundle / "config.json")
    assert config["max_position_embeddings"] == 24
    # A browser fetches the weights of a graph only under its name and "_data", and only if the config names the graph.
    (graph,) = config["transformers.js_config"]["use_external_data_format"]
    assert (bundle / "onnx" / graph).is_file() and (bundle / "onnx" / f"{graph}_data").is_file()
    assert read(bundle / "config_sentence_transformers.json")["similarity_fn_name"] == "dot"
    # The library reads the same of the bundle as of the checkpoint, given weights of the kind that it loads.
    whole = bundle.with_name("whole")
    shutil.copytree(bundle, whole, dirs_exist_ok=True)
    shutil.copyfile(checkpoint / "model.safetensors", whole / "model.safetensors")
    again = SentenceTransformer(str(whole))
    assert (again.max_seq_length, again.similarity_fn_name, again.truncate_dim) == (24, "dot", 16)
    np.testing.assert_allclose(again.encode(TEXTS), theirs(TEXTS), atol=2e-6)
    assert AutoTokenizer.from_pretrained(bundle)("W5 W6")["input_ids"] == [2, 5, 6, 3]


def test_a_limit_above_the_checkpoints_own_is_told(checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    told = []
    bundle = export(checkpoint, tmp_path / "bundle", max_length=100, progress=told.append).path
    assert "the bundle takes 100 tokens; the checkpoint's own limit is 24" in told
    theirs = SentenceTransformer(str(checkpoint))
    theirs.max_seq_length = 100
    with gte_deploy.load(bundle, backend="onnx") as model:
        np.testing.assert_allclose(model.encode(TEXTS), theirs.encode(TEXTS), atol=2e-6)


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int8-weight"},
        {"target": "cuda"},
        {"target": "cuda", "precision": "bf16"},
        {"format": "trt", "tensorrt": TensorRTOptions(onnx_only=True)},
    ],
    ids=str,
)
def test_dense_modules_in_every_kind_of_graph(checkpoint, options, tmp_path):
    result = export(checkpoint, tmp_path / "bundle", **options)
    (graph, *_) = result.manifest.graphs.values()
    assert {output.name: output.shape for output in graph.outputs}["sentence_embedding"] == ("batch", WIDTH)
    assert result.parity.passed


RERANKERS = {
    "config.json": lambda f: edit(f / "config.json", sentence_transformers={"activation_fn": "torch.nn.Tanh"}),
    "before version 4": lambda f: edit(
        f / "config.json", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity"
    ),
    "prompts": lambda f: (
        edit(
            f / "config_sentence_transformers.json",
            model_type="CrossEncoder",
            activation_fn="torch.nn.modules.activation.Softplus",
            prompts={"q": "w20 "},
            default_prompt_name="q",
        ),
        (f / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": TRANSFORMER}])),
        edit(
            f / "sentence_bert_config.json",
            transformer_task="sequence-classification",
            module_output_name="scores",
            modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
        ),
    ),
}


@pytest.mark.parametrize("change", RERANKERS.values(), ids=RERANKERS)
def test_rerankers(change, tmp_path):
    from sentence_transformers import CrossEncoder

    folder = make_checkpoint(tmp_path / "checkpoint", task="classify", layout="native", layers=1, type_vocab_size=2)
    change(folder)
    expected = CrossEncoder(str(folder)).predict(PAIRS)
    bundle = export(folder, tmp_path / "bundle", max_length=128).path
    with gte_deploy.load(bundle, backend="onnx") as model:
        np.testing.assert_allclose(model.predict(PAIRS), expected, atol=2e-5)
    shutil.copyfile(folder / "model.safetensors", bundle / "model.safetensors")
    reloaded = CrossEncoder(str(bundle))
    np.testing.assert_allclose(reloaded.predict(PAIRS), expected, atol=1e-6)
    assert reloaded.max_length == read(bundle / "tokenizer_config.json")["model_max_length"] == 128
    if (bundle / "sentence_bert_config.json").is_file():
        assert read(bundle / "sentence_bert_config.json")["max_seq_length"] == 128


def test_an_adapter_is_part_of_the_export(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer, GteModel

    make_checkpoint(tmp_path / "base", task="embed", layout="native", layers=1)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(GteModel.from_pretrained(tmp_path / "base"), config).eval()
    adapted.save_pretrained(tmp_path / "adapted")
    edit(tmp_path / "adapted" / "adapter_config.json", base_model_name_or_path="../base")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = adapted(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    result = export(tmp_path / "adapted", tmp_path / "bundle", max_length=32)
    with gte_deploy.load(result.path, backend="onnx") as model:
        np.testing.assert_allclose(model.encode(TEXTS[0]), expected[0, 0].numpy(), atol=2e-5)
    assert result.manifest.source["sha256"] != export(tmp_path / "base", tmp_path / "plain").manifest.source["sha256"]
