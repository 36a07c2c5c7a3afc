"""encode_sparse and decode: against SparseEncoder, against the published rule of token weights, and what is refused."""

import json
import shutil

import numpy as np
import pytest

import gte_deploy
from factories import add_sparse_modules, make_checkpoint, raise_token_weights
from gte_deploy.core.spec import SparseSpec
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.config import task_of
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.sparse_heads import SpladeHead
from gte_deploy.models.sparse_modules import read_query_weights, read_sparse_modules
from gte_deploy.tasks.sparse import SparseEmbedding
from gte_deploy.text.tokenization import load_tokenizer
from runtime_models import PIECES, make_word_checkpoint

TEXTS = [
    "Paris is the capital of France.",
    "a",
    "",
    "the old man and the [MASK] walked! readable unknownword 中国",
    "the king isn't old. " * 9,
]
BACKENDS = ["torch", "onnx", "openvino"]
POOLINGS = [("max", "relu"), ("max", "log1p_relu"), ("sum", "relu"), ("sum", "log1p_relu")]
# float32 sums in another order; sums over the tokens of a text are some ten times as large as maxima.
TOLERANCE = {"max": 2e-5, "sum": 2e-4}
SIZE = 128


@pytest.fixture(scope="module")
def libraries():
    """SparseEncoder and its modules, quietly."""
    sparse_encoder = pytest.importorskip("sentence_transformers.sparse_encoder")
    pytest.importorskip("sentence_transformers.base.modules.router")
    return sparse_encoder


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    return make_word_checkpoint(tmp_path_factory.mktemp("sparse") / "mlm", seed=7)


@pytest.fixture(scope="module")
def saved(libraries, masked_lm, tmp_path_factory):
    """`saved(pooling, activation, router=False, **options)`: a folder that SparseEncoder has written."""
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseStaticEmbedding, SpladePooling

    made = {}

    def save(pooling, activation, *, router=False, legacy=False, **options):
        key = (pooling, activation, router, legacy, json.dumps(options))
        if key not in made:
            kind = MLMTransformer if legacy else Transformer
            arguments = {} if legacy else {"transformer_task": "fill-mask"}
            modules = [kind(str(masked_lm), **arguments), SpladePooling(pooling, activation)]
            if router:
                torch = pytest.importorskip("torch")
                weight = torch.linspace(0.1, 5, len(modules[0].tokenizer.get_vocab()))
                query = SparseStaticEmbedding(modules[0].tokenizer, weight=weight)
                modules = [Router.for_query_document([query], modules)]
            folder = tmp_path_factory.mktemp("saved") / "model"
            libraries.SparseEncoder(modules=modules, device="cpu", **options).save_pretrained(str(folder))
            made[key] = folder
        return made[key]

    return save


def sparse_encoder(folder):
    from sentence_transformers import SparseEncoder

    return SparseEncoder(str(folder), device="cpu")


def dense(embeddings):
    return np.stack([embedding.to_dense() for embedding in embeddings])


def assert_like(found, expected, tolerance):
    """Found is [N, V] of the model's vocabulary, expected may lack the rows that pad it."""
    expected = expected.to_dense().numpy()
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=0, atol=tolerance)
    assert not found[:, expected.shape[1] :].any()
    assert (expected != 0).any(axis=1).sum() >= len(expected) - 1  # the comparison is of something


# The graphs of two of the four are enough.
@pytest.mark.parametrize(
    ("backend", "pooling", "activation"),
    [(backend, *each) for backend in BACKENDS for each in (POOLINGS if backend == "torch" else POOLINGS[::3])],
)
def test_as_sparse_encoder(backend, pooling, activation, saved, load_on):
    folder = saved(pooling, activation, legacy=pooling == "sum")
    expected = sparse_encoder(folder).encode(TEXTS)
    with load_on(backend, folder, num_threads=1) as model:
        assert model.spec.task == "sparse"
        assert model.spec.sparse == SparseSpec("splade", activation=activation, pooling=pooling)
        for batch_size in (1, 32):
            assert_like(dense(model.encode_sparse(TEXTS, batch_size=batch_size)), expected, TOLERANCE[pooling])


