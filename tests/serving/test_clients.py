"""Clients of others, as their users call them."""

from __future__ import annotations

import numpy as np
import pytest

TEXTS = ["Paris is the capital of France.", "the king"]


@pytest.fixture(scope="module")
def url(tmp_path_factory, task_bundles):
    from http_server import ServerProcess, serve_command

    bundles = [f"{name}={bundle}" for name, bundle in task_bundles.items()]
    server = ServerProcess(serve_command(*bundles), cwd=tmp_path_factory.mktemp("server"), GTE_DEPLOY_TOKEN="secret")
    server.wait_until_ready()
    yield server.url
    assert server.end() == 0


@pytest.fixture(scope="module")
def expected(task_checkpoints):
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(str(task_checkpoints["embed"]), device="cpu").encode(TEXTS)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_openai(url, expected):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
        assert [model.id for model in client.models.list()][:2] == ["embed", "rank"]
        assert client.models.retrieve("rank").object == "model"
        found = client.embeddings.create(model="embed", input=TEXTS)  # it asks for base64
        np.testing.assert_allclose([each.embedding for each in found.data], expected, rtol=1e-4, atol=1e-5)
        assert found.usage.total_tokens > 0
        plain = client.embeddings.create(model="embed", input=TEXTS[0], dimensions=5, encoding_format="float")
        assert len(plain.data[0].embedding) == 5
        with pytest.raises(openai.NotFoundError, match="this server has embed"):
            client.embeddings.create(model="gpt", input="a")
        with pytest.raises(openai.UnprocessableEntityError, match="input 0 has"):
            client.embeddings.create(model="embed", input="the old city " * 100)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").embeddings.create(model="embed", input="a")


def test_inference_client(url, expected, monkeypatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # it refuses URLs of this machine, too

    def client(path):
        return InferenceClient(model=f"{url}{path}", token="secret")

    np.testing.assert_allclose(client("/").feature_extraction(TEXTS), expected, rtol=1e-4, atol=1e-5)
    cut = client("/embed").feature_extraction("the city " * 200, truncate=True, normalize=True, dimensions=4)
    assert cut.shape == (1, 4)
    scores = client("/similarity").sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    np.testing.assert_allclose(scores, expected @ expected[0], rtol=1e-4, atol=1e-5)
    best = client("/predict").text_classification("the king", top_k=1)
    assert best[0].label == "LABEL_0" and 0 < best[0].score < 1
    masks = client("/fill-mask").fill_mask("Paris is the [MASK] of France.", top_k=2)
    assert len(masks) == 2 and masks[0].score >= masks[1].score
    entities = client("/classify_tokens").token_classification(
        TEXTS[0], aggregation_strategy="simple", ignore_labels=[]
    )
    assert entities[0].start == 0 and entities[-1].end == len(TEXTS[0])
