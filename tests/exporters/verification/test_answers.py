"""Text in, answer out, against the checkpoint's own library: what is sound passes, and no misreading gets by.

The misreadings are made here, in the model that is compared; the judge inside the check is the library.
"""

import dataclasses
import importlib.util
import json
import math
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GteConfig  # noqa: E402
from transformers.models.gte.modeling_gte import GteRotaryEmbedding  # noqa: E402

import gte_deploy  # noqa: E402
from factories import make_checkpoint, write_unigram_tokenizer  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import ParityError  # noqa: E402
from gte_deploy.exporters import export  # noqa: E402
from gte_deploy.exporters.bundle.writer import seal  # noqa: E402
from gte_deploy.exporters.verification.answers import check_answers, check_bundle  # noqa: E402
from gte_deploy.exporters.verification.answers.source_view import native_fields, rotation_frequencies  # noqa: E402
from gte_deploy.exporters.verification.answers.subject import Asked  # noqa: E402
from gte_deploy.model import Model  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.text.tokenization import load_tokenizer  # noqa: E402

LIMIT = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def edit(file, **fields):
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**data, **fields}), encoding="utf-8")


def change(file, what):
    data = json.loads(file.read_text(encoding="utf-8"))
    what(data)
    file.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """`make(**options)`: a checkpoint of one layer, with `unigram` for a tokenizer like XLM-R's."""

    def checkpoint(*, unigram=False, **options):
        options = {"layers": 1, "max_positions": LIMIT, **options}
        folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **options)
        if unigram:
            write_unigram_tokenizer(folder, max_length=options["max_positions"])
            edit(folder / "config.json", pad_token_id=1)
        return folder

    return checkpoint


@pytest.fixture(scope="session")
def embedder(make):
    """With every file that sentence-transformers reads."""
    folder = make(task="embed", pooling="mean", normalize=True, prompts={"query": "w7 w8 ", "document": "w9: "})
    edit(folder / "config_sentence_transformers.json", default_prompt_name="document")
    return folder


