"""Heads on tokens and on texts, and their examples as tokens, against transformers and sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

from every_family import make_masked_lm
from factories import make_checkpoint
from gte_deploy.training.evaluation.classifiers import open_encoder
from gte_deploy.training.evaluation.finetuning import predict_tokens
from gte_deploy.training.evaluation.heads import (
    IGNORED,
    AnswerRows,
    ChoiceRows,
    DualEncoder,
    PairRows,
    TagRows,
    TokenHead,
    answer_loss,
    bare_encoder,
    choice_loss,
    embed_texts,
    encode_texts,
    nearest,
    tag_loss,
    token_dropout,
)
from gte_deploy.training.evaluation.xtreme_data import ChoiceExamples, ContextQuestion, TaggedSentences, TextPairs

CPU = torch.device("cpu")
SENTENCES = TaggedSentences([["the", "riverside", "is", "old"], ["city"]], [["DET", "NOUN", "AUX", "ADJ"], ["NOUN"]])
TAGS = ("ADJ", "AUX", "DET", "NOUN")


@pytest.fixture(params=["gte", "bert", "xlm-roberta"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_masked_lm(tmp_path / "mlm", request.param)


def theirs_with_our_weights(auto: Any, folder: Path, ours: TokenHead, **rest: Any) -> Any:
    """transformers' own class with the weights of our encoder and head."""
    model = auto.from_pretrained(folder, dtype=torch.float32, **rest)
    base = {name: tensor for name, tensor in ours.encoder.state_dict().items() if not name.startswith("pooler.")}
    model.base_model.load_state_dict(base)
    head = model.classifier if hasattr(model, "classifier") else model.qa_outputs
    head.load_state_dict(ours.classifier.state_dict())
    return model.eval()


def test_tags_are_those_of_transformers(folder: Path):
    encoder = open_encoder(folder)
    bare = bare_encoder(encoder, seed=0, is_packed=False)
    ours = TokenHead(bare, len(TAGS), dropout=token_dropout(bare)).eval()
    theirs = theirs_with_our_weights(AutoModelForTokenClassification, folder, ours, num_labels=len(TAGS))
    assert theirs.dropout.p == ours.dropout.p == 0.1
    rows = TagRows.of(SENTENCES, TAGS, encoder=encoder, max_length=32)
    inputs, labels = rows.batch(np.arange(2), CPU)
    with torch.inference_mode():
        expected = theirs(**inputs, labels=labels)
        output = ours(**inputs).logits
    np.testing.assert_allclose(output, expected.logits, atol=2e-5)
    assert tag_loss(output, labels).item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_words_are_labelled_as_transformers_aligns_them(folder: Path):
    encoder = open_encoder(folder)
    rows = TagRows.of(SENTENCES, TAGS, encoder=encoder, max_length=9)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(SENTENCES.words, is_split_into_words=True, truncation=True, max_length=9)
    ids = [rows.rows.input_ids[a:b].tolist() for a, b in zip(rows.rows.ends[:-1], rows.rows.ends[1:], strict=True)]
    assert ids == expected["input_ids"] and max(map(len, ids)) == 9
    for number, sentence in enumerate(SENTENCES.tags):
        tags, before = [], None
        for word in expected.word_ids(number):
            tags.append(IGNORED if word is None or word == before else TAGS.index(sentence[word]))
            before = word
        assert rows.tags[rows.rows.ends[number] : rows.rows.ends[number + 1]].tolist() == tags
    predicted, true = rows.decode(
        [np.eye(4)[np.maximum(rows.tags[a:b], 0)] for a, b in ((0, 9), (9, rows.rows.ends[-1]))], TAGS
    )
    assert predicted == true and true[1] == ["NOUN"]


QUESTIONS = [
    ContextQuestion(
        "  the city".lstrip(), "the river is old and the city is old and the river is the city", ("old",), 13
    ),
    ContextQuestion("old", "the river is old", ("river is",), 4),
    ContextQuestion("old " * 40, "the city", ("city",), 4),
]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])  # transformers has no class of GTE for answers
def test_answers_are_those_of_transformers(tmp_path: Path, kind):
    folder = make_masked_lm(tmp_path / "mlm", kind)
    encoder = open_encoder(folder)
    ours = TokenHead(bare_encoder(encoder, seed=0, is_packed=False), 2, dropout=0.0, masked=True).eval()
    theirs = theirs_with_our_weights(AutoModelForQuestionAnswering, folder, ours, num_labels=2)
    rows = AnswerRows.of(QUESTIONS[1:2], encoder=encoder, max_length=40, stride=4)
    inputs, labels = rows.rows.batch(np.arange(1), CPU)
    with torch.inference_mode():
        expected = theirs(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1])
        output = ours(**inputs).logits
    np.testing.assert_allclose(output[..., 0], expected.start_logits, atol=2e-5)
    np.testing.assert_allclose(output[..., 1], expected.end_logits, atol=2e-5)
    assert answer_loss(output, labels).item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_padding_is_no_answer(tmp_path: Path):
    encoder = open_encoder(make_checkpoint(tmp_path, layout="native", max_positions=64))
    model = TokenHead(bare_encoder(encoder, seed=0, is_packed=False), 2, dropout=0.0, masked=True).eval()
    rows = encode_texts(["w7 w8", "w7 w8 w9 w10 w11"], encoder=encoder, max_length=16)
    with torch.inference_mode():
        together = model(**rows.inputs(np.arange(2), CPU)).logits.softmax(1)[0]
        alone = model(**rows.inputs(np.arange(1), CPU)).logits.softmax(1)[0]
    np.testing.assert_allclose(together[:4], alone, atol=1e-6)
    assert (together[4:] == 0).all()


