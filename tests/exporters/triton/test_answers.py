"""The ensembles answer what `gte_deploy.load(bundle)` answers; what is wrong with one request fails that one."""

import dataclasses

import numpy as np
import pytest

import gte_deploy
from factories import write_labels
from runtime_models import PIECES, make_word_checkpoint
from runtime_models import TEXTS as MASKED_TEXTS
from triton_emulation import Repository, Request

TEXTS = [
    "Paris is the capital of France.",
    "the king",
    "",
    "中国 — żółw 🐢 readable unknownword",
    "the man isn't old. " * 12,
]


@pytest.fixture(scope="module")
def local(bundles):
    models = {task: gte_deploy.load(bundle, backend="onnx", num_threads=1) for task, bundle in bundles.items()}
    yield models
    for model in models.values():
        model.close()


@pytest.mark.parametrize("task", ["fill-mask", "embed", "classify", "token-classify"])
def test_embeddings(task, repository, local):
    (answer,) = repository(task).ask("gte_embed", {"TEXT": TEXTS})
    assert answer["EMBEDDING"].dtype == np.float32
    np.testing.assert_allclose(answer["EMBEDDING"], local[task].encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"NORMALIZE": True}, {"normalize_embeddings": True}),
        ({"NORMALIZE": True, "TRUNCATE_DIM": 5}, {"normalize_embeddings": True, "truncate_dim": 5}),
        ({"POOLING": "mean"}, {"pooling": "mean"}),
        ({"POOLING": "cls"}, {"pooling": "cls"}),
        ({"PROMPT": "to the "}, {"prompt": "to the "}),
        ({"PROMPT": ""}, {"prompt": ""}),
        ({"PROMPT_NAME": "query"}, {"prompt_name": "query"}),
        ({"TRUNCATION": True, "MAX_LENGTH": 7}, {"truncation": True, "max_length": 7}),
    ],
)
def test_options_of_encode(options, arguments, repository, local):
    request = {"TEXT": TEXTS, **{name: [value] * len(TEXTS) for name, value in options.items()}}
    (answer,) = repository("embed").ask("gte_embed", request)
    np.testing.assert_allclose(answer["EMBEDDING"], local["embed"].encode(TEXTS, **arguments), atol=1e-5)


def test_states_of_tokens(repository, local):
    (answer,) = repository("embed").ask("gte_token_embed", {"TEXT": TEXTS})
    expected = local["embed"].encode(TEXTS, output_value=None)
    for row, wanted in enumerate(expected):
        length = len(wanted["input_ids"])
        assert answer["ATTENTION_MASK"][row].tolist() == [1] * length + [0] * (answer["INPUT_IDS"].shape[1] - length)
        np.testing.assert_array_equal(answer["INPUT_IDS"][row, :length], wanted["input_ids"])
        np.testing.assert_allclose(answer["TOKEN_EMBEDDINGS"][row, :length], wanted["token_embeddings"], atol=1e-5)


def assert_equal_answers(answer, expected):
    """`expected` in the pipeline's forms: a list for a text with one mask, a list of lists for several."""
    for row, wanted in enumerate(expected):
        masks = wanted if isinstance(wanted[0], list) else [wanted]
        assert answer["MASKS"][row, 0] == len(masks)
        for mask, best in enumerate(masks):
            assert answer["TOKEN_ID"][row, mask].tolist() == [item["token"] for item in best]
            assert [b.decode() for b in answer["TOKEN"][row, mask]] == [item["token_str"] for item in best]
            assert [b.decode() for b in answer["SEQUENCE"][row, mask]] == [item["sequence"] for item in best]
            np.testing.assert_allclose(answer["SCORE"][row, mask], [item["score"] for item in best], atol=1e-6)
        assert (answer["TOKEN_ID"][row, len(masks) :] == -1).all()


def test_fill_mask(repository, local):
    texts = list(MASKED_TEXTS)
    (answer,) = repository("fill-mask").ask("gte_fill_mask", {"TEXT": texts})
    assert_equal_answers(answer, local["fill-mask"].fill_mask(texts))