def reading(checkpoint, folder, *, read=None, tokenizer=lambda folder: None, **spec):
    """A model of the checkpoint, or of the files `read` in its place, with a tokenizer and a spec altered by hand."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(checkpoint / name, folder / name)
    tokenizer(folder)
    model = gte_deploy.load(checkpoint if read is None else read, backend="torch")
    spec = dataclasses.replace(model.spec, **spec)
    backend = TorchBackend(load_model(model.path, task=spec.task), spec)
    return Model(backend, load_tokenizer(folder), spec, max_batch_tokens=4096, path=folder, backend_reason="a test")


SOUND = {
    "fill-mask": {"layout": "original", "shards": 2},
    "fill-mask, most rows without a token": {"layout": "native", "vocab_size": 30000},
    "fill-mask, native, XLM-R": {"layout": "native", "unigram": True, "vocab_size": 264},
    "embed": {"task": "embed", "layout": "original", "unigram": True, "rope_scaling": {"type": "ntk", "factor": 8.0}},
    "embed, mixed": {"task": "embed", "rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.75}},
    "embed, stored in 16 bits": {"task": "embed", "layout": "native", "dtype": "float16", "normalize": True},
    "classify": {"task": "classify", "layout": "native"},
    "classify, original, XLM-R": {"task": "classify", "num_labels": 3, "unigram": True, "pack_qkv": False},
    "token-classify": {"task": "token-classify", "num_labels": 4, "layout": "original"},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_reading_passes(make, name, capfd):
    options = dict(SOUND[name])
    if options.get("task") == "embed":
        options |= {"pooling": "cls", "prompts": {"query": "w7 w8 ", "passage": ""}}
    checkpoint = make(**options)
    with gte_deploy.load(checkpoint, backend="torch") as model:
        check = check_answers(checkpoint, model)
    assert check.failures == () and check.broken == () and check.skipped == ()
    assert check.compared["texts tokenised"] > 100 and check.compared["answers"] > 10
    assert ("pairs tokenised" in check.compared) == (options.get("task") == "classify")
    assert capfd.readouterr() == ("", "")  # no bars, no warnings


@pytest.mark.parametrize(("task", "tensor"), [("fill-mask", "lm_head.norm.weight"), ("classify", "classifier.weight")])
def test_large_outputs_pass(make, task, tensor):
    """Float32 rounds relative to a logit, and the sigmoid and softmax of large logits show all of that."""
    checkpoint = make(task=task)
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, tensor: weights[tensor] * 300}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with gte_deploy.load(checkpoint, backend="torch") as model:
        assert check_answers(checkpoint, model).failures == ()


def test_a_vocabulary_smaller_than_what_is_looked_at(make):
    checkpoint = make(vocab=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"))
    with gte_deploy.load(checkpoint, backend="torch") as model:
        check = check_answers(checkpoint, model)
    assert check.passed and check.skipped == ()


def without_added_token(folder):
    change(folder / "tokenizer.json", lambda data: data["added_tokens"].pop())
    change(folder / "tokenizer_config.json", lambda data: data.pop("mask_token"))
    change(folder / "special_tokens_map.json", lambda data: data.pop("mask_token"))


def cased(folder):
    change(folder / "tokenizer.json", lambda data: data["normalizer"].update(lowercase=False))
    edit(folder / "tokenizer_config.json", do_lower_case=False)


def with_accents(folder):
    change(folder / "tokenizer.json", lambda data: data["normalizer"].update(strip_accents=False, lowercase=True))
    edit(folder / "tokenizer_config.json", strip_accents=False)


def split_at_spaces(folder):
    change(folder / "tokenizer.json", lambda data: data.update(pre_tokenizer={"type": "WhitespaceSplit"}))
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


EMBEDDERS = {
    "pooling": ({"pooling": "cls"}, "encode of"),
    "Normalize": ({"normalize": False}, "encode of"),
    "default prompt": ({"default_prompt_name": None}, "encode of"),
    "all prompts": ({"prompts": {}, "default_prompt_name": None}, "encode with the prompt 'query'"),
    "text of a prompt": ({"prompts": {"query": "w7 w8", "document": "w9: "}}, "query"),
    "similarity": ({"similarity": "dot"}, "similarity: dot here, cosine"),
    "limit, lower": ({"max_length": LIMIT // 2}, "longest input in tokens: 32 here, 64"),
    "normaliser": ({"tokenizer": cased}, "token ids of"),
    "accents": ({"tokenizer": with_accents}, "token ids of"),
    "splitting": ({"tokenizer": split_at_spaces}, "token ids of"),
    "added token": ({"tokenizer": without_added_token}, "[MASK]"),
    "padding": ({"pad_token_id": 4}, "padding of"),
}


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_misread_embedding_model_is_caught(embedder, tmp_path, name):
    misread, told = EMBEDDERS[name]
    check = check_answers(embedder, reading(embedder, tmp_path / "bundle", **misread))
    assert told in "\n".join(check.failures)
    assert not check.passed


def test_the_same_reading_without_a_fault_passes(embedder, tmp_path):
    assert check_answers(embedder, reading(embedder, tmp_path / "bundle")).passed


@pytest.mark.parametrize(
    ("fields", "spec", "told"),
    [
        ({"max_seq_length": LIMIT, "do_lower_case": True}, {}, "token ids of"),
        ({"max_seq_length": 16, "do_lower_case": False}, {"max_length": LIMIT}, "longest input in tokens: 64 here, 16"),
    ],
    ids=["lower-casing", "limit"],
)
def test_an_ignored_field_of_sentence_bert_config_is_caught(make, tmp_path, fields, spec, told):
    checkpoint = make(task="embed", pooling="cls")
    cased(checkpoint)
    edit(checkpoint / "sentence_bert_config.json", **fields)
    raw = reading(checkpoint, tmp_path / "bundle", **spec)
    assert told in "\n".join(check_answers(checkpoint, raw).failures)


@pytest.mark.parametrize("task", ["fill-mask", "embed", "classify", "token-classify"])
def test_an_ignored_limit_of_the_tokenizer_is_caught(make, tmp_path, task):
    checkpoint = make(task=task, num_labels=2)
    edit(checkpoint / "tokenizer_config.json", model_max_length=24)
    whole = reading(checkpoint, tmp_path / "bundle", max_length=LIMIT)
    assert "longest input in tokens: 64 here, 24" in "\n".join(check_answers(checkpoint, whole).failures)


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_an_ignored_truncation_side_is_caught(make, tmp_path, task):
    checkpoint = make(task=task, layout="native")
    right = lambda folder: change(folder / "tokenizer_config.json", lambda data: data.pop("truncation_side"))  # noqa: E731
    edit(checkpoint / "tokenizer_config.json", truncation_side="left")
    copy = reading(checkpoint, tmp_path / "bundle", read=make(task=task, layout="native"), tokenizer=right)
    assert any("characters)" in line for line in check_answers(checkpoint, copy).failures)


def test_an_added_token_outside_tokenizer_json_is_caught(make, tmp_path):
    checkpoint = make(vocab_size=264)
    token = {"content": "[QRY]", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    edit(checkpoint / "tokenizer_config.json", added_tokens_decoder={"256": {**token, "special": True}})
    without = lambda folder: change(folder / "tokenizer_config.json", lambda d: d.pop("added_tokens_decoder"))  # noqa: E731
    model = reading(checkpoint, tmp_path / "bundle", read=make(vocab_size=264), tokenizer=without)
    assert "[QRY]" in "\n".join(check_answers(checkpoint, model).failures)


def test_zeroed_token_types_are_caught(make, tmp_path):
    checkpoint = make(task="classify", num_labels=3, type_vocab_size=2, layout="native")
    check = check_answers(checkpoint, reading(checkpoint, tmp_path / "bundle", token_types=False))
    told = "\n".join(check.failures)
    assert "token types of" in told and "predict of" in told


@pytest.mark.parametrize("layout", ["original", "native"])
def test_a_dropped_scaling_is_caught(make, tmp_path, layout):
    checkpoint, plain = (
        make(task="embed", layout=layout, pooling="cls", rope_scaling=scaling)
        for scaling in ({"type": "ntk", "factor": 50.0}, None)
    )
    check = check_answers(checkpoint, reading(checkpoint, tmp_path / "bundle", read=plain))
    assert "encode of" in "\n".join(check.failures)


@pytest.mark.parametrize("scaling", [{"type": "ntk", "factor": 8.0}, {"type": "ntk", "factor": 8.0, "mixed_b": 0.5}])
def test_a_scaling_that_our_reader_drops_is_caught(make, monkeypatch, scaling):
    checkpoint = make(task="embed", pooling="cls", rope_scaling=scaling)
    from gte_deploy.models import config

    read = config.read_config(checkpoint)
    read.rope_parameters = {"rope_type": "default", "rope_theta": 160000.0}
    with gte_deploy.load(checkpoint, backend="torch") as model:
        monkeypatch.setattr(config, "read_config", lambda folder: read)
        check = check_answers(checkpoint, model)
    assert "rotation frequencies of config.json" in "\n".join(check.failures)


@pytest.mark.parametrize("where", ["config.json", "config_sentence_transformers.json"])
def test_an_ignored_activation_is_caught(make, tmp_path, where):
    checkpoint = make(task="classify", layout="native")
    identity = "torch.nn.modules.linear.Identity"
    if where == "config.json":
        edit(checkpoint / where, sentence_transformers={"activation_fn": identity, "version": "4.1.0"})
    else:
        edit(checkpoint / where, activation_fn=identity, model_type="CrossEncoder", prompts={})
        kind = "sentence_transformers.base.modules.transformer.Transformer"
        modules = [{"idx": 0, "name": "0", "path": "", "type": kind}]
        (checkpoint / "modules.json").write_text(json.dumps(modules))
        edit(
            checkpoint / "sentence_bert_config.json",
            transformer_task="sequence-classification",
            module_output_name="scores",
            modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
        )
    model = reading(checkpoint, tmp_path / "bundle", read=make(task="classify", layout="native"), activation=None)
    failures = check_answers(checkpoint, model).failures
    assert any(line.startswith("predict of") for line in failures)
    assert not any(line.startswith("predict without activation") for line in failures)


@pytest.mark.parametrize("task", ["classify", "token-classify"])
def test_swapped_labels_are_caught(make, tmp_path, task):
    checkpoint = make(task=task, num_labels=2, layout="native")
    model = reading(checkpoint, tmp_path / "bundle", id2label={0: "LABEL_1", 1: "LABEL_0"})
    assert "labels: " in "\n".join(check_answers(checkpoint, model).failures)


def test_a_dropped_dense_module_is_caught(make, tmp_path):
    plain, checkpoint = (make(task="embed", layout="native", pooling="mean") for _ in range(2))
    (checkpoint / "2_Dense").mkdir()
    dense = {
        "in_features": 32,
        "out_features": 32,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    edit(checkpoint / "2_Dense" / "config.json", **dense)
    weights = {"linear.weight": torch.randn(32, 32), "linear.bias": torch.randn(32)}
    save_file(weights, checkpoint / "2_Dense" / "model.safetensors")
    kind = "sentence_transformers.models.Dense"
    change(
        checkpoint / "modules.json",
        lambda data: data.append({"idx": 2, "name": "2", "path": "2_Dense", "type": kind}),
    )
    check = check_answers(checkpoint, reading(checkpoint, tmp_path / "bundle", read=plain))
    assert check.skipped == ()
    assert "encode of" in "\n".join(check.failures)


# --- what is asked for, and what is not there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "spec"),
    [
        (Asked(pooling="cls"), {"pooling": "cls"}),
        (Asked(limit="asked"), {"max_length": LIMIT // 2}),
        (Asked(limit="shorter"), {"max_length": LIMIT // 2}),
    ],
)
def test_what_was_asked_for_is_no_difference(embedder, tmp_path, asked, spec):
    before = {path: path.read_bytes() for path in embedder.rglob("*") if path.is_file()}
    check = check_answers(embedder, reading(embedder, tmp_path / "bundle", **spec), asked=asked)
    assert check.passed and check.skipped == ()
    assert {path: path.read_bytes() for path in embedder.rglob("*") if path.is_file()} == before


def test_a_missing_library_is_named(embedder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else find(name)
    )
    check = check_answers(embedder, reading(embedder, tmp_path / "bundle", pooling="cls"))
    assert check.passed  # hidden states are compared, and pooling is not
    assert check.compared["library"].startswith("GteModel of transformers")
    assert len(check.skipped) == 1 and "pip install sentence-transformers" in check.skipped[0]


class Noisy:
    """A backend whose numbers are off by `share` of their size, as a lower precision's are."""

    def __init__(self, backend, share):
        self._backend, self._share, self._random = backend, share, np.random.default_rng(0)

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def run(self, batch, outputs):
        def noise(values):
            return self._share * np.sqrt(np.mean(values**2)) * self._random.standard_normal(values.shape)

        found = self._backend.run(batch, outputs)
        return {name: (values + noise(values)).astype(np.float32) for name, values in found.items()}


