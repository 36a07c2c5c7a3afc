"""The losses are those of the formulas, computed in float64; GradCache has the gradient of the whole batch."""

import math

import numpy as np
import pytest
import torch

from gte_deploy.core.errors import InputError
from gte_deploy.training.finetune.losses import build_loss
from gte_deploy.training.finetune.opening import open_initial

QUERIES = ["what is green river", "what is tall city", "what is cold dog"]
DOCUMENTS = ["the river is green and old", "the city is tall and old", "the dog is cold and old"]


def batch(model, *columns):
    return [model.preprocess(texts) for texts in columns]


def embeddings(model, texts):
    return torch.nn.functional.normalize(torch.from_numpy(model.encode(texts)).double())


def test_contrastive_loss_is_infonce(make_finetune):
    recipe = make_finetune(loss={"temperature": 0.1})
    model = open_initial(recipe, device="cpu").eval()
    value = build_loss(model, recipe)(batch(model, QUERIES, DOCUMENTS), None)
    logits = embeddings(model, QUERIES) @ embeddings(model, DOCUMENTS).T / 0.1
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hard_negatives_join_the_batch(make_finetune):
    recipe = make_finetune(loss={"temperature": 0.1})
    model = open_initial(recipe, device="cpu").eval()
    negatives = ["the king is old", "the tree is old", "the car is old"]
    value = build_loss(model, recipe)(batch(model, QUERIES, DOCUMENTS, negatives), None)
    logits = embeddings(model, QUERIES) @ embeddings(model, DOCUMENTS + negatives).T / 0.1
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["embed", "sparse"])
def test_mini_batches_give_the_gradient_of_the_whole_batch(make_finetune, kind):
    gradients = []
    for size in (None, 2):
        recipe = make_finetune(kind, loss={"temperature": 0.5, "mini_batch_size": size})
        model = open_initial(recipe, device="cpu")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = build_loss(model, recipe)(batch(model, QUERIES, DOCUMENTS), None)
        (sum(loss.values()) if isinstance(loss, dict) else loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-4, atol=1e-6)


def test_matryoshka_adds_the_loss_of_the_leading_dimensions(make_finetune):
    recipe = make_finetune(loss={"temperature": 0.1, "matryoshka_dims": (8,)})
    model = open_initial(recipe, device="cpu").eval()
    value = build_loss(model, recipe)(batch(model, QUERIES, DOCUMENTS), None)
    expected = 0.0
    for width in (32, 8):
        parts = [torch.nn.functional.normalize(embeddings(model, t)[:, :width]) for t in (QUERIES, DOCUMENTS)]
        expected += torch.nn.functional.cross_entropy(parts[0] @ parts[1].T / 0.1, torch.arange(3)).item()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="the embeddings have 32 dimensions"):
        build_loss(model, make_finetune(loss={"matryoshka_dims": (64,)}))


def test_cosent_orders_pairs_by_their_scores(make_finetune):
    recipe = make_finetune(loss={"name": "cosent", "temperature": 0.1})
    model = open_initial(recipe, device="cpu").eval()
    scores = [0.9, 0.1, 0.5]
    value = build_loss(model, recipe)(batch(model, QUERIES, DOCUMENTS), torch.tensor(scores))
    cosines = (embeddings(model, QUERIES) * embeddings(model, DOCUMENTS)).sum(1) / 0.1
    terms = [math.exp(cosines[j] - cosines[i]) for i in range(3) for j in range(3) if scores[i] > scores[j]]
    assert value.item() == pytest.approx(math.log1p(sum(terms)), rel=1e-5)


def test_a_reranker_learns_by_binary_cross_entropy(make_finetune):
    recipe = make_finetune("rerank")
    model = open_initial(recipe, device="cpu").eval()
    labels = np.array([1.0, 0.0, 1.0])
    probabilities = model.predict(list(zip(QUERIES, DOCUMENTS, strict=True))).astype(float)
    expected = -np.mean(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities))
    value = build_loss(model, recipe)([QUERIES, DOCUMENTS], torch.from_numpy(labels).float())
    assert value.item() == pytest.approx(expected, rel=1e-5)
