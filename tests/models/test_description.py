"""Checkpoints as a whole, judged by transformers, sentence-transformers and peft themselves."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GteConfig, GteForMaskedLM, GteForSequenceClassification, GteModel

import gte_deploy
from factories import write_tokenizer
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.models.config import task_of
from gte_deploy.models.description import describe
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer

WORDS = ("the", "cat", "sat", "on", "mat", "Paris", "PARIS", "red", "e", "##d", "é", "中", "国", "?", "!", ".")
VOCAB = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
TEXTS = ["the cat sat on the mat", "Paris, the RED cat!", "中国 é the [MASK] [SEP] ed", "", "the " * 40]
HIDDEN = 32


def make_model(folder, cls=GteModel, **config):
    """Write a model of transformers and its tokenizer; the model."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": len(VOCAB) + 8,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "type_vocab_size": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 160000.0},
    }
    model = cls(GteConfig(**{**fields, **config})).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB, max_length=8192)
    return model


def edit(file, **fields):
    data = json.loads(file.read_text()) if file.exists() else {}
    data.update(fields)
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))


def write_modules(folder, *modules, pooling="cls", **settings):
    entries = [("", "Transformer"), ("1_Pooling", "Pooling"), *modules]
    kind = "sentence_transformers.models."
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), "path": p, "type": kind + t} for i, (p, t) in enumerate(entries)])
    )
    edit(folder / "1_Pooling" / "config.json") if (folder / "1_Pooling").exists() else (folder / "1_Pooling").mkdir()
    edit(
        folder / "1_Pooling" / "config.json",
        word_embedding_dimension=HIDDEN,
        pooling_mode_cls_token=pooling == "cls",
        pooling_mode_mean_tokens=pooling == "mean",
    )
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    edit(folder / "sentence_bert_config.json", **settings)


def ids_of(folder, text, **options):
    return gte_deploy.load(folder, backend="torch").tokenize(text, **options)["input_ids"][0].tolist()