def test_long_texts_become_the_rows_of_transformers(folder: Path):
    encoder = open_encoder(folder)
    rows = AnswerRows.of(QUESTIONS[:2], encoder=encoder, max_length=14, stride=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(
        [item.question for item in QUESTIONS[:2]],
        [item.context for item in QUESTIONS[:2]],
        truncation="only_second",
        max_length=14,
        stride=4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    ends = rows.rows.ends
    ids = [rows.rows.input_ids[a:b].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert ids == expected["input_ids"] and len(ids) > 2
    assert rows.questions.tolist() == expected["overflow_to_sample_mapping"]
    for row, (number, offsets) in enumerate(zip(rows.questions, rows.offsets, strict=True)):
        inside = [sequence == 1 for sequence in expected.sequence_ids(row)]
        assert offsets[inside].tolist() == [
            list(o) for o, i in zip(expected["offset_mapping"][row], inside, strict=True) if i
        ]
        first, last = rows.rows.labels[row]
        if (first, last) != (0, 0):
            item = QUESTIONS[number]
            assert item.context[offsets[first, 0] : offsets[last, 1]] == item.answers[0]
    assert {n for n, label in zip(rows.questions, rows.rows.labels, strict=True) if label.any()} == {0, 1}


def test_a_question_that_fills_the_row_is_cut(folder: Path):
    rows = AnswerRows.of(QUESTIONS[2:], encoder=open_encoder(folder), max_length=24, stride=128)
    assert rows.rows.lengths.max() <= 24 and rows.rows.labels.any()


def test_the_answer_is_the_best_span_of_all_rows(folder: Path):
    rows = AnswerRows.of(QUESTIONS[:2], encoder=open_encoder(folder), max_length=14, stride=4)
    outputs = []
    for label, length in zip(rows.rows.labels, rows.rows.lengths, strict=True):
        output = np.zeros((length, 2))
        output[0] = 9  # the first token is no answer, however high its scores
        if label.any():
            output[label[0], 0] = output[label[1], 1] = 5
        outputs.append(output)
    assert rows.answers(outputs, QUESTIONS[:2]) == ["old", "river is"]


def test_choices_are_scored_together(tmp_path: Path):
    encoder = open_encoder(make_checkpoint(tmp_path, layout="native"))
    texts = [("w5", f"w{number}") for number in range(6, 12)]
    rows = ChoiceRows.of(ChoiceExamples(texts, np.array([2, 0])), encoder=encoder, max_length=8)
    inputs, labels = rows.batch(np.array([1]), CPU)
    assert inputs["input_ids"][:, 3].tolist() == [9, 10, 11] and labels.tolist() == [0]
    logits = torch.arange(6.0)[:, None]
    expected = -torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]), 1)[[0, 1], [2, 0]].mean()
    assert choice_loss(logits, torch.tensor([2, 0])) == pytest.approx(expected.item())


def test_texts_are_compared_as_by_sentence_transformers(tmp_path: Path):
    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = make_checkpoint(tmp_path, layout="native")
    encoder = open_encoder(folder)
    ours = DualEncoder(bare_encoder(encoder, seed=0, is_packed=False)).eval()
    pairs = TextPairs(["w7 w8", "w9"], ["w7 w8 w10 w11", "w9 w12 w13"])
    rows = PairRows.of(pairs, encoder=encoder, query_length=8, max_length=8)
    inputs, labels = rows.batch(np.arange(2), CPU)
    transformer = Transformer(str(folder))
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="cls")], device="cpu")
    queries, passages = (torch.from_numpy(model.encode(texts)) for texts in (pairs.queries, pairs.passages))
    with torch.inference_mode():
        np.testing.assert_allclose(ours(**inputs).logits, 20 * util.cos_sim(queries, passages), atol=1e-4)
        embeddings = embed_texts(ours, rows.passages)
    np.testing.assert_allclose(embeddings, util.normalize_embeddings(passages), atol=1e-5)
    assert labels.tolist() == [0, 1]


def test_nearest_passages_are_those_of_a_full_comparison():
    generator = torch.Generator().manual_seed(0)
    queries, passages = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    expected = np.argsort(-(queries.double() @ passages.double().T).numpy(), axis=1)[:, :20]
    np.testing.assert_array_equal(nearest(queries, passages, top=20, device=CPU), expected)
    assert nearest(queries, passages[:3], top=20, device=CPU).shape == (300, 3)


def test_heads_compute_no_padding_if_asked(folder: Path):
    encoder = open_encoder(folder)
    padded = TokenHead(bare_encoder(encoder, seed=0, is_packed=False), 3, dropout=0.0).eval()
    packed = TokenHead(bare_encoder(encoder, seed=0, is_packed=True), 3, dropout=0.0).eval()
    packed.load_state_dict(padded.state_dict())
    rows = encode_texts(["the river", "old", "the old city is old"], encoder=encoder, max_length=24)
    for ours, theirs in zip(predict_tokens(packed, rows), predict_tokens(padded, rows), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
