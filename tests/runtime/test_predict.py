"""Model.predict and rank against CrossEncoder on the same checkpoint, on PyTorch."""

import numpy as np
import pytest

import gte_deploy
from gte_deploy import InputError

PAIRS = [["the king", "a queen of france"], ["a", "the old house " * 9], ["", "time"], ["water", "water"]]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[1, 3])
def folder(request, make_checkpoint, runtime_models, tmp_path_factory):
    return runtime_models.make_word_checkpoint(
        make_checkpoint, tmp_path_factory.mktemp("classify") / "c", task="classify", num_labels=request.param, seed=2
    )


@pytest.fixture(scope="module")
def ours(folder):
    with gte_deploy.load(folder, num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def theirs(folder):
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(folder), device="cpu")
    # The family has no second token type (`type_vocab_size` 0); BertTokenizer would send one.
    encoder.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return encoder


@pytest.mark.parametrize("inputs", [PAIRS, [tuple(pair) for pair in PAIRS], PAIRS[:1], PAIRS[0], tuple(PAIRS[1])])
@pytest.mark.parametrize("apply_softmax", [False, True])
def test_pairs(ours, theirs, inputs, apply_softmax):
    expected = theirs.predict(inputs, apply_softmax=apply_softmax)
    got = ours.predict(inputs, apply_softmax=apply_softmax)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_single_texts(ours, theirs):
    texts = ["the king", "a queen"]
    expected = np.stack([theirs.predict(text) for text in texts])
    np.testing.assert_allclose(ours.predict([[text] for text in texts]), expected, atol=TOLERANCE)
    np.testing.assert_allclose(ours.predict(texts[1]), expected[1], atol=TOLERANCE)


def test_truncation_cuts_the_longer_text(ours, theirs):
    pair = ["the king " * 20, "a queen of france " * 100]
    with pytest.raises(InputError, match=r"input 1 has.*limit is 128"):
        ours.predict([PAIRS[0], pair])
    np.testing.assert_allclose(ours.predict(pair, truncation=True), theirs.predict(pair), atol=TOLERANCE)


def test_activation(ours):
    logits = ours.predict(PAIRS, activation_fn=lambda values: values)
    expected = 1 / (1 + np.exp(-logits)) if ours.spec.num_labels == 1 else logits
    np.testing.assert_allclose(ours.predict(PAIRS), expected, atol=1e-6)
    np.testing.assert_allclose(ours.predict(PAIRS, activation_fn=np.tanh), np.tanh(logits), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"return_documents": True}, {"top_k": 99, "batch_size": 1}])
def test_rank(ours, theirs, options):
    documents = [pair[1] for pair in PAIRS]
    if ours.spec.num_labels != 1:
        with pytest.raises(InputError, match="one label, and this has 3"):
            ours.rank("the king", documents)
        return
    expected = theirs.rank("the king", documents, **options)
    got = ours.rank("the king", documents, **options)
    assert [list(entry) for entry in got] == [list(entry) for entry in expected]
    assert [entry["corpus_id"] for entry in got] == [entry["corpus_id"] for entry in expected]
    assert [entry.get("text") for entry in got] == [entry.get("text") for entry in expected]
    np.testing.assert_allclose([e["score"] for e in got], [e["score"] for e in expected], atol=TOLERANCE)


@pytest.mark.parametrize(
    "inputs", [[], ["a", "b", "c"], ["a"], [["a", "b", "c"]], [[]], [["a", 1]], [None], 3, [["a", "b"], "c"], [b"ab"]]
)
def test_wrong_forms(ours, inputs):
    with pytest.raises(InputError, match="inputs"):
        ours.predict(inputs)


def test_wrong_arguments_of_rank(ours):
    if ours.spec.num_labels != 1:
        return
    for query, documents, top_k in (
        (["a"], "b", None),
        ("a", "b", None),
        (3, ["b"], None),
        ("a", ["b"], 0),
        ("a", [], 1),
    ):
        with pytest.raises(InputError, match="query|documents|top_k"):
            ours.rank(query, documents, top_k)


def test_sigmoid_of_large_logits_is_finite(ours):
    if ours.spec.num_labels == 1:
        from gte_deploy.activations import sigmoid

        with np.errstate(all="raise", under="ignore"):
            np.testing.assert_array_equal(
                sigmoid(np.array([[-1e30], [0], [1e30]], dtype=np.float32)), [[0], [0.5], [1]]
            )


def test_other_tasks_are_refused(word_checkpoints):
    with gte_deploy.load(word_checkpoints["embed"]) as model:
        with pytest.raises(InputError, match="classify"):
            model.predict("a")
        with pytest.raises(InputError, match="classify"):
            model.rank("a", ["b"])
