"""Models that tell types of tokens apart answer as transformers and sentence-transformers do, on every backend."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gte_deploy  # noqa: E402
from gte_deploy import BackendError, CheckpointError, InputError  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.bundle.manifest import _checksum, read_manifest  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.text.batching import collate  # noqa: E402
from gte_deploy.text.tokenization import load_tokenizer  # noqa: E402
from runtime_models import make_word_checkpoint  # noqa: E402

PAIRS = [
    ("the king", "a queen of france"),
    ("a", "the old house " * 9),
    ("", "time"),
    ("water", ""),
    ("the king of france is old", "water"),
]
SINGLES = ["the king", "a queen of france and the city", ""]
LONG = ("the king " * 40, "a queen of france " * 30)

CLS, SEP, A, B = "[CLS]", "[SEP]", "A", "B"
# What comes before, between and behind the texts, with the type of each.
TEMPLATES: dict[str, dict[str, Sequence[tuple[str, int]]]] = {
    "the first [SEP] is of type 1": {
        "single": ((CLS, 0), (A, 0), (SEP, 0)),
        "pair": ((CLS, 0), (A, 0), (SEP, 1), (B, 1), (SEP, 0)),
    },
    "texts are of type 1, special tokens of type 0": {
        "single": ((CLS, 0), (A, 1), (SEP, 0)),
        "pair": ((CLS, 0), (A, 1), (SEP, 0), (SEP, 0), (B, 0), (SEP, 1)),
    },
}


def set_template(folder: Path, name: str) -> None:
    """Give the tokenizer another template, and a class that reads it (BertTokenizer brings its own)."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for kind, parts in TEMPLATES[name].items():
        tokenizer["post_processor"][kind] = [
            {"Sequence" if part in (A, B) else "SpecialToken": {"id": part, "type_id": of_type}}
            for part, of_type in parts
        ]
    file.write_text(json.dumps(tokenizer))
    edit_config(
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture(scope="session")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`typed(template=None, **options)`: a classifier of three labels with two token types. Read only."""
    made: dict[str, Path] = {}

    def make(template: str | None = None, **options: Any) -> Path:
        key = repr((template, sorted(options.items())))
        if key not in made:
            options = {"task": "classify", "num_labels": 3, "type_vocab_size": 2, "layers": 1, "seed": 2, **options}
            folder = tmp_path_factory.mktemp("typed") / "checkpoint"
            made[key] = make_word_checkpoint(folder, **options)
            if template is not None:
                set_template(folder, template)
        return made[key]

    return make


def by_transformers(folder: Path, inputs: Sequence[Any], max_length: int | None = None) -> tuple[Any, np.ndarray]:
    """What AutoTokenizer makes of texts or pairs, and the logits of transformers' own model on that."""
    from transformers import AutoTokenizer, GteForSequenceClassification

    texts = [list(column) for column in zip(*inputs, strict=True)] if isinstance(inputs[0], tuple) else [list(inputs)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        *texts, padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt"
    )
    model = GteForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return encoded, model(**encoded).logits.numpy()


@pytest.fixture
def tolerance(backend: str) -> float:
    return 0.15 if "bf16" in backend or backend == "tensorrt" else 1e-4


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("max_length", [128, 40, 12, 8])
def test_tokens_and_types_are_those_of_transformers(typed, template, max_length):
    folder = typed(template)
    ours = load_tokenizer(folder)
    for inputs in ([*PAIRS, LONG], [*SINGLES, "the king " * 90]):
        expected, _ = by_transformers(folder, inputs, max_length)
        given = [text if isinstance(text, tuple) else (text,) for text in inputs]
        rows = ours.encode_pairs(given, max_length=max_length, truncation=True)
        batch = collate(rows, pad_token_id=0, token_types=True)
        np.testing.assert_array_equal(batch.input_ids, expected["input_ids"])
        np.testing.assert_array_equal(batch.attention_mask, expected["attention_mask"])
        np.testing.assert_array_equal(batch.token_type_ids, expected["token_type_ids"])
        if not isinstance(inputs[0], tuple):
            assert ours.encode_texts(inputs, max_length=max_length, truncation=True) == rows
        assert collate(rows, pad_token_id=0).token_type_ids is None


@pytest.mark.parametrize("template", [None, "the first [SEP] is of type 1"])
def test_logits_of_pairs_and_texts_are_those_of_transformers(backend, load_on, typed, template, tolerance):
    folder = typed(template)
    with load_on(backend, folder, num_threads=1) as model:
        assert model.spec.token_types and model.info()["token_types"]
        for inputs in (PAIRS, SINGLES):
            _, expected = by_transformers(folder, inputs)
            single = [[text] if isinstance(text, str) else text for text in inputs]
            np.testing.assert_allclose(model.predict(single), expected, atol=tolerance)
            np.testing.assert_allclose(model.predict(single, batch_size=1), expected, atol=tolerance)
        mixed = [PAIRS[1], (SINGLES[0],), PAIRS[0], (SINGLES[1],)]
        expected = np.concatenate([by_transformers(folder, [text if len(text) == 2 else text[0]])[1] for text in mixed])
        np.testing.assert_allclose(model.predict(mixed), expected, atol=tolerance)


def test_the_types_matter_here(typed):
    """Else none of these tests could fail: without types the logits are others."""
    folder = typed()
    encoded, expected = by_transformers(folder, PAIRS)
    model = load_model(folder, task="classify")
    with torch.no_grad():
        without = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits.numpy()
    assert np.abs(expected - without).max() > 0.3


@pytest.mark.parametrize("num_labels", [1, 3])
def test_scores_are_those_of_cross_encoder(backend, load_on, typed, num_labels, tolerance):
    from sentence_transformers import CrossEncoder

    folder = typed(num_labels=num_labels)
    theirs = CrossEncoder(str(folder), device="cpu")
    with load_on(backend, folder, num_threads=1) as model:
        np.testing.assert_allclose(model.predict(PAIRS), theirs.predict(PAIRS), atol=tolerance)
        np.testing.assert_allclose(model.predict(PAIRS[0]), theirs.predict(PAIRS[0]), atol=tolerance)
        np.testing.assert_allclose(model.predict(LONG, truncation=True), theirs.predict(LONG), atol=tolerance)
        if num_labels == 1 and tolerance < 0.1:
            documents = [second for _, second in PAIRS]
            ours, ranked = (each.rank("the king", documents) for each in (model, theirs))
            assert [item["corpus_id"] for item in ours] == [item["corpus_id"] for item in ranked]


@pytest.mark.parametrize("max_length", [64, 20, 8])
def test_truncated_pairs(backend, load_on, typed, max_length, tolerance):
    folder = typed()
    inputs = [LONG, LONG[::-1], PAIRS[1], PAIRS[0]]
    _, expected = by_transformers(folder, inputs, max_length)
    with load_on(backend, folder, num_threads=1) as model:
        found = model.predict(inputs, truncation=True, max_length=max_length)
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("template", "pooling"), [(None, "cls"), ("texts are of type 1, special tokens of type 0", "mean")]
)
def test_embeddings_are_those_of_sentence_transformers(backend, load_on, typed, template, pooling, tolerance):
    from sentence_transformers import SentenceTransformer

    folder = typed(template, task="embed", pooling=pooling, num_labels=1)
    theirs = SentenceTransformer(str(folder), device="cpu")
    with load_on(backend, folder, num_threads=1) as model:
        np.testing.assert_allclose(model.encode(SINGLES), theirs.encode(SINGLES), atol=tolerance)
        features = theirs.preprocess(SINGLES) if hasattr(theirs, "preprocess") else theirs.tokenize(SINGLES)
        tokens = model.tokenize(SINGLES)
        assert list(tokens) == ["input_ids", "attention_mask", "token_type_ids"]
        for name, values in tokens.items():
            np.testing.assert_array_equal(values, features[name])
        rows = model.tokenizer(SINGLES)["token_type_ids"]
        padded = zip(tokens["token_type_ids"].tolist(), rows, strict=True)
        assert rows == [types[: len(row)] for types, row in padded]
        bare = model.tokenizer(SINGLES[0], add_special_tokens=False)
        assert bare["token_type_ids"] == [1 if template else 0] * len(bare["input_ids"])
        for row, whole in enumerate(model.encode(SINGLES, output_value=None)):
            length = len(whole["input_ids"])
            np.testing.assert_array_equal(whole["token_type_ids"], tokens["token_type_ids"][row, :length])


