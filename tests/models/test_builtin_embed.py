"""The embedding model of the package: a bundle in INT8 whose embeddings mean something, without torch or an export."""

import io
import json
import pickle
import zipfile

import numpy as np
import onnxruntime
import pytest
from transformers import AutoTokenizer

import gte_deploy
from gte_deploy import cli
from gte_deploy.exporters import cli as export_cli
from gte_deploy.models import builtin_embed_bundle

NAME = "gte-en-embed-tiny"
COMPRESSED_LIMIT = 12_000_000
QUESTIONS = {
    "a young dog": "A puppy sleeps on the sofa.",
    "lending money": "The bank gives loans to farmers at a fixed rate of interest.",
    "weather forecast": "Tomorrow it will rain in the north, with strong wind from the sea.",
    "how to remove a program": "Use this command to uninstall the packages that you no longer need.",
    "disease of the heart": "The cardiologist treats patients with blocked arteries.",
    "compare two files": "This tool prints the lines in which both documents differ.",
    "musical instrument with strings": "He plays the violin in the orchestra of the city.",
    "to speak very quietly": "She whispered something into his ear.",
}


@pytest.fixture(params=["onnx", "openvino"])
def model(request):
    with gte_deploy.load(NAME, backend=request.param) as opened:
        yield opened


def embedded_by_hand(texts: list[str]) -> np.ndarray:
    """Embed with ONNX Runtime, AutoTokenizer and NumPy alone."""
    folder = builtin_embed_bundle()
    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    wanted = [each.name for each in session.get_inputs()]
    outputs = session.run(None, {name: encoded[name].astype(np.int64) for name in wanted})
    named = dict(zip([each.name for each in session.get_outputs()], outputs, strict=True))
    mask = encoded["attention_mask"][..., None]
    means = (named["last_hidden_state"] * mask).sum(1) / mask.sum(1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_it_answers_as_its_graph_does(model):
    texts = [*QUESTIONS, *QUESTIONS.values(), "a long text. " * 100]
    found, expected = model.encode(texts), embedded_by_hand(texts)
    assert found.shape == (17, 256) and model.spec.max_length == 512
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(1).min() > 0.999  # int8 on two engines, and padding


def test_its_embeddings_mean_something(model):
    """Hardly a question shares a word with its answer, so the encoder that it was made of finds few of them."""
    right = np.arange(len(QUESTIONS))
    questions, answers = model.encode(list(QUESTIONS)), model.encode(list(QUESTIONS.values()))
    found = (model.similarity(questions, answers).argmax(1) == right).sum()
    with gte_deploy.load() as encoder:
        questions, answers = encoder.encode(list(QUESTIONS)), encoder.encode(list(QUESTIONS.values()))
        raw = (encoder.similarity(questions, answers).argmax(1) == right).sum()
    assert found >= len(QUESTIONS) - 1 and raw <= len(QUESTIONS) - 3


def test_it_is_taken_for_embeddings_without_a_name(capsys):
    with gte_deploy.load(task="embed") as opened, pickle.loads(pickle.dumps(opened)) as again:
        assert again.path == opened.path == builtin_embed_bundle()
        expected = opened.encode("A text.")
    assert cli.main(["encode", "A text."]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out), expected, atol=1e-6)


def test_commands_take_its_name(capsys):
    assert cli.main(["verify", NAME]) == 0
    assert "all as the manifest says" in capsys.readouterr().out
    assert cli.main(["info", NAME]) == 0
    assert NAME in capsys.readouterr().out


def test_what_needs_a_checkpoint_is_refused(tmp_path, capsys):
    for options in ({"path": NAME, "backend": "torch"}, {"task": "embed", "backend": "torch"}):
        with pytest.raises(gte_deploy.BackendError, match="the torch backend runs checkpoints"):
            gte_deploy.load(**options)
    with pytest.raises(gte_deploy.InputError, match="is a bundle for embed, not for sparse"):
        gte_deploy.load(NAME, task="sparse")
    assert export_cli.main([NAME, "--output", str(tmp_path / "again")]) != 0
    assert "is a bundle, which was exported already" in capsys.readouterr().err


def test_it_is_small():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in builtin_embed_bundle().rglob("*"):
            if path.is_file():
                file.write(path, path.relative_to(builtin_embed_bundle()))
    assert archive.tell() < COMPRESSED_LIMIT


def test_the_card_says_what_it_finds():
    card = (builtin_embed_bundle() / "README.md").read_text(encoding="utf-8")
    assert "| BM25 |" in card and "this bundle" in card and "## Training" in card