def test_options_of_fill_mask(repository, local):
    texts = ["the [MASK] of [MASK]", "a [MASK]"]
    targets = np.array([[b"king", b"Paris", b""], [b"king", b"Paris", b""]], dtype=np.object_)
    (answer,) = repository("fill-mask").ask(
        "gte_fill_mask", {"TEXT": texts, "TOP_K": [9, 9], "TARGETS": targets, "TRUNCATION": [True, True]}
    )
    assert answer["SCORE"].shape == (2, 2, 2)
    assert_equal_answers(answer, local["fill-mask"].fill_mask(texts, top_k=9, targets=["king", "Paris"]))


def test_too_many_answers_fail_alone(repository, local, monkeypatch):
    """The bound is on the product: masks times top_k times tokens, of all rows of a request."""
    import gte_deploy.tasks.fill_mask as tasks

    texts = ["[MASK] of the [MASK]", "a [MASK]"]
    good = {"TEXT": texts, "TOP_K": [2, 2]}
    opened = repository("fill-mask")
    (expected,) = opened.ask("gte_fill_mask", good)
    for name, most in (("MAX_ANSWERS", 8), ("MAX_ANSWER_TOKENS", 50)):
        with monkeypatch.context() as patch:
            patch.setattr(tasks, name, most)
            answer, refused = opened.ask("gte_fill_mask", good, {"TEXT": texts, "TOP_K": [3, 3]})
            assert refused.code == "INVALID_ARG"
            assert "a request of 2 texts with 4 masks and top_k 3 would get 12 answers" in str(refused)
            np.testing.assert_array_equal(answer["TOKEN_ID"], expected["TOKEN_ID"])
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "MAX_ANSWERS", 5)
        assert len(local["fill-mask"].fill_mask(["a [MASK]"] * 9, top_k=5)) == 9  # the bound is that of a text
        with pytest.raises(gte_deploy.InputError, match="input 1 with 2 masks and top_k 3 would get 6 answers"):
            local["fill-mask"].fill_mask(["a [MASK]", texts[0]], top_k=3)


def test_too_many_characters_fail_alone(repository, monkeypatch):
    good, long = {"TEXT": ["the king"]}, {"TEXT": ["the " * 10, "king " * 9], "TRUNCATION": [True] * 2}
    opened = repository("embed")
    (expected,) = opened.ask("gte_embed", good)
    monkeypatch.setitem(opened.model("gte_tokenizer").execute.__globals__, "MAX_TEXT_BYTES", 80)
    answer, refused = opened.ask("gte_embed", good, long)
    assert refused.code == "INVALID_ARG" and "85 characters of text; it may have at most 80" in str(refused)
    np.testing.assert_array_equal(answer["EMBEDDING"], expected["EMBEDDING"])


@pytest.mark.parametrize("softmax", [False, True])
def test_rerank(softmax, repository, local):
    pairs = [("what is this", "a king"), ("the", "river and water " * 8), ("", "")]
    request = {"TEXT": [a for a, _ in pairs], "TEXT_PAIR": [b for _, b in pairs], "APPLY_SOFTMAX": [softmax] * 3}
    (answer,) = repository("classify").ask("gte_rerank", request)
    np.testing.assert_allclose(answer["SCORE"][:, 0], local["classify"].predict(pairs), atol=1e-6)
    identity = local["classify"].predict(pairs, activation_fn=lambda logits: logits)
    np.testing.assert_allclose(answer["LOGITS"][:, 0], identity, atol=1e-5)


def test_single_texts_of_a_classifier(repository, local):
    (answer,) = repository("classify").ask("gte_rerank", {"TEXT": TEXTS})
    np.testing.assert_allclose(answer["SCORE"][:, 0], local["classify"].predict([[t] for t in TEXTS]), atol=1e-6)


