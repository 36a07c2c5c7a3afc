"""Model.predict and rank against CrossEncoder on the same checkpoint, on PyTorch."""

import dataclasses
import functools

import numpy as np
import pytest

import gte_deploy
from gte_deploy import InputError
from runtime_models import make_word_checkpoint

PAIRS = [["the king", "a queen of france"], ["a", "the old house " * 9], ["", "time"], ["water", "water"]]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[1, 3])
def folder(request, tmp_path_factory):
    return make_word_checkpoint(
        tmp_path_factory.mktemp("classify") / "c", task="classify", num_labels=request.param, seed=2
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


@pytest.mark.parametrize(
    "options",
    [
        *({"convert_to_tensor": True}, {"convert_to_numpy": False}, {"convert_to_tensor": True, "apply_softmax": True}),
        *({"prompt": "a house "}, {"prompt_name": "query"}, {"prompt_name": "query", "prompt": ""}, {"device": "cpu"}),
        *({"num_workers": 2}, {"apply_softmax": None}, {"show_progress_bar": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "inputs", [PAIRS, PAIRS[0], [["water"], ["the king"]], "a queen"], ids=["4", "1", "texts", "text"]
)
def test_arguments_of_cross_encoder(options, inputs, ours, theirs, monkeypatch):
    import torch

    prompts = {"query": "the queen "}
    monkeypatch.setattr(ours, "spec", dataclasses.replace(ours.spec, prompts=prompts))
    monkeypatch.setattr(theirs, "prompts", prompts)
    # It reads a list of one text as no input of its own; a text alone it does.
    judged = [text for (text,) in inputs] if inputs[0] == ["water"] else inputs
    if judged is inputs:
        expected = theirs.predict(inputs, **options)
    else:
        each = [theirs.predict(text, **options) for text in judged]
        expected = np.stack(each) if isinstance(each[0], (np.ndarray, np.floating)) else each
        expected = torch.stack(each) if options.get("convert_to_tensor") else expected
    got = ours.predict(inputs, **options)
    assert type(got) is type(expected)
    for one, other in zip(got, expected, strict=True) if isinstance(got, list) else [(got, expected)]:
        assert type(one) is type(other) and one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=TOLERANCE)


def test_arguments_by_position(ours, theirs):
    import torch

    arguments = (PAIRS, None, "a house ", 2, False, torch.nn.Tanh(), False, True, True, None, None, None)
    got, expected = ours.predict(*arguments), theirs.predict(*arguments)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    for model in (ours, theirs):  # a batch size in the second place is the name of a prompt that there is none of
        with pytest.raises(ValueError if model is theirs else InputError, match=r"(?i)prompt.?name.*16"):
            model.predict(PAIRS, 16)
    if ours.spec.num_labels == 1:
        arguments = ("the king", [pair[1] for pair in PAIRS], 3, True, None, "a ", 2, False, torch.nn.Identity(), None)
        got, expected = ours.rank(*arguments), theirs.rank(*arguments)
        assert [(e["corpus_id"], e["text"]) for e in got] == [(e["corpus_id"], e["text"]) for e in expected]
        np.testing.assert_allclose([e["score"] for e in got], [e["score"] for e in expected], atol=TOLERANCE)
        without_effect = {"apply_softmax": True, "convert_to_numpy": False, "convert_to_tensor": True, "num_workers": 1}
        assert ours.rank(*arguments, **without_effect) == got


def test_former_names(ours, theirs):
    expected = theirs.predict(sentences=PAIRS, activation_fct=np.tanh)
    np.testing.assert_allclose(ours.predict(sentences=PAIRS, activation_fct=np.tanh), expected, atol=TOLERANCE)
    with pytest.raises(InputError, match="give the texts as `inputs`"):
        ours.predict(PAIRS, sentences=PAIRS)


def test_a_default_prompt(ours, folder, monkeypatch):
    from sentence_transformers import CrossEncoder

    prompts = {"query": "the queen ", "other": "a "}
    theirs = CrossEncoder(str(folder), device="cpu", prompts=prompts, default_prompt_name="query")
    theirs.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    spec = dataclasses.replace(ours.spec, prompts=prompts, default_prompt_name="query")
    monkeypatch.setattr(ours, "spec", spec)
    for options in ({}, {"prompt_name": "other"}, {"prompt": ""}):
        np.testing.assert_allclose(
            ours.predict(PAIRS, **options), theirs.predict(PAIRS, **options), atol=TOLERANCE, err_msg=str(options)
        )


@pytest.mark.parametrize("name", ["Identity", "Sigmoid", "Tanh", "ReLU", "Softmax", "GELU", "Softplus"])
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_the_stored_activation(name, ours, folder, monkeypatch):
    import torch
    from sentence_transformers import CrossEncoder

    theirs = CrossEncoder(str(folder), device="cpu", activation_fn=getattr(torch.nn, name)())
    theirs.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    monkeypatch.setattr(ours, "spec", dataclasses.replace(ours.spec, activation=name.lower()))
    for softmax in (False, True):
        expected = theirs.predict(PAIRS, apply_softmax=softmax)
        np.testing.assert_allclose(ours.predict(PAIRS, apply_softmax=softmax), expected, atol=TOLERANCE)


def _activations():
    import torch

    return {
        "module": torch.nn.Sigmoid(),
        "modules": torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU(inplace=True)),
        "learnt": torch.nn.PReLU(),
        "function": torch.sigmoid,
        "functional": torch.nn.functional.softplus,
        "method": lambda logits: logits.softmax(-1),
        "keyword": functools.partial(torch.softmax, dim=-1),
        "numpy": np.tanh,
        "either": lambda logits: logits * 2 + 1,
        "flat": lambda logits: logits.squeeze(-1),
    }


@pytest.mark.parametrize("name", sorted(_activations()))
def test_activations_of_torch_and_numpy(name, ours, theirs):
    activation = _activations()[name]
    expected = theirs.predict(PAIRS, activation_fn=activation)
    got = ours.predict(PAIRS, activation_fn=activation)
    assert got.dtype == np.float32 and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    tensor = ours.predict(PAIRS, activation_fn=activation, convert_to_tensor=True)
    np.testing.assert_array_equal(tensor.numpy(), got)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (lambda logits: logits * np.nan, "activation_fn gave NaN"),
        (lambda logits: logits[:1], r"activation_fn gave the shape \[1, \d\] for logits \[4, \d\]"),
        (lambda logits: np.zeros((4, 7)), r"gave the shape \[4, 7\]"),
        (lambda logits: logits.sum(), r"gave the shape \[\]"),
        (lambda logits: logits.astype(str), "which are no scores"),
        (lambda logits: 1 / 0, "activation_fn failed for logits .*ZeroDivisionError"),
        (lambda: None, "activation_fn failed for logits .*TypeError"),
        (lambda logits: None, "activation_fn gave the shape"),
        ("sigmoid", "activation_fn must be a function or a torch module"),
    ],
)
def test_activations_that_are_refused(activation, message, ours):
    with pytest.raises(InputError, match=message):
        ours.predict(PAIRS, activation_fn=activation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": {"processes": []}}, "pool is for CrossEncoder's pools of processes"),
        ({"chunk_size": 8}, "chunk_size is for"),
        ({"device": "cuda:0"}, "this model is on 'cpu', not 'cuda:0'"),
        ({"device": ["cpu", "cpu"]}, "this model is on 'cpu'|device"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt_name": "nobody"}, "prompt_name 'nobody'"),
        ({"inputs": None}, "give the texts"),
    ],
)
def test_arguments_that_are_refused(options, message, ours):
    with pytest.raises(InputError, match=message):
        ours.predict(**{"inputs": PAIRS, **options})
    if ours.spec.num_labels == 1 and "inputs" not in options:
        with pytest.raises(InputError, match=message):
            ours.rank("a", ["b"], **options)


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
        from gte_deploy.core.activations import sigmoid

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