@pytest.mark.parametrize(
    "arguments", [{"layer_norm_eps": 0.5}, {"rope_parameters": {"rope_theta": 40.0, "rope_type": "default"}}]
)
@pytest.mark.parametrize("name", ["config_args", "config_kwargs"])
def test_config_arguments_reach_the_weights_that_are_loaded_alone(name, arguments, saved, tmp_path):
    torch = pytest.importorskip("torch")
    folder = shutil.copytree(saved("max", "relu"), tmp_path / "model")
    plain = sparse_encoder(folder).encode(TEXTS).to_dense()
    _set(folder, "sentence_bert_config.json", **{name: arguments})
    judge = sparse_encoder(folder)
    expected = judge.encode(TEXTS).to_dense()
    assert (expected - plain).abs().max() > 1e-3
    tokens = judge[0].tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = load_model(folder)(**tokens).logits * tokens["attention_mask"][:, :, None]
    torch.testing.assert_close(logits.relu().log1p().amax(1)[:, : expected.shape[1]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_router_of_weights_and_a_model(backend, saved, load_on):
    """As SparseEncoder writes one: the transformer has a folder of its own."""
    prompts = {"query": "the ", "document": "old "}
    folder = saved("max", "log1p_relu", router=True, prompts=prompts)
    judge = sparse_encoder(folder)
    with load_on(backend, folder, num_threads=1) as model:
        for name in ("encode_query", "encode_document"):
            found = dense(getattr(model, name)(TEXTS))
            assert_like(found, getattr(judge, name)(TEXTS), TOLERANCE["max"])
        assert_like(dense(model.encode_sparse(TEXTS)), judge.encode(TEXTS), TOLERANCE["max"])
        query = model.encode_query("the king [MASK] and the king")
        assert model.decode(query) == judge.decode(judge.encode_query("the king [MASK] and the king"))


@pytest.mark.parametrize("route", ["query", "document", None])
def test_the_published_layout_of_a_router(route, masked_lm, tmp_path, libraries):
    """The transformer stays in the root; which way plain texts go is the checkpoint's choice."""
    folder = shutil.copytree(masked_lm, tmp_path / "model")
    weights = np.linspace(3, 0.5, len(PIECES))
    add_sparse_modules(folder, activation="log1p_relu", query_weights=weights.tolist(), default_route=route)
    assert task_of(folder) == "sparse"
    judge = sparse_encoder(folder)
    with gte_deploy.load(folder, backend="torch") as model:
        assert_like(dense(model.encode_query(TEXTS)), judge.encode_query(TEXTS), 0)
        assert_like(dense(model.encode_document(TEXTS)), judge.encode_document(TEXTS), TOLERANCE["max"])
        if route is None:
            with pytest.raises(gte_deploy.InputError, match="use encode_query or encode_document"):
                model.encode_sparse(TEXTS)
        else:
            assert_like(dense(model.encode_sparse(TEXTS)), judge.encode(TEXTS), TOLERANCE["max"])


def test_query_weights_by_word(masked_lm, tmp_path, libraries):
    """idf.json in place of a tensor; a word that the vocabulary lacks falls to [UNK], as in transformers."""
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import AutoTokenizer

    folder = shutil.copytree(masked_lm, tmp_path / "model")
    add_sparse_modules(folder, query_weights=[0.0] * SIZE)
    place = folder / "query_0_SparseStaticEmbedding"
    (place / "idf.json").write_text(json.dumps({"king": 2.5, "the": 0.25, "nowhere": 7, "中": 1.5}), encoding="utf-8")
    (place / "config.json").write_text(json.dumps({"path": "idf.json"}), encoding="utf-8")
    judge = SparseStaticEmbedding.from_json(str(place / "idf.json"), AutoTokenizer.from_pretrained(str(folder)))
    expected = judge.weight.detach().numpy()
    files = CheckpointFiles(folder)
    found = read_query_weights(files, read_sparse_modules(files), SIZE, load_tokenizer(folder).known_or_unknown_id)
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()


@pytest.mark.parametrize("kept", [1, 3, 1000])
def test_max_active_dims(kept, saved):
    folder = saved("max", "relu")
    judge = sparse_encoder(folder)
    with gte_deploy.load(folder, backend="torch") as model:
        found = model.encode_sparse(TEXTS, max_active_dims=kept)
        assert_like(dense(found), judge.encode(TEXTS, max_active_dims=kept), TOLERANCE["max"])
        assert max(map(len, found)) <= kept


def test_max_active_dims_of_the_checkpoint(saved):
    folder = saved("max", "relu", max_active_dims=2)
    judge = sparse_encoder(folder)
    with gte_deploy.load(folder, backend="torch") as model:
        assert_like(dense(model.encode_sparse(TEXTS)), judge.encode(TEXTS), TOLERANCE["max"])
        assert [len(found) for found in model.encode_sparse(TEXTS)] == [2] * len(TEXTS)
        assert_like(dense(model.encode_sparse(TEXTS, max_active_dims=4)), judge.encode(TEXTS, max_active_dims=4), 2e-5)


def test_decode(saved):
    folder = saved("max", "relu")
    judge = sparse_encoder(folder)
    with gte_deploy.load(folder, backend="torch") as model:
        for top_k in (None, 1, 4):
            expected = judge.decode(judge.encode(TEXTS), top_k)
            for form in (
                {},
                {"convert_to_tensor": True},
                {"convert_to_tensor": True, "convert_to_sparse_tensor": False},
            ):
                found = model.decode(model.encode_sparse(TEXTS, **form), top_k)
                for row, wanted in zip(found, expected, strict=True):
                    # Rows that only pad the vocabulary have no token: SparseEncoder calls them None.
                    assert [
                        None if token[0] + token[-1] == "[]" and token[1].isdigit() else token for token, _ in row
                    ] == [token for token, _ in wanted]
                    assert [w for _, w in row] == pytest.approx([w for _, w in wanted], abs=1e-5)
        single = model.decode(model.encode_sparse(TEXTS[0]), 5)
        wanted = judge.decode(judge.encode(TEXTS[0]), 5)
        assert [weight for _, weight in single] == pytest.approx([weight for _, weight in wanted], abs=1e-5)
        assert model.decode(np.zeros(SIZE, np.float32)) == []
        for wrong in (np.zeros(5, np.float32), np.zeros((1, 1, SIZE), np.float32), "the king", [1.0]):
            with pytest.raises(gte_deploy.InputError):
                model.decode(wrong)
        with pytest.raises(gte_deploy.InputError, match="top_k must be an integer"):
            model.decode(model.encode_sparse("a"), 0)


def test_forms(saved):
    torch = pytest.importorskip("torch")
    folder = saved("max", "relu")
    judge = sparse_encoder(folder)
    with gte_deploy.load(folder, backend="torch") as model:
        vectors = model.encode_sparse(TEXTS)
        for vector in vectors:
            assert isinstance(vector, SparseEmbedding)
            assert vector.indices.dtype == np.int64 and vector.values.dtype == np.float32
            assert (np.diff(vector.indices) > 0).all() and (vector.values > 0).all() and vector.size == SIZE
        expected = judge.encode(TEXTS)
        for arguments in ({}, {"convert_to_sparse_tensor": False}):
            found = model.encode_sparse(TEXTS, convert_to_tensor=True, **arguments)
            assert (found.layout, found.shape) == (judge.encode(TEXTS, **arguments).layout, expected.shape)
            assert torch.allclose(found.to_dense(), expected.to_dense(), atol=2e-5)
            one = model.encode_sparse(TEXTS[0], convert_to_tensor=True, **arguments)
            assert one.shape == judge.encode(TEXTS[0], **arguments).shape
        found = model.encode_sparse(TEXTS[0], as_dict=True)
        assert list(found.items()) == model.decode(model.encode_sparse(TEXTS[0]))
        assert isinstance(model.encode_sparse([TEXTS[0]]), list)
        with pytest.raises(gte_deploy.InputError, match="ask for one of them"):
            model.encode_sparse(TEXTS, convert_to_tensor=True, as_dict=True)
        np.testing.assert_array_equal(dense(model.encode(TEXTS)), dense(vectors))
        with pytest.raises(gte_deploy.InputError, match="input 0 has 201 tokens"):
            model.encode_sparse(["a " * 199])
        with pytest.raises(gte_deploy.InputError, match="route is 'sideways'; expected one of None, query, document"):
            model.encode_sparse("a", route="sideways")


def test_a_splade_checkpoint_fills_masks(saved, masked_lm):
    folder = saved("max", "relu")
    text = "Paris is the [MASK] of France."
    with gte_deploy.load(masked_lm, backend="torch") as plain:
        expected = plain.fill_mask(text)
    for task in ("auto", "fill-mask"):
        with gte_deploy.load(folder, backend="torch", task=task) as model:
            assert [answer["token"] for answer in model.fill_mask(text)] == [answer["token"] for answer in expected]


def test_a_masked_lm_without_modules_is_pooled_as_sparse_encoder_does(masked_lm, libraries):
    assert task_of(masked_lm) == "fill-mask"
    with gte_deploy.load(masked_lm, backend="torch", task="sparse") as model:
        assert_like(dense(model.encode_sparse(TEXTS)), sparse_encoder(masked_lm).encode(TEXTS), TOLERANCE["max"])


# Token weights, as gte-multilingual-base has them.


@pytest.fixture(scope="module")
def token_weights(tmp_path_factory):
    """With a 1_Pooling folder, so that its own task is embed; weights lie on both sides of 0."""
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    return raise_token_weights(make_word_checkpoint(folder, task="token-classify", seed=3, pooling="cls"))


def published_rule(folder, text):
    """`_process_token_weights` of the checkpoint's scripts/gte_embedding.py, over transformers' own model."""
    import torch
    from transformers import AutoTokenizer, GteForTokenClassification

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = GteForTokenClassification.from_pretrained(str(folder)).eval()
    inputs = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        weights = torch.relu(model(**inputs).logits).squeeze(-1)[0].tolist()
    special = ("cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "unk_token_id")
    unused = {getattr(tokenizer, name) for name in special}
    result = {}
    for weight, token in zip(weights, inputs["input_ids"][0].tolist(), strict=True):
        if token not in unused and weight > 0:
            name = tokenizer.decode([token])
            result[name] = max(result.get(name, 0.0), weight)
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights(backend, token_weights, bundle_of):
    """A sparse bundle pools them in its graph; a token-classify model has them pooled by the runtime."""
    assert task_of(token_weights) == "embed"
    expected = [published_rule(token_weights, text) for text in TEXTS]
    assert any("[MASK]" in found for found in expected) and sum(map(len, expected)) > 8
    for task in ("sparse", "token-classify"):
        if backend == "torch":
            model = gte_deploy.load(token_weights, backend="torch", task=task)
        else:
            model = gte_deploy.load(bundle_of(token_weights, task=task), backend=backend, num_threads=1)
        with model:
            found = model.encode_sparse(TEXTS, as_dict=True)
            for row, wanted in zip(found, expected, strict=True):
                assert row == pytest.approx(wanted, abs=2e-5)
                assert list(row.values()) == sorted(row.values(), reverse=True)


def test_several_labels_are_no_weights(tmp_path):
    folder = make_checkpoint(tmp_path, task="token-classify", num_labels=3)
    with pytest.raises(gte_deploy.ConfigError, match="token-classify with 3 labels"):
        gte_deploy.load(folder, backend="torch", task="sparse")
    with (
        gte_deploy.load(folder, backend="torch") as model,
        pytest.raises(gte_deploy.InputError, match="needs a sparse model"),
    ):
        model.encode_sparse("w5")


# The head in parts, and what is refused.


@pytest.mark.parametrize(("pooling", "activation"), POOLINGS)
@pytest.mark.parametrize("part", [1, 7, 64, 1000])
def test_the_vocabulary_in_parts(part, pooling, activation, masked_lm, libraries):
    """Against SpladePooling over all logits at once; what padding holds changes nothing."""
    import torch
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    model = load_model(masked_lm, task="fill-mask")
    generator = torch.Generator().manual_seed(part)
    hidden = torch.randn(3, 9, 32, generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    with torch.inference_mode():
        features = {"token_embeddings": model.lm_head(hidden), "attention_mask": mask}
        expected = SpladePooling(pooling, activation).eval()(features)["sentence_embedding"]
        head = SpladeHead(model.lm_head, SparseSpec("splade", activation=activation, pooling=pooling), part)
        found = head(hidden, mask, torch.zeros(3, 9, dtype=torch.long))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[pooling])


def _set(folder, name, **fields):
    file = folder / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **fields}))