@pytest.mark.parametrize("task", ["embed", "classify", "fill-mask", "token-classify"])
@pytest.mark.parametrize(
    ("precision", "share", "passes"),
    [("fp32", 1e-6, True), ("fp32", 1e-2, False), ("int8", 1e-2, True), ("int8", 0.6, False), ("fp16", 0.2, False)],
)
def test_the_bounds_follow_the_precision(make, task, precision, share, passes):
    checkpoint = make(task=task, num_labels=3, layout="native", pooling="mean" if task == "embed" else None)
    with gte_deploy.load(checkpoint, backend="torch") as model:
        noisy = Noisy(model._backend, share)
        tokenizer = load_tokenizer(checkpoint)
        other = Model(noisy, tokenizer, model.spec, max_batch_tokens=4096, path=checkpoint, backend_reason="a test")
        assert check_answers(checkpoint, other, precision=precision).passed == passes


@pytest.mark.parametrize("misread", [{"pooling": "cls"}, {"normalize": False}, {"default_prompt_name": None}])
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_misreading_is_caught_within_the_bounds_of_a_lower_precision(embedder, tmp_path, misread, precision):
    model = reading(embedder, tmp_path / "bundle", **misread)
    assert not check_answers(embedder, model, precision=precision).passed


def test_an_engine_for_gpus_is_represented_by_pytorch(embedder, tmp_path):
    """Of a TensorRT bundle nothing runs here but its tokenizer and what its spec says."""
    check = check_bundle(embedder, reading(embedder, tmp_path / "bundle"), "fp16")
    assert check.passed and check.compared["answers"] > 10
    assert "PyTorch computed the answers" in check.skipped[0]
    assert not check_bundle(embedder, reading(embedder, tmp_path / "misread", normalize=False), "fp16").passed


