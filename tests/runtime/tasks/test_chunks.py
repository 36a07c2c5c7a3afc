"""Embeddings of chunks against pooling by hand, over the states and offsets of transformers' model and tokenizer."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gte_deploy
from factories import SPELLING, make_checkpoint, write_tokenizer
from family_checkpoints import make_family_checkpoint
from gte_deploy import BackendError, ChunkEmbeddings, InputError, SentenceChunks, TokenChunks
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tasks.chunks import ChunkedTexts, ChunkRequest, windows_of
from gte_deploy.tasks.embed import EmbeddingRequest
from gte_deploy.text.tokenization import load_tokenizer
from runtime_models import MAX_LENGTH, make_word_checkpoint

# Two float32 runs of one model, on another engine or in another batch.
TOLERANCE = 2e-5
ENGINES = ("torch", "onnx", "openvino")
DOCUMENT = (
    "The king of France walked to the old city. Dr. King was not there! 中国。 The queen, (é) 🙂🙂 e\u0301, "
    "is reading\u200b\u0007 and writing:\n\n the good water\u3000was light.   "
)
LONG = " ".join(f"the {word} of a {other} is old." for word in ("king", "river", "queen") for other in SPELLING[-6:])


@pytest.fixture(scope="module")
def words(word_checkpoints) -> Path:
    return word_checkpoints["embed"]


@pytest.fixture(scope="module", params=ENGINES)
def model(request, load_on, words):
    with load_on(request.param, words, num_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def on_torch(words):
    with gte_deploy.load(words, num_threads=1) as loaded:
        yield loaded


class ByHand:
    """Late chunking with transformers alone, token by token."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).float().eval()

    def tokens(self, text: str, prompt: str = "") -> tuple[list[int], list[set[int]], int]:
        """Return the ids without special tokens, the characters of each token, and the number of the prompt's tokens.

        Characters are counted from the end of the prompt, white space around a token left out. A mark without a
        character has the one at its place.
        """
        whole = prompt + text
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        characters = []
        for start, end in found["offset_mapping"]:
            own = [i for i in range(start, end) if not whole[i].isspace()] or [start, max(start, end - 1)]
            characters.append({i - len(prompt) for i in range(own[0], own[-1] + 1)})
        prompted = sum(1 for each in characters if all(i < 0 for i in each))
        return found["input_ids"], characters, prompted

    def states(self, ids: list[int]) -> np.ndarray:
        """Return the states of the tokens, computed with the special tokens around them."""
        import torch

        known = self.tokenizer("a", return_special_tokens_mask=True)
        pairs = zip(known["input_ids"], known["special_tokens_mask"], strict=True)
        before, after = [token for token, is_special in pairs if is_special]
        with torch.no_grad():
            hidden = self.model(input_ids=torch.tensor([[before, *ids, after]])).last_hidden_state[0]
        return hidden[1:-1].numpy()

    def windowed(self, ids: list[int], size: int, overlap: int) -> np.ndarray:
        """Return the state of each token from the window whose edge inside the text is farthest from it."""
        windows, first = [], 0
        while not windows or windows[-1][1] < len(ids):
            windows.append((first, min(len(ids), first + size)))
            first += size - overlap
        states = [self.states(ids[first:end]) for first, end in windows]
        rows = []
        for token in range(len(ids)):
            distances = []
            for first, end in windows:
                inside = first <= token < end
                left = token - first if first else len(ids)
                right = end - 1 - token if end < len(ids) else len(ids)
                distances.append(min(left, right) if inside else -1)
            best = distances.index(max(distances))
            rows.append(states[best][token - windows[best][0]])
        return np.stack(rows)

    def of_spans(self, text: str, spans: Any, prompt: str = "") -> np.ndarray:
        ids, characters, _ = self.tokens(text, prompt)
        states = self.states(ids)
        rows = []
        for start, end in spans:
            own = [i for i, each in enumerate(characters) if each & set(range(start, end))]
            rows.append(states[own].astype(np.float64).mean(axis=0))
        return np.array(rows)


@pytest.fixture(scope="module")
def by_hand(words) -> ByHand:
    return ByHand(words)