def _modules(*kinds, library="sentence_transformers", **more):
    def change(folder):
        modules = [{"idx": i, "name": str(i), "path": p, "type": f"{library}.{t}", **more} for i, (p, t) in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))

    kinds = list(enumerate(kinds))
    return change


def _router(**fields):
    return lambda folder: _set(folder, "router_config.json", **fields)


SPLADE = ("document_1_SpladePooling", "SpladePooling")
REFUSED = {
    "no router_config.json": (
        lambda folder: (folder / "router_config.json").unlink(),
        "router_config.json, which says",
    ),
    "no pooling": (lambda folder: (folder / SPLADE[0] / "config.json").unlink(), "config.json, which says how"),
    "unknown pooling": (lambda folder: _set(folder, f"{SPLADE[0]}/config.json", pooling_strategy="mean"), "'mean'"),
    "unknown activation": (
        lambda folder: _set(folder, f"{SPLADE[0]}/config.json", activation_function="gelu"),
        "'gelu'; expected relu or log1p_relu",
    ),
    "unknown field": (lambda folder: _set(folder, f"{SPLADE[0]}/config.json", top_k=3), "the fields top_k"),
    "CSR": (
        _modules(("", "Transformer"), ("1_Pooling", "Pooling"), ("2", "SparseAutoEncoder")),
        "Transformer, Pooling, SparseAutoEncoder",
    ),
    "a step more": (_modules(("", "MLMTransformer"), SPLADE, ("2_Normalize", "Normalize")), "SpladePooling, Normalize"),
    "features": (_modules(("", "Transformer"), SPLADE), "Transformer is not for fill-mask"),
    "more than a router": (_modules(("", "Router"), ("1_Normalize", "Normalize")), "a Router must be the only module"),
    "another route": (_router(structure={"query": [""], "document": [""], "image": [""]}), "query, document, image"),
    "no structure": (_router(structure=None), "router_config.json is malformed"),
    "a query model": (_router(structure={"query": ["", SPLADE[0]], "document": [SPLADE[0]]}), "SpladePooling"),
    "modalities": (_router(parameters={"route_mappings": {"(None, 'text')": "query"}}), "route_mappings"),
    "a parameter": (_router(parameters={"temperature": 2}), "the parameters temperature"),
    "no such default": (_router(parameters={"default_route": "image"}), "default route 'image'"),
    "arguments": (_modules(("", "MLMTransformer"), SPLADE, kwargs=["task"]), "kwargs of MLMTransformer is ['task']"),
    "somebody's class": (
        _modules(("", "MLMTransformer"), SPLADE, library="custom_code"),
        "custom_code.MLMTransformer, custom_code.SpladePooling",
    ),
    "outside": (_modules(("", "MLMTransformer"), ("../elsewhere", "SpladePooling")), "leaves the checkpoint's folder"),
    "active dims": (lambda folder: _set(folder, "config_sentence_transformers.json", max_active_dims=0), "max_active"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_are_not_honoured(case, masked_lm, tmp_path, caplog):
    """They are refused by name as sparse, and the checkpoint fills masks with a word about it."""
    caplog.set_level("WARNING")
    change, message = REFUSED[case]
    folder = shutil.copytree(masked_lm, tmp_path / "model")
    add_sparse_modules(folder, query_weights=[1.0] * SIZE)
    change(folder)
    assert message in read_sparse_modules(CheckpointFiles(folder)).reason
    with pytest.raises(gte_deploy.ConfigError, match="gives no sparse embeddings") as raised:
        gte_deploy.load(folder, backend="torch", task="sparse")
    assert message in str(raised.value)
    # A Pooling makes it an embedding model by itself, whose third module is refused as such.
    task = "fill-mask" if case == "CSR" else "auto"
    with gte_deploy.load(folder, backend="torch", task=task) as model:
        assert model.spec.task == "fill-mask" and (message in caplog.text or case == "CSR")
        assert model.fill_mask("the [MASK]", top_k=1)[0]["score"] > 0
        with pytest.raises(gte_deploy.InputError, match="needs a sparse model") as raised:
            model.encode_sparse("the king")
        assert message in str(raised.value)


def _words(place, words):
    """The folder's own words, which those in the checkpoint's folder must not replace."""
    _set(place, "config.json", path="idf.json")
    for folder, found in ((place, words), (place.parent, {"king": 2.5})):
        (folder / "idf.json").write_text(json.dumps(found), encoding="utf-8")


DAMAGED = {
    "no file": (lambda place: (place / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle alone": (
        lambda place: (place / "model.safetensors").rename(place / "pytorch_model.bin"),
        "pytorch_model.bin, which are pickles",
    ),
    "a pointer": (
        lambda place: (place / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "no safetensors": (lambda place: (place / "model.safetensors").write_bytes(b"\x80" * 64), "no readable tensor"),
    "empty": (lambda place: (place / "model.safetensors").write_bytes(b""), "no readable tensor"),
    "other tokenizer": (lambda place: _set(place, "tokenizer.json", normalizer=None), "another tokenizer"),
    "an empty object of words": (lambda place: _words(place, {}), "is no object of word -> weight"),
    "words without weights": (lambda place: _words(place, {"king": "2"}), "is no object of word -> weight"),
    "no words": (lambda place: _set(place, "config.json", path="idf.json"), "is no object of word -> weight"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_query_weights_that_cannot_be_read(case, masked_lm, tmp_path):
    change, message = DAMAGED[case]
    folder = shutil.copytree(masked_lm, tmp_path / "model")
    add_sparse_modules(folder, query_weights=[1.0] * SIZE)
    change(folder / "query_0_SparseStaticEmbedding")
    with pytest.raises(gte_deploy.GteDeployError, match=message):
        gte_deploy.load(folder, backend="torch")


@pytest.mark.parametrize("weights", [[1.0] * (SIZE + 1), [[1.0] * SIZE], [float("nan")] * SIZE])
def test_query_weights_of_a_wrong_form(weights, masked_lm, tmp_path):
    folder = shutil.copytree(masked_lm, tmp_path / "model")
    add_sparse_modules(folder, query_weights=weights)
    with pytest.raises(gte_deploy.CheckpointError, match="query weights"):
        gte_deploy.load(folder, backend="torch")


def test_a_bundle_has_one_task(token_weights, bundle_of):
    bundle = bundle_of(token_weights, task="sparse")
    gte_deploy.load(bundle, task="sparse", backend="onnx").close()
    for task, message in (
        ("fill-mask", "is a bundle for sparse, not for fill-mask"),
        ("paint", "task is 'paint'; expected one of"),
    ):
        with pytest.raises(gte_deploy.InputError, match=message):
            gte_deploy.load(bundle, task=task)
    with (
        gte_deploy.load(bundle, backend="onnx") as model,
        pytest.raises(gte_deploy.InputError, match="needs a fill-mask model"),
    ):
        model.fill_mask("the [MASK]")


def test_the_command_line(token_weights, bundle_of, capsys):
    from gte_deploy.cli import main

    bundle = bundle_of(token_weights, task="sparse")
    assert main(["encode-sparse", "-m", str(bundle), "--backend", "onnx", "--max-active-dims", "3", *TEXTS[:2]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with gte_deploy.load(bundle, backend="onnx") as model:
        expected = model.encode_sparse(TEXTS[:2], max_active_dims=3, as_dict=True)
    assert [list(line.items()) for line in lines] == [
        [(token, pytest.approx(weight)) for token, weight in row.items()] for row in expected
    ]
    assert main(["encode", "-m", str(bundle), "--backend", "onnx", *TEXTS[:2]]) != 0
    assert "use gte-deploy encode-sparse" in capsys.readouterr().err
