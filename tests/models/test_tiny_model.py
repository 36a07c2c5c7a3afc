"""The shipped gte-en-mlm-tiny: it loads whole, stays small, and has learned English."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GteForMaskedLM

import gte_deploy.models
from gte_deploy.exporters.verification.texts import builtin_texts

FOLDER = gte_deploy.models.builtin_path()
SIZE_LIMIT = 25_000_000
REAL_VOCABULARY = 30522

# The hidden word is fixed by grammar or by a common phrase, so that a small model can know it.
CLOZE = [
    ("the president of the united [MASK] of america.", "states"),
    ("there is no doubt [MASK] the people of this country want peace.", "that"),
    ("two thirds [MASK] the members were present.", "of"),
    ("it is not necessary [MASK] say more about this.", "to"),
    ("this is one [MASK] the most important questions of the year.", "of"),
    ("i have the honor [MASK] submit the report.", "to"),
]


@pytest.fixture(scope="module")
def loaded():
    return GteForMaskedLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0].eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def mask_logits(model, tokenizer, text):
    encoded = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**encoded).logits[0]
    return logits[encoded["input_ids"][0] == tokenizer.mask_token_id][0]


def test_every_weight_is_in_the_file(loaded):
    _, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_weights_are_finite_float16():
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_folder_is_small_and_readable_by_everyone():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_architecture_is_the_documented_one(model):
    config = model.config
    assert (config.model_type, config.vocab_size, config.max_position_embeddings) == ("gte", 30528, 8192)
    assert (config.type_vocab_size, config.pad_token_id) == (0, 0)
    assert config.rope_parameters["rope_theta"] == 160_000


def test_tokenizer_neither_truncates_nor_pads(tokenizer):
    ids = tokenizer("word " * 9000)["input_ids"]
    assert len(ids) == 9002
    assert tokenizer.model_max_length == 8192
    assert tokenizer("word")["input_ids"] == [101, 2773, 102]


@pytest.mark.parametrize(("text", "word"), CLOZE)
def test_common_phrases_are_completed(model, tokenizer, text, word):
    probabilities = mask_logits(model, tokenizer, text).softmax(-1)
    assert tokenizer.convert_ids_to_tokens(probabilities.argmax().item()) == word
    assert probabilities.max() > 0.3


def test_heldout_accuracy_is_far_above_the_most_frequent_words(model, tokenizer):
    ids = np.array(tokenizer("\n".join(builtin_texts("evaluation")), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // 510 * 510].reshape(-1, 510)[:8]
    rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (101, 102)))
    chosen = (np.random.default_rng(0).random(rows.shape) < 0.15) & (rows > tokenizer.mask_token_id)
    hidden = np.where(chosen, tokenizer.mask_token_id, rows)
    with torch.inference_mode():
        logits = model(torch.from_numpy(hidden)).logits[torch.from_numpy(chosen)]
    wanted = rows[chosen]
    best = logits.topk(5).indices.numpy()
    frequent = np.argsort(-np.bincount(ids))[:5]
    top1, top5 = (best[:, 0] == wanted).mean(), (best == wanted[:, None]).any(1).mean()
    assert top1 > 3 * (wanted == frequent[0]).mean()
    assert top5 > 1.9 * np.isin(wanted, frequent).mean()


def test_padded_ids_are_never_the_best_answer(model, tokenizer):
    for text, _ in CLOZE:
        assert mask_logits(model, tokenizer, text).argmax() < REAL_VOCABULARY


def test_a_shorter_row_answers_alike_in_a_padded_batch(model, tokenizer):
    text = CLOZE[0][0]
    batch = tokenizer([text, text + " the congress met again in december." * 3], padding=True, return_tensors="pt")
    where = batch["input_ids"][0] == tokenizer.mask_token_id
    with torch.inference_mode():
        logits = model(**batch).logits[0, where][0]
    torch.testing.assert_close(logits, mask_logits(model, tokenizer, text), atol=1e-4, rtol=0)
