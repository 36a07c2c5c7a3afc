"""Model.encode against SentenceTransformer.encode on the same checkpoint, on PyTorch."""

import numpy as np
import pytest

import gte_deploy
from gte_deploy import InputError
from runtime_models import make_word_checkpoint

TEXTS = ["the king of france", "a", "", "walking and playing in the old city: " * 4, "中国 water!", "the queen"]
# Two float32 runs of the same module with other batches.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["cls", "mean", "normalize"])
def folder(request, word_checkpoints, tmp_path_factory):
    if request.param == "cls":
        return word_checkpoints["embed"]
    return make_word_checkpoint(
        tmp_path_factory.mktemp("embed") / request.param,
        task="embed",
        pooling="mean",
        normalize=request.param == "normalize",
        prompts={"query": "the query: ", "other": "old "},
        seed=5,
    )


@pytest.fixture(scope="module")
def ours(folder):
    with gte_deploy.load(folder, num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def theirs(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 1},
        {"normalize_embeddings": True},
        {"truncate_dim": 8},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"prompt_name": "query"},
        {"prompt": "old "},
        {"prompt": ""},
    ],
)
def test_arguments(ours, theirs, options):
    for inputs in (TEXTS, tuple(TEXTS), np.array(TEXTS), TEXTS[:1], TEXTS[0]):
        expected = theirs.encode(inputs, **options)
        got = ours.encode(inputs, **options)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_arguments_may_be_given_by_position(ours, theirs):
    positional = (TEXTS, "query", None, 2, False, "sentence_embedding", "float32", True, False, "cpu", True, 16)
    np.testing.assert_allclose(ours.encode(*positional), theirs.encode(*positional), atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precision(ours, theirs, precision):
    expected = theirs.encode(TEXTS, precision=precision)
    got = ours.encode(TEXTS, precision=precision)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if precision.endswith("binary"):
        bits = np.unpackbits(got.view(np.uint8)) != np.unpackbits(expected.view(np.uint8))
        assert bits.mean() < 0.01  # a value near 0 may change its sign
    else:
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_token_embeddings(ours, theirs):
    expected = theirs.encode(TEXTS, output_value="token_embeddings")
    got = ours.encode(TEXTS, output_value="token_embeddings")
    assert isinstance(got, list) and all(isinstance(tokens, np.ndarray) for tokens in got)
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=TOLERANCE)
    single = ours.encode(TEXTS[0], output_value="token_embeddings")
    np.testing.assert_allclose(single, expected[0].numpy(), atol=TOLERANCE)


def test_everything_there_is(ours, theirs):
    expected = theirs.encode(TEXTS, output_value=None)
    got = ours.encode(TEXTS, output_value=None)
    for mine, other in zip(got, expected, strict=True):
        length = int(other["attention_mask"].sum())
        assert mine["input_ids"].tolist() == other["input_ids"][:length].tolist()
        assert mine["attention_mask"].tolist() == [1] * length
        np.testing.assert_allclose(mine["token_embeddings"], other["token_embeddings"][:length], atol=TOLERANCE)
        np.testing.assert_allclose(mine["sentence_embedding"], other["sentence_embedding"], atol=TOLERANCE)


def test_tensors(ours, theirs):
    import torch

    got, expected = ours.encode(TEXTS, convert_to_tensor=True), theirs.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    listed = ours.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(listed, list) and len(listed) == len(TEXTS)
    torch.testing.assert_close(torch.stack(listed), expected, atol=TOLERANCE, rtol=0)
    assert isinstance(ours.encode(TEXTS[0], output_value="token_embeddings", convert_to_tensor=True), torch.Tensor)


def test_queries_and_documents(ours, theirs):
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(ours.encode_document(TEXTS), theirs.encode_document(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(
        ours.encode_query(TEXTS, prompt="old ", batch_size=2),
        theirs.encode_query(TEXTS, prompt="old ", batch_size=2),
        atol=TOLERANCE,
    )


def test_truncation_is_sentence_transformers(ours, theirs):
    text = "the old king " * 100
    with pytest.raises(InputError, match=r"input 1 has .*tokens.*limit is 128"):
        ours.encode(["a", text])
    np.testing.assert_allclose(ours.encode(text, truncation=True), theirs.encode(text), atol=TOLERANCE)


def test_sentences_is_the_former_name(ours):
    np.testing.assert_array_equal(ours.encode(sentences=TEXTS), ours.encode(TEXTS))
    for wrong in ({}, {"inputs": TEXTS, "sentences": TEXTS}):
        with pytest.raises(InputError, match="sentences"):
            ours.encode(**wrong)


def test_pooling_can_be_chosen(ours):
    tokens = ours.encode(TEXTS, output_value="token_embeddings")
    embeddings = {
        pooling: ours.encode(TEXTS, pooling=pooling, normalize_embeddings=True) for pooling in ("cls", "mean")
    }
    for row, states in enumerate(tokens):
        for pooling, vector in (("cls", states[0]), ("mean", states.mean(axis=0))):
            np.testing.assert_allclose(embeddings[pooling][row], vector / np.linalg.norm(vector), atol=1e-5)


def test_default_prompt(word_checkpoints, tmp_path):
    import json
    import shutil

    from sentence_transformers import SentenceTransformer

    shutil.copytree(word_checkpoints["embed"], tmp_path / "copy")
    (tmp_path / "copy" / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"other": "the old "}, "default_prompt_name": "other"})
    )
    theirs = SentenceTransformer(str(tmp_path / "copy"), device="cpu")
    with gte_deploy.load(tmp_path / "copy") as ours:
        for method in ("encode", "encode_query", "encode_document"):
            expected = getattr(theirs, method)(TEXTS)
            np.testing.assert_allclose(getattr(ours, method)(TEXTS), expected, atol=TOLERANCE)
        assert not np.allclose(ours.encode(TEXTS), ours.encode_query(TEXTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "nope"}, "prompt_name 'nope'"),
        ({"prompt": 3}, "prompt must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2**31}, "batch_size"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"output_value": "tokens"}, "output_value"),
        ({"precision": "fp16"}, "precision"),
        ({"precision": "int8", "output_value": "token_embeddings"}, "precision 'int8' is for"),
        ({"truncate_dim": 0}, "truncate_dim"),
        ({"truncate_dim": 33}, "truncate_dim must be an integer from 1 to 32"),
        ({"pooling": "max"}, "pooling"),
        ({"device": "cuda"}, "this model is on 'cpu'"),
        ({"device": "tpu"}, "device must be"),
    ],
)
def test_arguments_out_of_range(ours, options, message):
    with pytest.raises(InputError, match=message):
        ours.encode(TEXTS, **options)


def test_progress_bar_is_on_stderr(ours, capsys):
    ours.encode(TEXTS, show_progress_bar=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "Inputs" in captured.err
    ours.encode(TEXTS, show_progress_bar=False)
    ours.encode(TEXTS)
    assert capsys.readouterr() == ("", "")


def test_a_fill_mask_model_encodes_with_the_mean(word_checkpoints):
    with gte_deploy.load(word_checkpoints["fill-mask"]) as model:
        expected = [states.mean(axis=0) for states in model.encode(TEXTS, output_value="token_embeddings")]
        np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