def test_fill_mask_of_typed_texts(backend, load_on, typed, tolerance):
    from transformers import AutoTokenizer, GteForMaskedLM

    folder = typed("texts are of type 1, special tokens of type 0", task="fill-mask", num_labels=1)
    text = "the [MASK] of france"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded["token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0]]
    with torch.no_grad():
        logits = GteForMaskedLM.from_pretrained(folder).eval()(**encoded).logits[0, 2]
    expected = logits.softmax(-1).numpy()
    with load_on(backend, folder, num_threads=1) as model:
        for answer in model.fill_mask(text, top_k=9):
            assert answer["score"] == pytest.approx(expected[answer["token"]], abs=tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_torch_packs_types_as_tokens(typed, packed, compute):
    folder = typed("the first [SEP] is of type 1")
    encoded, expected = by_transformers(folder, PAIRS)
    model = load_model(folder, task="classify", dtype=getattr(torch, compute))
    backend = TorchBackend(model, describe(folder).spec, packed=packed)
    arrays = {name: values.numpy() for name, values in encoded.items()}
    found = backend.run(Batch(**arrays), ["logits"])["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4 if compute == "float32" else 0.15)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (np.full((1, 4), 2), r"token_type_ids\[0, 0\] is 2; the token types of this model go from 0 to 1"),
        (np.array([[0, 0, -1, 0]]), r"token_type_ids\[0, 2\] is -1"),
        (np.zeros((1, 3), np.int64), r"token_type_ids has shape \(1, 3\), and input_ids has shape \(1, 4\)"),
        (np.zeros((1, 4), np.int32), "token_type_ids must be int64 of rank 2; it is int32"),
        (np.zeros(4, np.int64), "token_type_ids must be int64 of rank 2"),
        ([[0, 0, 0, 0]], "token_type_ids must be a numpy array, not list"),
    ],
)
def test_bad_types_are_refused_and_the_next_batch_answered(backend, load_on, typed, types, message, repeat_tolerance):
    ids = np.array([[2, 20, 21, 3]])
    good = Batch(ids, np.ones_like(ids))
    with load_on(backend, typed(), num_threads=1) as model:
        engine = model._backend
        before = engine.run(good, ["logits"])["logits"]
        with pytest.raises(InputError, match=message):
            engine.run(dataclasses.replace(good, token_type_ids=types), ["logits"])
        zeros = dataclasses.replace(good, token_type_ids=np.zeros_like(ids))
        for batch in (good, zeros):
            np.testing.assert_allclose(engine.run(batch, ["logits"])["logits"], before, atol=repeat_tolerance or 1e-6)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"type_vocab_size": 0}, {}),
        ({"type_vocab_size": 2, "seed": 3}, {"model_input_names": ["input_ids", "attention_mask"]}),
        ({"type_vocab_size": 2, "seed": 4}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ],
)
def test_what_is_fed_no_types_keeps_its_interface(bundle_of, typed, engine, options, config):
    folder = typed(**options)
    edit_config(folder, **config)
    path = bundle_of(folder)
    graphs = read_manifest(path).graphs.values()
    assert all([tensor.name for tensor in graph.inputs] == ["input_ids", "attention_mask"] for graph in graphs)
    with gte_deploy.load(path, backend=engine, num_threads=1) as model:
        assert list(model.tokenize("the king")) == ["input_ids", "attention_mask"]
        np.testing.assert_allclose(model.predict(PAIRS), by_transformers(folder, PAIRS)[1], atol=1e-4)
        ids = np.array([[2, 20, 3]])
        with pytest.raises(InputError, match="this model has no token types"):
            model._backend.run(Batch(ids, np.ones_like(ids), None, np.zeros_like(ids)), ["logits"])