def test_several_labels(bundle_of, tmp_path):
    from gte_deploy.exporters.triton.repository import export_repository

    checkpoint = make_word_checkpoint(tmp_path / "c", task="classify", num_labels=3)
    bundle = bundle_of(checkpoint)
    path = export_repository(bundle, tmp_path / "repository").path
    assert (path / "gte_rerank" / "labels.txt").read_text() == "LABEL_0\nLABEL_1\nLABEL_2\n"
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        for softmax in (False, True):
            request = {"TEXT": ["the king"], "APPLY_SOFTMAX": [softmax]}
            (answer,) = Repository(path).ask("gte_rerank", request)
            expected = model.predict([["the king"]], apply_softmax=softmax)
            np.testing.assert_allclose(answer["SCORE"], expected, atol=1e-6)


@pytest.mark.parametrize("activation", [None, "identity", "tanh"])
@pytest.mark.parametrize("labels", [1, 3])
def test_the_stored_activation(activation, labels, altered_spec):
    opened, model = altered_spec("classify", num_labels=labels, activation=activation)
    pairs = [("the king", "a queen"), ("water", "")]
    request = {"TEXT": [a for a, _ in pairs], "TEXT_PAIR": [b for _, b in pairs]}
    (answer,) = opened.ask("gte_rerank", request)
    logits = answer["LOGITS"]
    expected = {None: 1 / (1 + np.exp(-logits)) if labels == 1 else logits, "identity": logits}.get(
        activation, np.tanh(logits)
    )
    np.testing.assert_allclose(answer["SCORE"], expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(pairs), expected.reshape(model.predict(pairs).shape), atol=1e-5)


def test_prompts_of_a_reranker(altered_spec):
    opened, model = altered_spec("classify", prompts={"query": "the king ", "x": "a "}, default_prompt_name="query")
    pairs = [("water", "a queen"), ("", "time")]
    request = {"TEXT": [a for a, _ in pairs], "TEXT_PAIR": [b for _, b in pairs]}
    plain = opened.ask("gte_rerank", {"TEXT": ["the king water", "the king "], "TEXT_PAIR": request["TEXT_PAIR"]})
    for options, arguments in (
        ({}, {}),
        ({"PROMPT_NAME": ["x"] * 2}, {"prompt_name": "x"}),
        ({"PROMPT": ["time "] * 2}, {"prompt": "time "}),
        ({"PROMPT": [""] * 2}, {"prompt": ""}),
    ):
        (answer,) = opened.ask("gte_rerank", {**request, **options})
        np.testing.assert_allclose(answer["SCORE"][:, 0], model.predict(pairs, **arguments), atol=1e-6)
    (answer,) = opened.ask("gte_rerank", {**request, "PROMPT": [""] * 2})
    assert np.abs(answer["LOGITS"] - plain[0]["LOGITS"]).max() > 1e-3


LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.fixture(scope="module")
def tagger(bundle_of, tmp_path_factory):
    """A checkpoint that classifies tokens, and the repository of its bundle."""
    from gte_deploy.exporters.triton.repository import export_repository

    folder = tmp_path_factory.mktemp("tagger")
    checkpoint = make_word_checkpoint(folder / "c", task="token-classify", num_labels=len(LABELS), seed=5)
    write_labels(checkpoint, LABELS)
    return checkpoint, export_repository(bundle_of(checkpoint), folder / "repository", threads=1).path


