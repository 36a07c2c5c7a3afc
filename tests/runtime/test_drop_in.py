"""A model in place of a SentenceTransformer, CrossEncoder or SparseEncoder: its attributes, and their evaluators."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from runtime_models import MAX_LENGTH, make_word_checkpoint

pytest.importorskip("sentence_transformers", minversion="6")

# float32 in another order of sums; the evaluators' means and thresholds do not enlarge it.
TOLERANCE = {"rel": 1e-4, "abs": 1e-4}
# Numbers that differ in the last bit may round to neighbouring integers.
TOLERANCE_OF_INT8 = {"rel": 0, "abs": 2e-3}
QUERIES = {
    "q1": "the capital of france", "q2": "old man", "q3": "water and light", "q4": "a good book to read",
    "q5": "the queen of the world",
}  # fmt: skip
CORPUS = {
    "d1": "Paris is the capital of France.",
    "d2": "the old man walked on and on",
    "d3": "light is on the water",
    "d4": "we read and write",
    "d5": "the king and the queen",
    "d6": "a small city on the river",
    "d7": "this is not a time to play!",
    "d8": "sing to the world of a new day",
}
RELEVANT = {"q1": {"d1", "d6"}, "q2": {"d2"}, "q3": {"d3"}, "q4": {"d4", "d7"}, "q5": {"d5", "d8"}}
FIRST, SECOND = list(CORPUS.values()), [*list(CORPUS.values())[1:], "the capital of france"]
LABELS = [1, 0, 1, 1, 0, 0, 1, 0]
SCORES = [0.9, 0.1, 0.4, 0.8, 0.7, 0.2, 0.3, 0.6]
SAMPLES = [
    {
        "query": QUERIES[query],
        "positive": [CORPUS[doc] for doc in sorted(RELEVANT[query])],
        "negative": [text for doc, text in CORPUS.items() if doc not in RELEVANT[query]][:4],
    }
    for query in QUERIES
]
TRIPLES = list(zip(*((s["query"], s["positive"][0], s["negative"][0]) for s in SAMPLES), strict=True))


@pytest.fixture(scope="module")
def embedders(word_checkpoints, load_on):
    from sentence_transformers import SentenceTransformer

    with load_on("onnx", word_checkpoints["embed"]) as ours:
        yield ours, SentenceTransformer(str(word_checkpoints["embed"]), device="cpu")


@pytest.fixture(scope="module", params=[1, 3])
def cross_encoders(request, word_checkpoints, tmp_path_factory, load_on):
    from sentence_transformers import CrossEncoder

    checkpoint = word_checkpoints["classify"]
    if request.param > 1:
        folder = tmp_path_factory.mktemp("classify") / "model"
        checkpoint = make_word_checkpoint(folder, task="classify", num_labels=request.param, seed=5)
    with load_on("onnx" if request.param == 1 else "torch", checkpoint) as ours:
        yield ours, CrossEncoder(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def sparse_encoders(tmp_path_factory, load_on):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    folder = tmp_path_factory.mktemp("sparse")
    masked_lm = make_word_checkpoint(folder / "mlm", seed=7)
    modules = [Transformer(str(masked_lm), transformer_task="fill-mask"), SpladePooling("max")]
    SparseEncoder(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    with load_on("torch", folder / "model") as ours:
        yield ours, SparseEncoder(str(folder / "model"), device="cpu")


def assert_evaluated_alike(evaluator, ours, theirs, tolerance=TOLERANCE):
    """The evaluator finds the same metrics on both models; `evaluator` may be a function that makes it of a model."""
    made = [evaluator(model) if inspect.isfunction(evaluator) else evaluator for model in (ours, theirs)]
    found, expected = (each(model) for each, model in zip(made, (ours, theirs), strict=True))
    assert found.keys() == expected.keys() and len(expected) > 0
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, **tolerance), name
    recorded = ours.model_card_data.evaluations[getattr(made[0], "name", "") or made[0].description]
    assert recorded.keys() <= found.keys()


def dense_evaluators():
    from sentence_transformers.sentence_transformer import evaluation

    names = ["cosine", "dot", "euclidean", "manhattan"]
    return {
        "similarity": evaluation.EmbeddingSimilarityEvaluator(FIRST, SECOND, SCORES),
        "similarity int8": evaluation.EmbeddingSimilarityEvaluator(
            FIRST, SECOND, SCORES, precision="int8", similarity_fn_names=["cosine"]
        ),
        "similarity in 8": evaluation.EmbeddingSimilarityEvaluator(
            FIRST, SECOND, SCORES, similarity_fn_names=names, truncate_dim=8, name="in 8"
        ),
        "retrieval": evaluation.InformationRetrievalEvaluator(QUERIES, CORPUS, RELEVANT),
        "retrieval with prompts": evaluation.InformationRetrievalEvaluator(
            QUERIES, CORPUS, RELEVANT, query_prompt_name="query", corpus_prompt="the passage: ", corpus_chunk_size=3
        ),
        "binary": evaluation.BinaryClassificationEvaluator(FIRST, SECOND, LABELS),
        "triplet": evaluation.TripletEvaluator(*TRIPLES, similarity_fn_names=names),
        "mining": evaluation.ParaphraseMiningEvaluator(CORPUS, [("d1", "d6"), ("d5", "d8"), ("d2", "d4")]),
        "reranking": evaluation.RerankingEvaluator(SAMPLES),
        "reranking one by one": evaluation.RerankingEvaluator(SAMPLES, use_batched_encoding=False),
        "translation": evaluation.TranslationEvaluator(FIRST, SECOND, name="pairs"),
        "MSE": lambda model: evaluation.MSEEvaluator(FIRST, SECOND, teacher_model=model),
        "several": evaluation.SequentialEvaluator(
            [
                evaluation.TripletEvaluator(*TRIPLES, name="triplets"),
                evaluation.BinaryClassificationEvaluator(FIRST, SECOND, LABELS, name="pairs"),
            ]
        ),
    }


@pytest.mark.parametrize("name", dense_evaluators())
def test_evaluators_of_sentence_transformer(name, embedders):
    evaluator = dense_evaluators()[name]
    if name == "several":
        assert evaluator(embedders[0]) == pytest.approx(evaluator(embedders[1]), **TOLERANCE)
    else:
        tolerance = TOLERANCE_OF_INT8 if name == "similarity int8" else TOLERANCE
        assert_evaluated_alike(evaluator, *embedders, tolerance)


def test_mse_of_a_data_frame_needs_eval(embedders):
    from sentence_transformers.sentence_transformer.evaluation import MSEEvaluatorFromDataFrame

    frame = [{"en": a, "de": b} for a, b in zip(FIRST, SECOND, strict=True)]
    ours, theirs = (
        MSEEvaluatorFromDataFrame(frame, teacher_model=model, combinations=[("en", "de")])(model) for model in embedders
    )
    assert ours == pytest.approx(theirs, **TOLERANCE)


def cross_evaluators(num_labels):
    from sentence_transformers.cross_encoder import evaluation

    pairs = list(zip(FIRST, SECOND, strict=True))
    if num_labels > 1:
        labels = [0, 1, 2, 1, 0, 2, 1, 0]
        return [evaluation.CrossEncoderClassificationEvaluator(pairs, labels)]
    documents = [{"query": s["query"], "positive": s["positive"], "documents": list(CORPUS.values())} for s in SAMPLES]
    return [
        evaluation.CrossEncoderClassificationEvaluator(pairs, LABELS),
        evaluation.CrossEncoderCorrelationEvaluator(pairs, SCORES),
        evaluation.CrossEncoderRerankingEvaluator(SAMPLES),
        evaluation.CrossEncoderRerankingEvaluator(documents, name="given"),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_evaluators_of_cross_encoder(cross_encoders):
    ours, theirs = cross_encoders
    assert ours.num_labels == theirs.num_labels
    for evaluator in cross_evaluators(theirs.num_labels):
        assert_evaluated_alike(evaluator, ours, theirs)


def sparse_evaluators():
    from sentence_transformers.sparse_encoder import evaluation

    names = ["cosine", "dot", "euclidean", "manhattan"]
    return {
        "similarity": evaluation.SparseEmbeddingSimilarityEvaluator(FIRST, SECOND, SCORES),
        "similarity of 5": evaluation.SparseEmbeddingSimilarityEvaluator(
            FIRST, SECOND, SCORES, similarity_fn_names=names, max_active_dims=5
        ),
        "retrieval": evaluation.SparseInformationRetrievalEvaluator(QUERIES, CORPUS, RELEVANT, corpus_chunk_size=3),
        "binary": evaluation.SparseBinaryClassificationEvaluator(FIRST, SECOND, LABELS),
        "triplet": evaluation.SparseTripletEvaluator(*TRIPLES),
        "reranking": evaluation.SparseRerankingEvaluator(SAMPLES),
        "reranking one by one": evaluation.SparseRerankingEvaluator(SAMPLES, use_batched_encoding=False),
        "translation": evaluation.SparseTranslationEvaluator(FIRST, SECOND, name="pairs"),
        "MSE": lambda model: evaluation.SparseMSEEvaluator(FIRST, SECOND, teacher_model=model),
    }


@pytest.mark.parametrize("name", sparse_evaluators())
def test_evaluators_of_sparse_encoder(name, sparse_encoders):
    assert_evaluated_alike(sparse_evaluators()[name], *sparse_encoders)


def test_utilities_of_sentence_transformers_take_a_model(embedders, cross_encoders):
    from datasets import Dataset
    from sentence_transformers import util

    ours, theirs = embedders
    found, expected = (util.paraphrase_mining(model, FIRST) for model in embedders)
    assert [pair[1:] for pair in found] == [pair[1:] for pair in expected]
    hits = [util.semantic_search(m.encode_query(list(QUERIES.values())), m.encode(FIRST), top_k=3) for m in embedders]
    for found, expected in zip(*hits, strict=True):
        assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
    assert util.community_detection(ours.encode(FIRST), min_community_size=1) == util.community_detection(
        theirs.encode(FIRST), min_community_size=1
    )
    data = Dataset.from_dict({"query": [s["query"] for s in SAMPLES], "answer": [s["positive"][0] for s in SAMPLES]})
    rerankers = cross_encoders if cross_encoders[1].num_labels == 1 else (None, None)
    mined = [
        util.mine_hard_negatives(
            data, model, cross_encoder=reranker, corpus=FIRST, num_negatives=2, relative_margin=0.0, verbose=False
        ).to_list()
        for model, reranker in zip(embedders, rerankers, strict=True)
    ]
    assert mined[0] == mined[1] and mined[0]


@pytest.mark.parametrize("kind", ["embedders", "sparse_encoders"])
def test_attributes_are_those_of_sentence_transformers(kind, request):
    ours, theirs = request.getfixturevalue(kind)
    assert ours.similarity_fn_name == theirs.similarity_fn_name
    assert ours.max_seq_length == ours.get_max_seq_length() == theirs.max_seq_length
    assert ours.device == str(theirs.device)
    assert ours.truncate_dim == getattr(theirs, "truncate_dim", None)
    assert ours.default_prompt_name == theirs.default_prompt_name
    # sentence-transformers lists its two empty prompts of every model.
    assert {name: text for name, text in theirs.prompts.items() if text} == {k: v for k, v in ours.prompts.items() if v}
    assert ours.eval() is ours
    if kind == "embedders":
        assert ours.get_embedding_dimension() == ours.get_sentence_embedding_dimension()
        assert ours.get_embedding_dimension() == theirs.get_embedding_dimension() == ours.encode("a").shape[-1]
    else:
        assert ours.get_embedding_dimension() == ours.encode_sparse("a").size
    found, expected = (
        model.similarity(*[model.encode(texts, convert_to_tensor=True) for texts in (FIRST, SECOND)])
        for model in (ours, theirs)
    )
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_similarity_of_a_sparse_models_own_vectors(sparse_encoders):
    ours, theirs = sparse_encoders
    vectors = ours.encode_sparse(FIRST)
    expected = theirs.encode(FIRST)
    np.testing.assert_allclose(ours.similarity(vectors, vectors), theirs.similarity(expected, expected), rtol=1e-5)
    pairs = theirs.similarity_pairwise(expected, expected.to_dense().flip(0).to_sparse())
    np.testing.assert_allclose(ours.similarity_pairwise(vectors, vectors[::-1]), pairs, rtol=1e-5)
    assert ours.sparsity(vectors) == pytest.approx(theirs.sparsity(expected), abs=1e-2)


def test_encode_of_a_sparse_model_is_encode_sparse(sparse_encoders):
    torch = pytest.importorskip("torch")
    ours, theirs = sparse_encoders
    plain = ours.encode(FIRST, max_active_dims=7)
    assert [len(each) for each in plain] == [7] * len(FIRST)
    one = ours.encode(FIRST[0], convert_to_sparse_tensor=False)
    assert one.layout == torch.strided and one.shape == (ours.spec.vocab_size,)
    several = ours.encode(FIRST, convert_to_tensor=False, convert_to_sparse_tensor=True)
    assert isinstance(several, list) and all(each.is_sparse for each in several)
    torch.testing.assert_close(torch.stack(several).to_dense(), ours.encode(FIRST, convert_to_tensor=True).to_dense())
    for argument in (
        {"normalize_embeddings": True},
        {"truncate_dim": 8},
        {"precision": "int8"},
        {"output_value": None},
    ):
        with pytest.raises(InputError, match="made for sparse embeddings"):
            ours.encode(FIRST, **argument)
    with pytest.raises(InputError, match="pools of processes"):
        ours.encode(FIRST, pool={"processes": []})


def test_arguments_of_sparse_models_are_refused_by_others(embedders):
    for argument in ({"max_active_dims": 5}, {"convert_to_sparse_tensor": True}):
        with pytest.raises(InputError, match="sparse models"):
            embedders[0].encode("a", **argument)
    np.testing.assert_array_equal(embedders[0].encode("a", precision=None), embedders[0].encode("a"))
    with pytest.raises(InputError, match="pool"):
        embedders[0].encode("a", chunk_size=5)


@pytest.fixture
def model(word_checkpoints, load_on):
    with load_on("onnx", word_checkpoints["embed"]) as model:
        yield model


def test_the_similarity_function_can_be_set(model):
    from sentence_transformers import SimilarityFunction

    a, b = model.encode(FIRST), model.encode(SECOND)
    model.similarity_fn_name = "manhattan"
    np.testing.assert_allclose(model.similarity(a, b)[2, 3], -np.abs(a[2] - b[3]).sum(), rtol=1e-5)
    model.similarity_fn_name = SimilarityFunction.DOT_PRODUCT
    assert model.similarity_fn_name == "dot"
    np.testing.assert_allclose(model.similarity_pairwise(a, b), (a * b).sum(axis=1), rtol=1e-5)
    for again in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        with again:
            assert again.similarity_fn_name == "dot"
    model.similarity_fn_name = None
    assert model.similarity_fn_name == "cosine"
    with pytest.raises(InputError, match="cosine, dot, euclidean, manhattan"):
        model.similarity_fn_name = "maxsim"


def test_a_set_max_seq_length_cuts_as_sentence_transformer_does(model, embedders):
    theirs = embedders[1]
    long = "the old man and the river. " * 40
    with pytest.raises(InputError, match=f"{MAX_LENGTH}"):
        model.encode(long)
    before = theirs.max_seq_length
    try:
        for length in (MAX_LENGTH, 12):
            model.max_seq_length = theirs.max_seq_length = length
            assert model.max_seq_length == length
            np.testing.assert_allclose(model.encode([long, "a"]), theirs.encode([long, "a"]), atol=1e-5)
    finally:
        theirs.max_seq_length = before
    with pickle.loads(pickle.dumps(model)) as again:
        assert again.max_seq_length == 12
    np.testing.assert_array_equal(model.encode(long, max_length=20, truncation=True).shape, (32,))
    with pytest.raises(InputError, match="20"):
        model.encode(long, max_length=20)  # what a call says holds for the call
    model.max_seq_length = None
    with pytest.raises(InputError, match=f"{MAX_LENGTH}"):
        model.encode(long)
    with pytest.raises(InputError, match="max_seq_length"):
        model.max_seq_length = MAX_LENGTH + 1


def test_tokenizer_gives_what_transformers_gives(model, word_checkpoints):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(word_checkpoints["embed"])
    ours = model.tokenizer
    texts = ["Paris is the [MASK] of France.", "the man isn't old; readable unknownword 中国", "", "a " * 300]
    for options in (
        {},
        {"add_special_tokens": False},
        {"truncation": True, "max_length": 9},
        {"truncation": True, "max_length": 9, "add_special_tokens": False},
        {"truncation": True},
    ):
        for given in (texts, texts[0]):
            # transformers takes a limit of its own from the file, which the bundle's tokenizer has as well
            expected = theirs(given, **{"max_length": MAX_LENGTH, **options} if options.get("truncation") else options)
            assert ours(given, **options) == {name: expected[name] for name in ("input_ids", "attention_mask")}
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert ours.convert_tokens_to_ids(theirs.tokenize(text)) == theirs.convert_tokens_to_ids(theirs.tokenize(text))
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    for name in ("pad_token_id", "mask_token", "mask_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.model_max_length == MAX_LENGTH
    with pytest.raises(InputError, match="max_length"):
        ours("a", truncation=True, max_length=1)
    with pytest.raises(InputError, match="text"):
        ours(5)


def test_the_copy_of_the_tokenizer_changes_nothing_here(model):
    before = model.encode(FIRST)
    model.tokenizer.backend_tokenizer.enable_truncation(4)
    theirs = model.tokenizer.backend_tokenizer
    theirs.enable_padding(length=40)
    np.testing.assert_array_equal(model.encode(FIRST), before)
    assert theirs.encode("a").ids[:3] == model.tokenizer.encode("a")


def test_evaluations_are_kept_by_name_or_description(embedders):
    card = copy.copy(embedders[0].model_card_data)
    card.set_evaluation_metrics(SimpleNamespace(name="", description="Triplet"), {"accuracy": 1.0})
    card.set_evaluation_metrics(SimpleNamespace(name="mine"), {"accuracy": 0.5}, 1, 2)
    assert card.evaluations["Triplet"] == {"accuracy": 1.0} and card.evaluations["mine"] == {"accuracy": 0.5}
    assert card.base_model == str(embedders[0].path)