def altered(bundle: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(bundle, target)
    data = json.loads((target / "manifest.json").read_text())
    del data["checksum"]
    change(data)
    (target / "manifest.json").write_text(json.dumps({**data, "checksum": _checksum(data)}))
    return target


def test_a_bundle_from_before_there_were_types(bundle_of, word_checkpoints, tmp_path):
    def as_it_was(data: dict[str, Any]) -> None:
        data["format_version"] = 1
        for name in ("token_types", "type_vocab_size", "embedding_size", "truncate_dim", "similarity", "activation"):
            del data["spec"][name]
        del data["spec"]["sparse"]

    path = bundle_of(word_checkpoints["classify"])
    with gte_deploy.load(path) as new, gte_deploy.load(altered(path, tmp_path / "old", as_it_was)) as old:
        assert old.spec.token_types is False
        np.testing.assert_array_equal(old.predict(PAIRS), new.predict(PAIRS))


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("token_types", [False, True])
def test_a_graph_that_does_not_fit_the_spec_is_refused(bundle_of, typed, tmp_path, engine, token_types):
    """Fed nothing it would answer as if all types were 0, and nobody would know."""

    def change(data: dict[str, Any]) -> None:
        data["spec"] |= {"token_types": token_types, "type_vocab_size": 2}

    path = bundle_of(typed(type_vocab_size=0 if token_types else 2))
    with pytest.raises(BackendError, match="token_type_ids"):
        gte_deploy.load(altered(path, tmp_path / "bundle", change), backend=engine)


def with_type_two(checkpoint, folder):
    """A copy whose tokenizer gives the second text of a pair the type 2."""
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"type_id": 1', '"type_id": 2'))
    # The generic class takes the file as it is; BertTokenizer has a template of its own.
    edit_config(
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return folder


def test_more_types_than_the_model_knows_are_refused(typed, tmp_path):
    folder = with_type_two(typed(), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="gives tokens the type 2, and the model's type_vocab_size is 2"):
        gte_deploy.load(folder)
    from gte_deploy.exporters.export import export

    with pytest.raises(CheckpointError, match="gives tokens the type 2"):
        export(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_three_types(typed, tmp_path):
    folder = with_type_two(typed(type_vocab_size=3), tmp_path / "checkpoint")
    encoded, expected = by_transformers(folder, PAIRS)
    assert encoded["token_type_ids"].max() == 2
    with gte_deploy.load(folder) as model:
        np.testing.assert_allclose(model.predict(PAIRS), expected, atol=1e-4)