@pytest.mark.parametrize(
    ("fields", "linear"),
    [
        ({"rope_theta": 20000, "rope_scaling": {"type": "ntk", "factor": 8.0}}, True),
        ({"rope_theta": 20000, "rope_scaling": {"rope_type": "ntk", "factor": 8.0}}, True),
        ({"rope_parameters": {"rope_type": "ntk", "type": "ntk", "factor": 8.0, "rope_theta": 20000}}, True),
        ({"rope_theta": 20000, "rope_scaling": None}, False),
    ],
)
def test_rotation_frequencies_of_the_original_layout(fields, linear):
    raw = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, **fields}
    equal = (
        {"rope_type": "linear", "rope_theta": 160000.0, "factor": 8.0 ** (2 / 16)}
        if linear
        else {"rope_type": "default", "rope_theta": 20000.0}
    )
    config = GteConfig(hidden_size=64, num_attention_heads=4, rope_parameters=equal)
    np.testing.assert_allclose(rotation_frequencies(raw), GteRotaryEmbedding(config).inv_freq.numpy(), rtol=1e-6)


def test_mixed_scaling_by_hand_and_as_the_library_is_given_it():
    scaling = {"type": "ntk", "factor": 8.0, "mixed_b": 0.75}
    raw = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rope_theta": 20000,
        "rope_scaling": scaling,
    }
    wanted = [20000 ** (-2 * i / 8) / math.exp(math.log(8) / 4**0.75 * (i + 1) ** 0.75) for i in range(4)]
    np.testing.assert_allclose(rotation_frequencies(raw), wanted, rtol=1e-12)
    given = GteConfig(hidden_size=32, num_attention_heads=4, rope_parameters=native_fields(raw)["rope_parameters"])
    np.testing.assert_allclose(GteRotaryEmbedding(given).inv_freq.numpy(), wanted, rtol=1e-6)