@pytest.mark.parametrize("strategy", [None, "none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("ignored", [None, [""], ["B-PER", "LOC"]])
def test_labels_of_tokens(strategy, ignored, tagger):
    """Against transformers' pipeline on the checkpoint; entities of rows with fewer are padded."""
    from transformers import pipeline

    checkpoint, path = tagger
    texts = [*TEXTS, "", "the café, readable (中国)!", "unknownword 🙂 queens"]
    options = {} if strategy is None else {"AGGREGATION_STRATEGY": [strategy] * 8}
    if ignored is not None:
        options["IGNORE_LABELS"] = np.array([[label.encode() for label in ignored]] * 8, dtype=np.object_)
    (answer,) = Repository(path).ask("gte_classify_tokens", {"TEXT": texts, **options})
    pipe = pipeline("token-classification", model=str(checkpoint), device="cpu")
    pipe.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    expected = pipe(texts, aggregation_strategy=strategy or "none", ignore_labels=ignored)
    grouped = strategy not in (None, "none")
    for row, entities in enumerate(expected):
        count = int(answer["ENTITIES"][row, 0])
        assert count == len(entities)
        for name, key in (("LABEL", "entity_group" if grouped else "entity"), ("WORD", "word")):
            assert [value.decode() for value in answer[name][row, :count]] == [entity[key] for entity in entities]
        for name, key in (("START", "start"), ("END", "end"), ("INDEX", "index")):
            assert answer[name][row, :count].tolist() == [entity.get(key, -1) for entity in entities]
        np.testing.assert_allclose(answer["SCORE"][row, :count], [entity["score"] for entity in entities], atol=1e-4)


def test_logits_of_tokens(tagger, bundle_of):
    checkpoint, path = tagger
    texts = [*TEXTS, "the king " * 200]
    (answer,) = Repository(path).ask("gte_classify_tokens", {"TEXT": texts, "TRUNCATION": [True] * len(texts)})
    with gte_deploy.load(bundle_of(checkpoint), backend="onnx", num_threads=1) as model:
        for count, logits, expected in zip(
            answer["TOKENS"][:, 0], answer["LOGITS"], model.predict(texts, truncation=True), strict=True
        ):
            np.testing.assert_allclose(logits[:count], expected, atol=1e-5)


def test_bad_requests_for_labels(tagger):
    opened = Repository(tagger[1])
    for options, message in (
        ({"AGGREGATION_STRATEGY": ["best"]}, "aggregation_strategy is 'best'; expected one of"),
        ({"MAX_LENGTH": [999]}, "max_length must be an integer from 3 to 128"),
        ({"TEXT": ["the " * 200]}, "input 0 has 202 tokens"),
    ):
        (error,) = opened.ask("gte_classify_tokens", {"TEXT": ["a"], **options})
        assert f"InputError: {message}" in str(error)
    labels = np.array([[b"O"], [b"X"]], dtype=np.object_)
    (error,) = opened.ask("gte_classify_tokens", {"TEXT": ["a", "b"], "IGNORE_LABELS": labels})
    assert "IGNORE_LABELS differ between the rows" in str(error)
    model = opened.model("gte_classify_tokens_output")
    logits = np.zeros((1, 3, len(LABELS)), dtype=np.float32)
    logits[0, 1, 2] = np.nan
    text, mask = np.array([[b"the"]], dtype=np.object_), np.ones((1, 3), dtype=np.int64)
    (response,) = model.execute([Request({"TEXT": text, "attention_mask": mask, "logits": logits})])
    assert str(response.error).startswith("NonFiniteError: ")


def test_sparse_vectors(bundles, repository):
    """By the definition: for each entry the largest relu(logit) among its places; cls, sep, pad and unk have none."""
    import onnxruntime

    texts = ["the king and the queen", "[MASK] unknownword", "a river"]
    (answer,) = repository("token-classify").ask("gte_sparse", {"TEXT": texts})
    session = onnxruntime.InferenceSession(str(bundles["token-classify"] / "onnx" / "model.onnx"))
    with gte_deploy.load(bundles["token-classify"], backend="onnx", num_threads=1) as model:
        rows = [model.tokenize(text)["input_ids"] for text in texts]
    seen = 0
    for row, ids in enumerate(rows):
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        expected: dict[int, float] = {}
        for token, logit in zip(ids[0].tolist(), logits[0, :, 0].tolist(), strict=True):
            if logit > 0 and token > 3:  # [PAD], [UNK], [CLS], [SEP]
                expected[token] = max(expected.get(token, 0.0), logit)
        count = int(answer["TOKENS"][row, 0])
        found = dict(zip(answer["TOKEN_ID"][row, :count].tolist(), answer["WEIGHT"][row, :count].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-5)
        assert answer["WEIGHT"][row].tolist() == sorted(answer["WEIGHT"][row].tolist(), reverse=True)
        seen += count
    assert seen > 0


def vectors_of(answer):
    counts = answer["TOKENS"][:, 0].tolist()
    return [
        dict(zip(answer["TOKEN_ID"][row, :count].tolist(), answer["WEIGHT"][row, :count].tolist(), strict=True))
        for row, count in enumerate(counts)
    ]


@pytest.mark.parametrize("kept", [None, 3])
def test_sparse_vectors_of_a_masked_lm_head(kept, repository, local):
    """As `Model` answers, which tests/runtime/tasks/test_sparse.py compares with SparseEncoder."""
    options = {} if kept is None else {"MAX_ACTIVE_DIMS": [kept] * len(TEXTS)}
    (answer,) = repository("sparse").ask("gte_sparse", {"TEXT": TEXTS, **options})
    expected = local["sparse"].encode_document(TEXTS, max_active_dims=kept)
    for found, wanted in zip(vectors_of(answer), expected, strict=True):
        assert found == pytest.approx(dict(wanted.ordered()), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert kept is None or len(found) <= kept


@pytest.mark.parametrize("options", [{}, {"NORMALIZE": True, "TRUNCATE_DIM": 5, "MAX_ACTIVE_DIMS": 2}], ids=str)
def test_hybrid(options, repository, local):
    """One run of the encoder for both halves, which are those of gte_embed and gte_sparse."""
    opened = repository("hybrid")
    request = {"TEXT": TEXTS, **{name: [value] * len(TEXTS) for name, value in options.items()}}
    (answer,) = opened.ask("gte_hybrid", request)
    assert len(opened.runs) == 1
    names = {"NORMALIZE": "normalize_embeddings", "TRUNCATE_DIM": "truncate_dim", "MAX_ACTIVE_DIMS": "max_active_dims"}
    expected = local["hybrid"].encode_hybrid(TEXTS, **{names[name]: value for name, value in options.items()})
    np.testing.assert_allclose(answer["EMBEDDING"], expected.dense, atol=1e-5)
    for found, wanted in zip(vectors_of(answer), expected.sparse, strict=True):
        assert found == pytest.approx(dict(wanted.ordered()), abs=1e-5)
    (sparse,) = opened.ask("gte_sparse", {"TEXT": TEXTS})
    for found, wanted in zip(vectors_of(sparse), local["hybrid"].encode_sparse(TEXTS), strict=True):
        assert found == pytest.approx(dict(wanted.ordered()), abs=1e-5)
    (dense,) = opened.ask("gte_embed", {"TEXT": TEXTS})
    np.testing.assert_allclose(dense["EMBEDDING"], local["hybrid"].encode(TEXTS), atol=1e-5)


def test_queries_of_a_sparse_model_are_stored_weights(repository):
    opened = repository("sparse")
    texts = ["the king and the king", "[MASK] water"]
    (answer,) = opened.ask("gte_sparse_query", {"TEXT": texts})
    weights = np.linspace(0.5, 3, 128).astype(np.float32)
    words = {word: i for i, word in enumerate(PIECES)}
    for found, text in zip(vectors_of(answer), texts, strict=True):
        ids = {words[word] for word in text.split()}
        assert found == {token: pytest.approx(weights[token]) for token in ids}
    assert opened.runs == []  # the encoder had nothing to do


def test_a_bad_request_fails_alone(repository, local):
    good = {"TEXT": ["the [MASK]"]}
    bad = {
        "no mask": ({"TEXT": ["the king", "a [MASK]"]}, "input 0 has no mask; write [MASK]"),
        "too long": ({"TEXT": ["a [MASK]", "[MASK] " * 130]}, "input 1 has 132 tokens"),
        "cut off": (
            {"TEXT": ["the " * 200 + "[MASK]"], "TRUNCATION": [True]},
            "input 0 lost its [MASK] by truncation to 128 tokens",
        ),
        "no UTF-8": ({"TEXT": np.array([[b"\xff [MASK]"]], dtype=np.object_)}, "input 0 is not UTF-8"),
        "4 MB": ({"TEXT": ["[MASK]" + "a" * (4 << 20)]}, "a text may have at most"),
        "top_k": ({"TEXT": ["a [MASK]"], "TOP_K": [0]}, "TOP_K must be an integer from 1 to"),
        "length": ({"TEXT": ["a [MASK]"], "MAX_LENGTH": [4000]}, "max_length must be an integer from 3 to 128"),
        "unlike": ({"TEXT": ["a [MASK]"] * 2, "TOP_K": [1, 2]}, "TOP_K differs between the rows"),
        "targets": ({"TEXT": ["a [MASK]"], "TARGETS": [""]}, "none of the 1 targets has a token"),
        "masks": ({"TEXT": ["[MASK]"] * 9}, "the request has 9 rows; the limit is 8"),
    }
    answers = repository("fill-mask").ask("gte_fill_mask", good, *(request for request, _ in bad.values()), good)
    for (name, (_, message)), error in zip(bad.items(), answers[1:-1], strict=True):
        assert isinstance(error, Exception), name
        assert str(error).startswith("InputError: ") and message in str(error), name
        assert error.code == "INVALID_ARG"
    expected = local["fill-mask"].fill_mask(["the [MASK]"] * 2)
    assert_equal_answers(answers[0], expected[:1])
    assert_equal_answers(answers[-1], expected[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"POOLING": "max"}, "POOLING is 'max'; expected one of mean, cls"),
        ({"TRUNCATE_DIM": 33}, "TRUNCATE_DIM must be an integer from 1 to 32"),
        ({"PROMPT_NAME": "nobody"}, "prompt_name 'nobody' is none of this model's prompts: query, document, passage"),
    ],
)
def test_bad_options_of_encode(options, message, repository):
    (error,) = repository("embed").ask("gte_embed", {"TEXT": ["a"], **options})
    assert f"InputError: {message}" in str(error)


def test_more_masks_than_are_answered(repository):
    opened = repository("fill-mask")
    opened.model("gte_tokenizer")._max_masks = 4
    answers = opened.ask("gte_fill_mask", {"TEXT": ["[MASK] " * 4]}, {"TEXT": ["a [MASK]", "[MASK] " * 5]})
    assert answers[0]["TOKEN_ID"].shape == (1, 4, 5)
    assert "input 1 has 5 masks; this server answers at most 4" in str(answers[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_nan_leaves(value, repository):
    model = repository("fill-mask").model("gte_embed_output")
    good, bad = np.ones((2, 32), np.float32), np.ones((2, 32), np.float32)
    bad[1, 3] = value
    requests = [Request({"embedding_mean": states, "embedding_cls": states}) for states in (bad, good)]
    first, second = model.execute(requests)
    assert str(first.error).startswith("NonFiniteError: ") and "the inputs 1" in str(first.error)
    assert first.error.code == "INTERNAL"
    np.testing.assert_array_equal(second.tensors["EMBEDDING"], good)


def test_a_failure_nobody_thought_of_fails_that_request(repository):
    model = repository("fill-mask").model("gte_embed_output")
    good = {"embedding_mean": np.ones((1, 32), np.float32), "embedding_cls": np.ones((1, 32), np.float32)}
    first, second = model.execute([Request({**good, "NORMALIZE": np.empty((0, 1))}), Request(good)])
    assert first.error is not None and second.error is None


def test_requests_are_padded_so_that_they_run_together(repository, local):
    opened = repository("embed")
    texts = ["the king", "a", "the queen and the man", "river " * 60, "river " * 61]
    answers = opened.ask("gte_embed", *({"TEXT": [text]} for text in texts))
    assert opened.runs == [(3, 16), (2, 64)]
    for text, answer in zip(texts, answers, strict=True):
        np.testing.assert_allclose(answer["EMBEDDING"][0], local["embed"].encode(text), atol=1e-5)


def test_masks_of_requests_that_run_together(repository, local):
    """The row that a mask stands in counts from the batch's first row, not from its request's."""
    opened = repository("fill-mask")
    texts = ["the [MASK] of [MASK]", "a [MASK]", "[MASK] and [MASK]", "[MASK]"]
    answers = opened.ask("gte_fill_mask", *({"TEXT": [text]} for text in texts))
    assert opened.runs == [(2, 16), (2, 16)]
    for text, answer in zip(texts, answers, strict=True):
        assert_equal_answers(answer, [local["fill-mask"].fill_mask(text)])


@pytest.fixture
def altered_spec(bundle_of, tmp_path):
    """`altered_spec(task, num_labels=1, **fields)`: repository and model of a bundle with these fields in its spec."""
    import json
    import shutil

    from gte_deploy.bundle.manifest import MANIFEST_NAME, read_manifest
    from gte_deploy.exporters.triton.repository import export_repository

    opened = []

    def make(task, num_labels=1, **fields):
        checkpoint = make_word_checkpoint(tmp_path / "checkpoint", task=task, num_labels=num_labels, seed=2)
        bundle = tmp_path / "bundle"
        shutil.copytree(bundle_of(checkpoint), bundle)
        manifest = read_manifest(bundle)
        changed = dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, **fields))
        (bundle / MANIFEST_NAME).write_text(json.dumps(changed.to_json()), encoding="utf-8")
        opened.append(gte_deploy.load(bundle, backend="onnx", num_threads=1))
        return Repository(export_repository(bundle, tmp_path / "repository").path), opened[-1]

    yield make
    for model in opened:
        model.close()


def test_checkpoints_that_normalise(altered_bundle, bundles, tmp_path):
    from gte_deploy.bundle.manifest import read_manifest
    from gte_deploy.exporters.triton.repository import export_repository

    spec = dataclasses.replace(read_manifest(bundles["embed"]).spec, normalize=True)
    bundle = altered_bundle("embed", spec=spec)
    opened = Repository(export_repository(bundle, tmp_path / "repository").path)
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        (answer,) = opened.ask("gte_embed", {"TEXT": TEXTS, "TRUNCATE_DIM": [8] * 5})
        np.testing.assert_allclose(answer["EMBEDDING"], model.encode(TEXTS, truncate_dim=8), atol=1e-5)
        (whole,) = opened.ask("gte_embed", {"TEXT": TEXTS})
        np.testing.assert_allclose(np.linalg.norm(whole["EMBEDDING"], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("truncate_dim", [None, 7, 32])
def test_the_encoder_finishes_embeddings(normalize, truncate_dim, altered_bundle, bundles, tmp_path):
    from gte_deploy.bundle.manifest import read_manifest
    from gte_deploy.exporters.triton.repository import export_repository

    spec = dataclasses.replace(read_manifest(bundles["embed"]).spec, normalize=normalize, truncate_dim=truncate_dim)
    bundle = altered_bundle("embed", spec=spec)
    opened = Repository(export_repository(bundle, tmp_path / "repository").path)
    options = {"TEXT": TEXTS, "PROMPT_NAME": ["query"] * len(TEXTS)}
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        (answer,) = opened.ask("gte_embed_fast", options)
        np.testing.assert_allclose(answer["EMBEDDING"], model.encode(TEXTS, prompt_name="query"), atol=1e-5)
        scaled = model.encode(TEXTS, prompt_name="query", normalize_embeddings=True)
        np.testing.assert_allclose(answer["NORMALIZED_EMBEDDING"], scaled, atol=1e-5)


def test_prompts_of_queries_and_documents(repository, local):
    """Without an option the prompts are those of the sides, as in `encode_query` and `encode_document`."""
    opened, model, text = repository("multi-vector"), local["multi-vector"], "king"
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        for options, arguments in (
            ({}, {}),
            ({"PROMPT": ""}, {"prompt": ""}),
            ({"PROMPT_NAME": "query"}, {"prompt_name": "query"}),
            ({"NORMALIZE": False}, {"normalize_embeddings": False}),
            ({"SKIP_WORDS": "king"}, {"skip_words": ["king"]}),
            ({"SKIP_WORDS": ""}, {"skip_words": []}),
        ):
            request = {"TEXT": [text], **{name: [value] for name, value in options.items()}}
            (answer,) = opened.ask(f"gte_multi_vector_{side}", request)
            np.testing.assert_allclose(answer["TOKEN_EMBEDDINGS"][0], encode(text, **arguments), atol=1e-5)
    prompted = [each(text) for each in (model.encode_query, model.encode_document)]
    plain = [each(text, prompt="") for each in (model.encode_query, model.encode_document)]
    assert all(not np.array_equal(one, other) for one, other in zip(prompted, plain, strict=True))


def test_queries_and_documents_of_several_requests(repository, local):
    """Rows of different requests have lengths, padding and skipped words of their own."""
    opened, model = repository("multi-vector"), local["multi-vector"]
    requests = [
        {"TEXT": ["the king"]},
        {"TEXT": ["a", "water"], "MAX_LENGTH": [20, 20]},
        {"TEXT": ["the " * 30], "TRUNCATION": [True]},
        {"TEXT": ["the " * 30]},
    ]
    first, second, third, wrong = opened.ask("gte_multi_vector_query", *requests)
    assert "InputError: input 0 has at least 14 tokens, special tokens included; the limit is 12" in str(wrong)
    expected = [[model.encode_query("the king")], model.encode_query(["a", "water"], max_length=20)]
    expected.append(model.encode_query(["the " * 30], truncation=True))
    for answer, rows in zip((first, second, third), expected, strict=True):
        np.testing.assert_allclose(answer["TOKEN_EMBEDDINGS"], rows, atol=1e-5)
    (answer,) = opened.ask("gte_multi_vector_document", {"TEXT": ["the king, and the queen!", "a"]})
    assert answer["TOKENS"][:, 0].tolist() == [len(model.encode_document(t)) for t in ("the king and the queen", "a")]


def test_tokens_to_keep_must_fit_the_ids(repository):
    ids, mask = np.array([[2, 40, 41, 3]]), np.ones((1, 4), np.int64)
    request = {"INPUT_IDS": ids, "ATTENTION_MASK": mask, "KEPT_TOKENS": np.ones((1, 3), np.bool_)}
    (error,) = repository("multi-vector").ask("gte_multi_vector_ids", request)
    assert "InputError: kept_tokens has the shape [1, 3], and the ids [1, 4]" in str(error)


@pytest.mark.parametrize("task", ["embed", "classify", "sparse", "token-classify", "hybrid", "multi-vector"])
def test_wrong_token_ids_fail_alone(task, repository):
    """The encoder runs all requests in one batch."""
    names = {"embed": "gte_embed_ids", "classify": "gte_rerank_ids", "hybrid": "gte_hybrid_ids"}
    name = {**names, "multi-vector": "gte_multi_vector_ids"}.get(task, "gte_sparse_ids")
    opened = repository(task)
    ids, mask = np.array([[2, 40, 41, 42, 3]]), np.ones((1, 5), np.int64)
    wrong = [ids + 124, -ids, np.array([[2, 40, 2**62, 42, 3]])]
    more = {"KEPT_TOKENS": mask == 1} if task == "multi-vector" else {}
    requests = [{"INPUT_IDS": given, "ATTENTION_MASK": mask, **more} for given in (ids, *wrong, ids)]
    first, *refused, last = opened.ask(name, *requests)
    assert opened.runs == [(5, 5)]
    (alone,) = opened.ask(name, requests[0])
    for answer in (first, last):
        for output, values in alone.items():
            if values.dtype == np.float32:
                np.testing.assert_allclose(answer[output], values, atol=1e-6)
    for answer in refused:
        if task == "embed":
            assert np.isnan(answer["EMBEDDING"]).all() and np.isnan(answer["NORMALIZED_EMBEDDING"]).all()
        else:
            assert str(answer).startswith(("NonFiniteError: ", "InputError: the inputs 0 have token ids outside"))