def close(found, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


SPANS = [(0, 19), (4, 8), (0, len(DOCUMENT)), (5, 6), (67, 70), (70, 90), (80, 130)]


@pytest.mark.parametrize("prompt", ["", "the query: ", "read"])
def test_given_spans(model, by_hand, prompt):
    found = model.encode(DOCUMENT, chunks=SPANS, prompt=prompt)
    assert found.offsets.tolist() == [list(span) for span in SPANS]
    assert found.texts == [DOCUMENT[start:end] for start, end in SPANS]
    assert found.embeddings.dtype == np.float32 and len(found) == len(SPANS)
    close(found.embeddings, by_hand.of_spans(DOCUMENT, SPANS, prompt))


@pytest.mark.parametrize(("size", "overlap"), [(5, 0), (7, 3), (1, 0), (1000, 0)])
@pytest.mark.parametrize("prompt", ["", "the query: "])
def test_chunks_of_tokens(model, by_hand, size, overlap, prompt):
    found = model.encode(DOCUMENT, chunks=TokenChunks(size, overlap), prompt=prompt)
    ids, characters, prompted = by_hand.tokens(DOCUMENT, prompt)
    states, characters = by_hand.states(ids)[prompted:], characters[prompted:]
    first, expected, offsets = 0, [], []
    while not expected or first + overlap < len(states):
        chosen = slice(first, first + size)
        expected.append(states[chosen].mean(axis=0))
        seen = set().union(*characters[chosen])
        offsets.append([min(seen), max(seen) + 1])
        first += size - overlap
    close(found.embeddings, np.array(expected))
    assert found.offsets.tolist() == offsets


def test_chunks_of_sentences(model, by_hand):
    expected = [
        "The king of France walked to the old city.",
        "Dr. King was not there! 中国。",
        "The queen, (é) 🙂🙂 e\u0301, is reading\u200b\u0007 and writing:",
        "the good water\u3000was light.",
    ]
    spans = [(DOCUMENT.index(text), DOCUMENT.index(text) + len(text)) for text in expected]
    found = model.encode(DOCUMENT, chunks=SentenceChunks(15))
    assert found.texts == expected
    close(found.embeddings, by_hand.of_spans(DOCUMENT, spans))


@pytest.mark.parametrize(("max_length", "overlap"), [(40, None), (40, 0), (40, 7), (17, 7), (3, 0), (None, None)])
@pytest.mark.parametrize("prompt", ["", "the query: "])
def test_windows(model, by_hand, max_length, overlap, prompt):
    ids, characters, prompted = by_hand.tokens(LONG, prompt)
    size = (max_length or MAX_LENGTH) - 2
    if prompt and size <= prompted:
        with pytest.raises(InputError, match="prompt of 3 tokens"):
            model.encode(LONG, chunks=TokenChunks(5), prompt=prompt, max_length=max_length)
        return
    assert len(ids) > size
    shared = size // 10 if overlap is None else overlap
    # Every window begins with the prompt.
    before = ids[:prompted]
    one = by_hand.states
    by_hand.states = lambda part: one([*before, *part])[prompted:]
    try:
        states = by_hand.windowed(ids[prompted:], size - prompted, min(shared, (size - prompted) // 2))
    finally:
        by_hand.states = one
    found = model.encode(LONG, chunks=TokenChunks(30, 4), prompt=prompt, max_length=max_length, window_overlap=overlap)
    expected = [states[first : first + 30].mean(axis=0) for first in range(0, len(states) - 4, 26)]
    close(found.embeddings, np.array(expected))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "modernbert"])
def test_other_tokenizers(kind, tmp_path):
    folder = make_family_checkpoint(tmp_path / kind, kind, "embed")
    by_hand = ByHand(folder)
    text = "the old 🙂\n\n old.  Paris! 城市 e\u0301"
    spans = [(0, 3), (4, 9), (8, 9), (6, 24), (0, len(text))]
    with gte_deploy.load(folder, task="embed", num_threads=1) as model:
        found = model.encode([text, "old"], chunks=[spans, [(0, 3)]], prompt="the city: ")
        parts = model.encode(text, chunks=TokenChunks(6))
    ids, _, prompted = by_hand.tokens(text, "the city: ")
    assert 1 < prompted < len(ids) < model.spec.max_length - 2
    close(found[0].embeddings, by_hand.of_spans(text, spans, "the city: "))
    close(found[1].embeddings, by_hand.of_spans("old", [(0, 3)], "the city: "))
    ids, _, _ = by_hand.tokens(text)
    states = by_hand.states(ids)
    close(parts.embeddings, [states[first : first + 6].mean(axis=0) for first in range(0, len(ids), 6)])


def test_a_list_is_answered_as_its_texts_alone(model):
    texts = [DOCUMENT, "", LONG, "the king", DOCUMENT, " \n"]
    rule = TokenChunks(9, 2)
    found = model.encode(texts, chunks=rule, batch_size=3)
    assert [each.text for each in found] == texts
    assert [len(each) for each in found][1::4] == [0, 0] and found[1].embeddings.shape == (0, 32)
    for text, each in zip(texts, found, strict=True):
        alone = model.encode(text, chunks=rule)
        assert isinstance(alone, ChunkEmbeddings) and alone.offsets.tolist() == each.offsets.tolist()
        close(each.embeddings, alone.embeddings)
    assert found[0].embeddings is not found[4].embeddings
    found[0].embeddings[:] = 0
    assert found[4].embeddings.any()


def test_equal_texts_with_other_spans(on_torch):
    found = on_torch.encode(["the king", "the king", "the king"], chunks=[[(0, 3)], [(4, 8)], [(0, 3)]])
    close(found[0].embeddings, found[2].embeddings, 0)
    assert not np.allclose(found[0].embeddings, found[1].embeddings)


def test_options_of_embeddings(on_torch):
    texts, rule = [DOCUMENT, "the king"], TokenChunks(8)
    plain = np.concatenate([each.embeddings for each in on_torch.encode(texts, chunks=rule)])

    def together(**options: Any) -> Any:
        return [each.embeddings for each in on_torch.encode(texts, chunks=rule, **options)]

    cut = plain[:, :8] / np.linalg.norm(plain[:, :8], axis=1, keepdims=True)
    close(np.concatenate(together(truncate_dim=8, normalize_embeddings=True)), cut)
    binary = np.concatenate(together(precision="ubinary"))
    assert (binary == np.packbits(plain > 0, axis=-1)).mean() > 0.99 and binary.dtype == np.uint8
    int8 = np.concatenate(together(precision="int8"))
    low, high = plain.min(axis=0), plain.max(axis=0)
    assert int8.dtype == np.int8
    close(low + (int8 + 128.5) * (high - low) / 255, plain, (high - low).max() / 255)
    import torch

    tensors = together(convert_to_tensor=True)
    assert all(isinstance(each, torch.Tensor) for each in tensors)
    close(torch.cat(tensors).numpy(), plain)
    lists = together(convert_to_numpy=False)
    assert all(isinstance(row, torch.Tensor) and row.shape == (32,) for each in lists for row in each)
    close(np.concatenate(together(batch_size=1, max_batch_tokens=8, show_progress_bar=True)), plain)


def test_the_checkpoints_own_normalization(tmp_path):
    folder = make_word_checkpoint(tmp_path / "n", task="embed", pooling="mean", normalize=True, prompts={"q": "old "})
    with gte_deploy.load(folder, num_threads=1) as model:
        found = model.encode(DOCUMENT, chunks=SPANS, prompt_name="q")
    expected = ByHand(folder).of_spans(DOCUMENT, SPANS, "old ")
    close(found.embeddings, expected / np.linalg.norm(expected, axis=1, keepdims=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_modules(load_on, tmp_path, dtype):
    """Against sentence-transformers' own Dense modules on the means by hand."""
    import torch
    from safetensors.torch import load_file, save_file
    from sentence_transformers.models import Dense

    folder = make_word_checkpoint(tmp_path / "dense", task="embed", pooling="mean", normalize=False)
    torch.manual_seed(0)
    dense = {"2_Dense": Dense(32, 48), "3_Dense": Dense(48, 12, activation_function=torch.nn.GELU(), use_residual=True)}
    listed = json.loads((folder / "modules.json").read_text())
    for number, (name, module) in enumerate(dense.items(), start=2):
        module.to(getattr(torch, dtype)).float()  # so that its weights are bfloat16's
        (folder / name).mkdir()
        module.save(str(folder / name))
        weights = folder / name / "model.safetensors"
        save_file({key: value.to(getattr(torch, dtype)) for key, value in load_file(weights).items()}, weights)
        kind = "sentence_transformers.models.Dense"
        listed.append({"idx": number, "name": str(number), "path": name, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    expected = torch.from_numpy(ByHand(folder).of_spans(DOCUMENT, SPANS).astype(np.float32))
    with torch.no_grad():
        for module in dense.values():
            expected = module({"sentence_embedding": expected})["sentence_embedding"]
    for backend in ("torch", "onnx") if dtype == "float32" else ("torch",):
        with load_on(backend, folder, num_threads=1) as model:
            assert model.spec.embedding_width == 12
            close(model.encode(DOCUMENT, chunks=SPANS).embeddings, expected.numpy())
            assert model.encode("", chunks=TokenChunks(3)).embeddings.shape == (0, 12)
            whole = model.encode(DOCUMENT)
            # One layer of numpy against the engine's: on the mean with special tokens, both give the text's embedding.
            pooled = model.encode(DOCUMENT, output_value="token_embeddings").mean(axis=0, keepdims=True)
            close(model._dense(pooled)[0], whole)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    with gte_deploy.load(damaged, num_threads=1) as model:
        (damaged / "3_Dense" / "model.safetensors").write_bytes(b"\xff" * 20)
        with pytest.raises(gte_deploy.CheckpointError, match="not a whole safetensors file"):
            model.encode(DOCUMENT, chunks=SPANS)


def test_one_chunk_of_all_is_the_mean_without_special_tokens(on_torch):
    tokens = on_torch.encode(DOCUMENT, output_value="token_embeddings")
    close(on_torch.encode(DOCUMENT, chunks=[(0, len(DOCUMENT))]).embeddings[0], tokens[1:-1].mean(axis=0))


def test_truncation(on_torch, by_hand):
    found = on_torch.encode(LONG, chunks=TokenChunks(10), truncation=True, max_length=22)
    ids, _, _ = by_hand.tokens(LONG)
    states = by_hand.states(ids[:20])
    close(found.embeddings, [states[:10].mean(axis=0), states[10:].mean(axis=0)])
    with pytest.raises(InputError, match=r"chunk 1 of input 0, \(300, 310\), has no token"):
        on_torch.encode(LONG, chunks=[(0, 3), (300, 310)], truncation=True, max_length=22)
    other = copy.copy(on_torch)
    other.max_seq_length = 22
    close(other.encode(LONG, chunks=TokenChunks(10)).embeddings, found.embeddings)
    other.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": [(0, 3), (3, 4)]}, r"chunk 1 of input 0, \(3, 4\), has no token"),
        ({"chunks": [(0, 300)]}, "0 <= start < end"),
        ({"chunks": 5}, "chunks must be TokenChunks"),
        ({"chunks": "tokens"}, "chunks must be TokenChunks"),
        ({"chunks": {}}, "chunks must be TokenChunks"),
        ({"chunks": TokenChunks}, "chunks must be TokenChunks"),
        ({"chunks": TokenChunks(5), "pooling": "cls"}, "pooling is 'cls'"),
        ({"chunks": TokenChunks(5), "output_value": "token_embeddings"}, "output_value is 'token_embeddings'"),
        ({"chunks": TokenChunks(5), "output_value": None}, "output_value is None"),
        ({"chunks": TokenChunks(5), "window_overlap": 64}, "window_overlap must be an integer from 0 to 63"),
        ({"chunks": TokenChunks(5), "window_overlap": -1}, "window_overlap"),
        ({"chunks": TokenChunks(5), "max_length": 2}, "max_length"),
        ({"chunks": TokenChunks(5), "max_active_dims": 2}, "sparse models"),
        ({"chunks": TokenChunks(5), "precision": "int4"}, "precision"),
        ({"chunks": TokenChunks(500), "precision": "int8"}, "there is only one"),
        ({"window_overlap": 3}, "window_overlap is for chunks"),
    ],
    ids=str,
)
def test_what_chunks_cannot_have_is_refused(on_torch, options, message):
    with pytest.raises(InputError, match=message):
        on_torch.encode("the king", **options)


def test_lists_that_do_not_fit_are_refused(on_torch):
    with pytest.raises(InputError, match="chunks has 1 lists and there are 2 inputs"):
        on_torch.encode(["the king", "old"], chunks=[[(0, 3)]])
    with pytest.raises(InputError, match="chunk 0 of input 1"):
        on_torch.encode(["the king", "old"], chunks=[[(0, 3)], [(0, 8)]])


def test_models_without_chunks_refuse_them(tmp_path, on_torch, monkeypatch):
    folder = make_word_checkpoint(tmp_path / "mlm")
    with gte_deploy.load(folder, task="sparse", num_threads=1) as sparse, pytest.raises(InputError, match="chunks"):
        sparse.encode("the king", chunks=TokenChunks(5))
    monkeypatch.setattr(on_torch._backend, "outputs", ("sentence_embedding",))
    with pytest.raises(BackendError, match="no output 'last_hidden_state'.*--outputs all"):
        on_torch.encode("the king", chunks=TokenChunks(5))


def test_results_can_be_pickled(on_torch):
    found = on_torch.encode("the king", chunks=TokenChunks(1))
    again = pickle.loads(pickle.dumps(found))
    assert again.texts == ["the", "king"] and np.array_equal(again.embeddings, found.embeddings)
    assert pickle.loads(pickle.dumps(TokenChunks(3, 1))) == TokenChunks(3, 1)


def test_more_than_one_group_of_texts(on_torch, monkeypatch):
    expected = on_torch.encode([LONG, DOCUMENT, "the king", ""], chunks=TokenChunks(9))
    monkeypatch.setattr("gte_deploy.tasks.chunks._GROUP_CHARACTERS", 20)
    found = on_torch.encode([LONG, DOCUMENT, "the king", ""], chunks=TokenChunks(9))
    for one, other in zip(found, expected, strict=True):
        close(one.embeddings, other.embeddings)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speller")
    make_checkpoint(folder, vocab=SPELLING)
    write_tokenizer(folder, SPELLING)
    return load_tokenizer(folder)


TEXTS = st.text(
    st.sampled_from("ab  .\n!中é\u0301🙂\u0007。Ⅷİ") | st.characters(exclude_categories=["Cs"]), max_size=80
)
RULES = st.integers(1, 9).flatmap(
    lambda size: st.integers(0, size - 1).map(lambda overlap: TokenChunks(size, overlap))
) | st.integers(1, 9).map(SentenceChunks)


@given(TEXTS, st.sampled_from(["", "a ", "ab"]), RULES, st.integers(8, 40), st.integers(0, 3))
@settings(deadline=None, max_examples=300)
def test_every_token_counts_once_in_each_of_its_chunks(speller, text, prompt, rule, limit, overlap):
    spec = ModelSpec("embed", max_length=limit, vocab_size=256, hidden_size=2, pad_token_id=0)
    request = ChunkRequest(EmbeddingRequest(spec, "mean"), rule, overlap)
    texts = ChunkedTexts.of(text, prompt, rule)
    (document,) = request.documents(texts, [0], speller, limit=limit, truncation=False)
    # The offsets lie in the text, in order, and every visible token of the text lies in a chunk.
    offsets, ranges = document.offsets, document.ranges
    assert ((offsets >= 0) & (offsets <= len(text))).all() and (offsets[:, 0] < offsets[:, 1]).all()
    assert (np.diff(offsets, axis=0) >= 0).all()
    own = len(document.ids)
    covered = np.zeros(own, int)
    for first, end in ranges.tolist():
        covered[first:end] += 1
    assert (covered >= 1).all() and (isinstance(rule, TokenChunks) or (covered == 1).all())

    # A state that names its token: the mean over a chunk is that of the numbers of its tokens.
    def sums():
        for window in windows_of([document]).values():
            row = window.row
            assert len(row) <= limit and row[1 : 1 + len(document.prompt_ids)] == document.prompt_ids
            numbers = np.full(len(row), np.nan, np.float32)
            numbers[1 + len(document.prompt_ids) : -1] = np.arange(window.first, window.end)
            yield window, window.sums(np.stack([numbers, np.ones_like(numbers)], axis=1))

    ((_, ((_, means),)),) = request.answers([document], sums())
    expected = [[np.mean(range(first, end)), 1] for first, end in ranges.tolist()]
    np.testing.assert_allclose(means, np.array(expected).reshape(-1, 2), rtol=1e-6)