def cosine(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return ((found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)).min()


@pytest.fixture
def folder(tmp_path):
    make_model(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def unregistered(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = data["added_tokens"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(data))


TOKENIZERS = {
    "as written": lambda f: None,
    "cased": lambda f: edit(f / "tokenizer_config.json", do_lower_case=False),
    "accents kept": lambda f: edit(f / "tokenizer_config.json", strip_accents=False),
    "no space around CJK": lambda f: edit(f / "tokenizer_config.json", tokenize_chinese_chars=False),
    "the generic class": lambda f: edit(f / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
    "special tokens not registered": unregistered,
    "an added token in the config": lambda f: edit(
        f / "tokenizer_config.json", added_tokens_decoder={str(len(VOCAB)): {"content": "[QRY]", **TOKEN}}
    ),
    "a plain added token": lambda f: edit(
        f / "tokenizer_config.json",
        added_tokens_decoder={str(len(VOCAB)): {"content": "cats", **TOKEN, "special": False}},
    ),
    "an added token that strips": lambda f: edit(
        f / "tokenizer_config.json",
        added_tokens_decoder={str(len(VOCAB)): {"content": "[QRY]", **TOKEN, "lstrip": True, "rstrip": True}},
    ),
    "additional special tokens": lambda f: edit(f / "tokenizer_config.json", additional_special_tokens=["[QRY]"]),
    "extra special tokens": lambda f: edit(f / "tokenizer_config.json", extra_special_tokens=["[QRY]", "[DOC]"]),
    "added_tokens.json": lambda f: (
        edit(f / "added_tokens.json", **{"[QRY]": len(VOCAB)}),
        edit(f / "special_tokens_map.json", additional_special_tokens=["[QRY]"]),
    ),
    "vocab.txt alone": lambda f: (f / "tokenizer.json").unlink(),
    "truncation and padding stored": lambda f: edit(
        f / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0},
    ),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_ids_are_those_of_auto_tokenizer(folder, change, tmp_path):
    change(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    model = gte_deploy.load(folder, backend="torch")
    tokenizer = describe(folder).tokenizer
    (tmp_path / "bundle").mkdir()
    tokenizer.save(tmp_path / "bundle", max_length=64)
    alone, again = load_tokenizer(tmp_path / "bundle"), AutoTokenizer.from_pretrained(tmp_path / "bundle")
    assert again.model_max_length == 64
    for text in [*TEXTS, "[QRY]the cats", "a [QRY] Cat [DOC]", "Éed CATS"]:
        expected = theirs(text)["input_ids"]
        assert model.tokenize(text)["input_ids"][0].tolist() == expected, text
        assert alone.encode_texts([text], max_length=128, truncation=False) == [expected], text
        assert again(text)["input_ids"] == expected, text
        assert alone.decode(expected) == theirs.decode(expected)
    pair = theirs("the cat", "on the mat [QRY]")["input_ids"]
    assert alone.encode_pairs([("the cat", "on the mat [QRY]")], max_length=128, truncation=False) == [pair]


@pytest.mark.parametrize("max_length", [3, 7, 12])
def test_a_tokenizer_may_cut_at_the_beginning(folder, max_length):
    edit(folder / "tokenizer_config.json", truncation_side="left")
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "the red cat sat on the mat in Paris " * 200
    expected = theirs(text, truncation=True, max_length=max_length)["input_ids"]
    assert ids_of(folder, text, truncation=True, max_length=max_length) == expected
    ours = TextTokenizer(**describe(folder).tokenizer.parts())
    for pair in (("the cat", text), (text, "the cat"), (text, text + "red")):
        expected = theirs(*pair, truncation="longest_first", max_length=max_length + 4)["input_ids"]
        assert ours.encode_pairs([pair], max_length=max_length + 4, truncation=True) == [expected]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            CheckpointError,
            "git lfs pull",
        ),
        ("tokenizer.json", "{}", CheckpointError, "AutoTokenizer"),
        ("tokenizer_config.json", "[1]", CheckpointError, "AutoTokenizer"),
        ("tokenizer_config.json", '{"split_special_tokens": true}', ConfigError, "split_special_tokens"),
        ("tokenizer_config.json", '{"truncation_side": "middle"}', CheckpointError, "Truncation side"),
    ],
)
def test_a_tokenizer_that_is_refused(folder, name, content, error, message):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(content)
    if name == "tokenizer_config.json" and content.startswith("{"):
        edit(folder / name, **{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": config["pad_token"]})
    with pytest.raises(error, match=message):
        TextTokenizer(**describe(folder).tokenizer.parts())


def test_a_checkpoint_without_a_vocabulary_is_refused(folder):
    """AutoTokenizer makes a tokenizer without words of it."""
    for file in (folder / "tokenizer.json", *folder.glob("vocab.*")):
        file.unlink()
    assert len(AutoTokenizer.from_pretrained(folder)) < 10
    with pytest.raises(CheckpointError, match="no file with a vocabulary .*tokenizer.json"):
        describe(folder)


def test_the_padding_is_the_tokenizers(folder):
    edit(folder / "config.json", pad_token_id=...)
    assert describe(folder).spec.pad_token_id == AutoTokenizer.from_pretrained(folder).pad_token_id == 0
    edit(folder / "config.json", pad_token_id=3)
    assert describe(folder).spec.pad_token_id == 0


@pytest.mark.parametrize(
    ("settings", "tokenizer", "expected"),
    [
        ({}, {"model_max_length": 100}, 100),
        ({}, {"model_max_length": int(1e30)}, 128),
        ({"max_seq_length": 16}, {"model_max_length": 100}, 16),
        ({"max_seq_length": 120}, {"model_max_length": 100}, 120),
        ({"max_seq_length": None}, {"model_max_length": 32}, 32),
        ({"tokenizer_args": {"model_max_length": 24}}, {"model_max_length": 100}, 24),
        ({"max_seq_length": 16, "processor_kwargs": {"model_max_length": 24}}, {}, 24),
    ],
)
def test_limits_are_those_of_sentence_transformers(folder, settings, tokenizer, expected):
    from sentence_transformers import SentenceTransformer

    write_modules(folder, **settings)
    edit(folder / "tokenizer_config.json", **tokenizer)
    theirs, ours = SentenceTransformer(str(folder)), gte_deploy.load(folder, backend="torch")
    assert ours.spec.max_length == theirs.max_seq_length == expected
    text = "the red cat sat on the mat " * 40
    assert cosine(ours.encode(text, truncation=True), theirs.encode(text)) > 0.99999


def with_dense(folder, *layers):
    from sentence_transformers.models import Dense

    width, modules = HIDDEN, []
    for i, (out, options) in enumerate(layers):
        torch.manual_seed(i + 1)
        path = folder / f"{i + 2}_Dense"
        path.mkdir()
        Dense(width, out, **options).save(str(path))
        modules.append((path.name, "Dense"))
        width = out
    return modules


EMBEDDINGS = {
    "cls": lambda f: write_modules(f),
    "mean": lambda f: write_modules(f, pooling="mean"),
    "normalize": lambda f: write_modules(f, ("2_Normalize", "Normalize")),
    "lowercase": lambda f: (
        write_modules(f, do_lower_case=True),
        edit(f / "tokenizer_config.json", do_lower_case=False),
    ),
    "dense": lambda f: write_modules(f, *with_dense(f, (16, {}))),
    "dense without bias, identity": lambda f: write_modules(
        f, *with_dense(f, (24, {"bias": False, "activation_function": torch.nn.Identity()})), pooling="mean"
    ),
    "two dense, residual, normalize": lambda f: write_modules(
        f,
        *with_dense(
            f, (HIDDEN, {"use_residual": True}), (8, {"activation_function": torch.nn.GELU(), "use_residual": True})
        ),
        ("4_Normalize", "Normalize"),
    ),
    "truncate_dim": lambda f: (
        write_modules(f, ("2_Normalize", "Normalize")),
        edit(f / "config_sentence_transformers.json", truncate_dim=8),
    ),
    "default prompt": lambda f: (
        write_modules(f),
        edit(f / "config_sentence_transformers.json", prompts={"q": "red cat: "}, default_prompt_name="q"),
    ),
    "config arguments": lambda f: write_modules(f, config_args={"layer_norm_eps": 0.5}),
}


@pytest.mark.parametrize("change", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embeddings_are_those_of_sentence_transformers(folder, change):
    from sentence_transformers import SentenceTransformer

    change(folder)
    theirs, ours = SentenceTransformer(str(folder)), gte_deploy.load(folder, backend="torch")
    expected, found = theirs.encode(TEXTS), ours.encode(TEXTS)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_transformer_in_a_folder_of_its_own(folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "0_Transformer")
    write_modules(outer)
    modules = json.loads((outer / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (outer / "modules.json").write_text(json.dumps(modules))
    (outer / "sentence_bert_config.json").rename(outer / "0_Transformer" / "sentence_bert_config.json")
    expected = SentenceTransformer(str(outer)).encode(TEXTS)
    np.testing.assert_allclose(gte_deploy.load(outer, backend="torch").encode(TEXTS), expected, atol=2e-6)


def test_dense_weights_that_do_not_fit(folder):
    write_modules(folder, *with_dense(folder, (16, {})))
    weights = folder / "2_Dense" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "linear.weight": tensors["linear.weight"][:, 1:].contiguous()}, weights)
    with pytest.raises(CheckpointError, match=r"2_Dense.model\.safetensors"):
        gte_deploy.load(folder, backend="torch")
    torch.save(tensors, folder / "2_Dense" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickles"):
        gte_deploy.load(folder, backend="torch")


LORA = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}


def with_adapter(model, folder, **config):
    import peft

    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj"], **config}))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(folder.parent / "base"))
    return adapted.eval()


@pytest.mark.parametrize("place", ["alone", "beside the weights"])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (GteModel, {}),
        (GteModel, {"target_modules": ["o_proj", "up_proj", "down_proj"], "use_dora": True}),
        (GteForSequenceClassification, {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}),
    ],
)
def test_an_adapter_is_merged(tmp_path, place, cls, config):
    pytest.importorskip("peft")
    model = make_model(tmp_path / "base", cls, num_labels=3)
    folder = tmp_path / "adapted"
    if place == "beside the weights":
        shutil.copytree(tmp_path / "base", folder)
    adapted = with_adapter(model, folder, **config)
    if place == "beside the weights":
        edit(folder / "adapter_config.json", base_model_name_or_path="nobody/has-this")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = adapted(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    ours = gte_deploy.load(folder, backend="torch")
    if cls is GteModel:
        found, right = ours.encode(TEXTS[0], pooling="cls"), expected.last_hidden_state[0, 0]
    else:
        found, right = ours.predict(TEXTS[0], activation_fn=lambda logits: logits), expected.logits[0]
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_an_adapter_is_never_ignored(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    with_adapter(make_model(tmp_path / "base"), tmp_path / "adapted")
    folder = tmp_path / "adapted"
    assert task_of(folder) == "embed"
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(
        {**weights, name.replace("layers.0", "layers.9"): weights[name].clone()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        gte_deploy.load(folder, backend="torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(CheckpointError, match="pip install peft"):
        gte_deploy.load(folder, backend="torch")
    monkeypatch.undo()
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin.*pickles"):
        gte_deploy.load(folder, backend="torch")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="base_model_name_or_path|names the base model"):
        gte_deploy.load(folder, backend="torch")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        ("pytorch_model.bin", b"PK", r"pytorch_model\.bin.*weights_only=True.*save_file"),
        ("model.gguf", b"GGUF", "llama.cpp"),
        ("model.onnx", b"", "ONNX graph"),
        ("tf_model.h5", b"", "TensorFlow"),
        ("flax_model.msgpack", b"", "Flax"),
        ("readme.md", b"", "none"),
    ],
)
def test_what_is_there_in_place_of_weights_is_named(folder, name, content, message):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        gte_deploy.load(folder, backend="torch")


def test_quantised_weights_are_refused(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ConfigError, match="quantization_config"):
        gte_deploy.load(folder, backend="torch")


def test_fill_mask_does_not_care_for_modules(tmp_path):
    folder = tmp_path / "checkpoint"
    make_model(folder, GteForMaskedLM)
    before = gte_deploy.load(folder, backend="torch").fill_mask("the [MASK] sat")
    write_modules(folder, ("2_Odd", "WordWeights"), max_seq_length=8, do_lower_case=True)
    assert describe(folder, task="fill-mask").spec.max_length == 128
    with pytest.raises(ConfigError, match="WordWeights"):
        describe(folder)
    (folder / "modules.json").unlink()
    assert gte_deploy.load(folder, backend="torch").fill_mask("the [MASK] sat") == before