# --- in an export, and of a bundle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(embedder, tmp_path_factory):
    lines = []
    result = export.export(embedder, tmp_path_factory.mktemp("bundle") / "bundle", progress=lines.append)
    return result, lines


def test_an_export_tells_and_reports_it(bundle):
    result, lines = bundle
    assert "compare answers with sentence-transformers" in lines
    report = json.loads((result.path / "report.json").read_text())
    (check,) = [check for check in report["parity"]["checks"] if check["name"] == "answers"]
    assert check["passed"] and check["compared"]["answers"] > 10
    assert "compare answers with sentence-transformers" in report["timings_s"]
    assert [check.name for check in result.parity.checks] == ["answers"]


def test_an_export_of_a_misread_checkpoint_leaves_no_bundle(embedder, tmp_path, monkeypatch):
    read = export.describe

    def misread(*arguments, **options):
        found = read(*arguments, **options)
        return dataclasses.replace(found, spec=dataclasses.replace(found.spec, normalize=False))

    monkeypatch.setattr(export, "describe", misread)
    with pytest.raises(ParityError, match="encode of"):
        export.export(embedder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def _seal_again(result, folder, **spec):
    shutil.copytree(result.path, folder)
    (folder / "manifest.json").unlink()
    manifest = result.manifest
    seal(folder, dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, **spec)))


@pytest.mark.parametrize("altered", [{}, {"normalize": False}, {"max_length": LIMIT // 2}, "tokenizer"])
def test_verify_compares_a_bundle_with_its_checkpoint(bundle, embedder, tmp_path, altered, capsys):
    folder = tmp_path / "bundle"
    _seal_again(bundle[0], folder, **(altered if isinstance(altered, dict) else {}))
    if altered == "tokenizer":
        cased(folder)
        shutil.move(folder, tmp_path / "altered")
        _seal_again(dataclasses.replace(bundle[0], path=tmp_path / "altered"), folder)
    from gte_deploy.cli import main

    code = main(["verify", str(folder), "--checkpoint", str(embedder)])
    out, err = capsys.readouterr()
    if altered in ({}, {"max_length": LIMIT // 2}):
        assert code == 0 and "It answers as" in out
    else:
        assert code != 0 and "does not answer as" in err
