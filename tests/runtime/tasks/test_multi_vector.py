"""encode_multi_vector and maxsim: against sentence-transformers' MultiVectorEncoder and its MaxSim."""

import pickle
import string

import numpy as np
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_stanford_projection, add_tokens
from family_checkpoints import make_family_checkpoint
from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_finite
from gte_deploy.backends.torch import TorchBackend
from gte_deploy.models.checkpoint import load_described
from gte_deploy.models.description import describe
from gte_deploy.tasks.multi_vector import maxsim
from runtime_models import make_word_checkpoint

QUERIES = ["the king, and the queen?", "a"]
DOCUMENTS = [
    "Paris is the capital of France.",
    "the old man (and the sea) walked!",
    "water",
    "the king isn't old. " * 9,
]
WIDTH, SIZE = 16, 32
TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def projection():
    return np.random.default_rng(0).normal(size=(WIDTH, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def judge(word_checkpoints, projection):
    """The same checkpoint as a MultiVectorEncoder, with that projection and without punctuation in documents."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")
    torch = pytest.importorskip("torch")
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    dense = Dense(SIZE, WIDTH, bias=False, activation_function=torch.nn.Identity(), **names)
    dense.linear.weight = torch.nn.Parameter(torch.from_numpy(projection))
    modules = [
        Transformer(str(word_checkpoints["embed"])),
        dense,
        Normalize(module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=list(string.punctuation)),
    ]
    prompts = {"query": "the query: ", "document": "the passage: "}
    return sentence_transformers.MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")


@pytest.fixture(scope="module")
def model(word_checkpoints):
    with gte_deploy.load(word_checkpoints["embed"], backend="torch") as opened:
        yield opened


def test_as_the_multi_vector_encoder(model, judge, projection):
    queries = model.encode_multi_vector(QUERIES, "query", projection=projection, batch_size=1)
    options = {"projection": projection, "skip_words": list(string.punctuation)}
    documents = model.encode_multi_vector(DOCUMENTS, prompt="the passage: ", **options)
    for found, expected in ((queries, judge.encode_query(QUERIES)), (documents, judge.encode_document(DOCUMENTS))):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)
    wanted = judge.similarity(judge.encode_query(QUERIES), judge.encode_document(DOCUMENTS))
    np.testing.assert_allclose(maxsim(queries, documents), wanted.numpy(), rtol=0, atol=1e-4)


def test_one_text_and_the_options(model, projection):
    torch = pytest.importorskip("torch")
    text = "the king, and the queen?"
    states = model.encode(text, output_value="token_embeddings")
    np.testing.assert_array_equal(model.encode_multi_vector(text, normalize_embeddings=False), states)
    found = model.encode_multi_vector(text)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert len(found) == len(states) and len(model.encode_multi_vector(text, skip_words=[",", "?", "nowhere"])) + 2 == (
        len(states)
    )
    by_tensor = model.encode_multi_vector(text, projection=torch.from_numpy(projection))
    np.testing.assert_array_equal(by_tensor, model.encode_multi_vector(text, projection=projection))
    assert len(model.encode_multi_vector(text, truncation=True, max_length=4)) == 4
    with pytest.raises(gte_deploy.InputError, match=r"projection must be a matrix \[D, 32\]"):
        model.encode_multi_vector(text, projection=projection.T)
    with pytest.raises(gte_deploy.InputError, match="has no option pooling; it has batch_size"):
        model.encode_multi_vector(text, pooling="cls")


def test_maxsim_of_ragged_lists_and_what_is_refused():
    torch = pytest.importorskip("torch")
    pytest.importorskip("sentence_transformers", minversion="6.2")  # older ones have no MaxSim to compare with
    from sentence_transformers.util import similarity

    random = np.random.default_rng(1)
    queries, documents = (
        [random.normal(size=(tokens, 4)).astype(np.float32) for tokens in lengths] for lengths in ((3, 1), (5, 2, 9))
    )
    wanted = similarity.maxsim(*([torch.from_numpy(each) for each in side] for side in (queries, documents)))
    np.testing.assert_allclose(maxsim(queries, documents), wanted.numpy(), rtol=0, atol=1e-5)
    assert maxsim(queries, [np.zeros((0, 4), np.float32)]).tolist() == [[0.0], [0.0]]
    with pytest.raises(gte_deploy.InputError, match="the widths 3, 4"):
        maxsim(queries, [np.zeros((2, 3), np.float32)])
    with pytest.raises(gte_deploy.InputError, match="two lists of arrays"):
        maxsim(queries[0], documents)


LIBRARY = "sentence-transformers"
EXPANDED = {"query_expansion": {"strategy": "fixed", "length": 12}}
AT_LEAST = {"query_length": 20, "query_expansion": {"strategy": "min", "length": 9, "attend": True, "token": "king"}}
BOTH = {"skiplist_words": ["the", ",", "."], "skiplist_tasks": ["query", "document"]}
PYLATE = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 24}
FOLDERS = {
    "pylate": {"config": PYLATE},
    "pylate, two projections": {"config": PYLATE, "widths": (16, 4)},
    "pylate, attention to all tokens": {"config": {**PYLATE, "attend_to_expansion_tokens": True}},
    "pylate, queries as they are": {"config": {**PYLATE, "do_query_expansion": False, "skiplist_words": ["the"]}},
    "pylate, prompts": {"config": {**PYLATE, "prompts": {"query": "find ", "document": "page "}}},
    "native": {"library": LIBRARY, "mask": {}, "config": {"prompts": {"query": "the query: ", "document": ""}}},
    "native, fixed": {"library": LIBRARY, "mask": BOTH, "transformer": EXPANDED},
    "native, at least": {"library": LIBRARY, "mask": {}, "transformer": {**AT_LEAST, "document_length": 10}},
    "native, no lengths": {"library": LIBRARY, "mask": {"skiplist_words": ["paris"]}, "normalize": False},
    "native, mean": {"library": LIBRARY, "mask": {}, "config": {"similarity_fn_name": "meanmaxsim"}},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of(name)`: a checkpoint with the settings of FOLDERS, or "stanford"."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("late") / "model"
            if name == "stanford":
                made[name] = add_stanford_projection(
                    make_family_checkpoint(folder, "bert", "embed"),
                    **{"query_maxlen": 12, "doc_maxlen": 20, "query_token_id": "old", "doc_token_id": "river"},
                )
            else:
                add_tokens(make_word_checkpoint(folder, task="embed", seed=4), ["[Q] ", "[D] "])
                made[name] = add_multi_vector_modules(folder, **FOLDERS[name])
        return made[name]

    return make


def library_of(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")
    return sentence_transformers.MultiVectorEncoder(str(folder), device="cpu")


@pytest.mark.parametrize("name", [*FOLDERS, "stanford"])
def test_a_published_folder_as_the_library_reads_it(name, folder_of):
    folder = folder_of(name)
    library = library_of(folder)
    with gte_deploy.load(folder, backend="torch") as model:
        assert model.spec.task == "multi-vector"
        assert model.get_embedding_dimension() == library.get_embedding_dimension()
        found, wanted = [], []
        for method in ("encode_query", "encode_document"):
            found.append(getattr(model, method)([*QUERIES, *DOCUMENTS], truncation=True))
            wanted.append(getattr(library, method)([*QUERIES, *DOCUMENTS]))
            assert [each.shape for each in found[-1]] == [tuple(each.shape) for each in wanted[-1]]
            for ours, theirs in zip(found[-1], wanted[-1], strict=True):
                assert ours.dtype == np.float32
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)
        assert model.similarity_fn_name == library.similarity_fn_name
        scores = library.similarity(*wanted).numpy()
        np.testing.assert_allclose(model.similarity(*found), scores, rtol=0, atol=2e-4)
        pairs = library.similarity_pairwise(*wanted).numpy()
        np.testing.assert_allclose(model.similarity_pairwise(*found), pairs, rtol=0, atol=2e-4)
        query, documents = QUERIES[0], [*QUERIES, *DOCUMENTS]
        ranked = model.rank(query, documents, top_k=3, return_documents=True, truncation=True)
        best = np.argsort(-scores[0], kind="stable")[:3]
        assert [entry["corpus_id"] for entry in ranked] == best.tolist()
        np.testing.assert_allclose([entry["score"] for entry in ranked], scores[0][best], atol=2e-4)
        assert ranked[0]["text"] == documents[best[0]]


@pytest.mark.parametrize("name", ["pylate", "native, at least"])
def test_every_engine_gives_the_same(name, folder_of, backend, load_on):
    folder = folder_of(name)
    near, same = (3e-2, 2e-2) if "bf16" in backend or backend == "tensorrt" else (1e-4, 1e-5)
    texts = [*QUERIES, *DOCUMENTS]
    with gte_deploy.load(folder, backend="torch") as model:
        wanted = [model.encode_query(texts, truncation=True), model.encode_document(texts, truncation=True)]
    with load_on(backend, folder) as model:
        assert model.spec == describe(folder).spec
        found = [model.encode_query(texts, truncation=True), model.encode_document(texts, truncation=True)]
        for ours, theirs in zip((each for side in found for each in side), (e for s in wanted for e in s), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=near)
        # A text in a batch of other lengths gets what it gets alone.
        for index, text in enumerate(texts):
            np.testing.assert_allclose(model.encode_query(text, truncation=True), found[0][index], rtol=0, atol=same)
        info = model.info()["multi_vector"]
        assert info["query_length"] == model.spec.multi_vector.query_length and info["expansion"]["length"] > 0
        model.warm_up(lengths=[4], rows=[1])


def test_lengths_and_options(folder_of):
    folder = folder_of("pylate")
    with gte_deploy.load(folder, backend="torch") as model:
        long = DOCUMENTS[-1]
        for method, limit in (("encode_query", 12), ("encode_document", 24)):
            with pytest.raises(gte_deploy.InputError, match=f"the limit is {limit}"):
                getattr(model, method)(long)
        # As PyLate's query_length and document_length.
        assert len(model.encode_query("the king", max_length=20)) == 20
        assert len(model.encode_query("the king", max_length=6)) == 6
        assert len(model.encode_document(long, truncation=True, max_length=8, skip_words=())) == 8
        assert len(model.encode_document("the king", skip_words=["king"])) == len(model.encode_document("the king")) - 1
        model.max_seq_length = 8
        assert (len(model.encode_query(long)), len(model.encode_document(long, skip_words=()))) == (12, 8)
        model.max_seq_length = 2
        with pytest.raises(gte_deploy.InputError, match="max_seq_length must be an integer from 4 to 24, not 2"):
            model.encode_document(long)
        model.max_seq_length = None
        copied = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(copied.encode_query("the king"), model.encode_query("the king"))
        raw = model.encode_query("the king", normalize_embeddings=False)
        assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
        np.testing.assert_array_equal(
            model.encode_query(["the king"], None, None, 8, False)[0], model.encode_query("the king")
        )
        for call, message in (
            (lambda: model.encode("a"), "use encode_query, encode_document, or"),
            (lambda: model.encode_multi_vector("a"), "pass is_query=True or is_query=False"),
            (lambda: model.encode_query("a", projection=np.ones((2, 32))), "no projection"),
            (lambda: model.encode_query("a", max_length=25), "max_length must be an integer from 4 to 24"),
            (lambda: model.encode_query("a", None, None, 8, False, 3), "pass other options by their names"),
            (lambda: model.rank("a", ["b"], activation_fn=abs), "activation_fn is for rerankers"),
            (lambda: setattr(model, "similarity_fn_name", "cosine"), "maxsim"),
        ):
            with pytest.raises(gte_deploy.InputError, match=message):
                call()
    with gte_deploy.load(folder_of("native, at least"), backend="torch") as model:
        assert len(model.encode_query(long, truncation=True)) == 20 and len(model.encode_query("a")) == 9
        with pytest.raises(gte_deploy.InputError, match="max_length must be an integer from 9 to"):
            model.encode_query("a", max_length=8)


def test_a_model_for_embeddings_has_no_sides(model):
    with pytest.raises(gte_deploy.InputError, match="is_query is for multi-vector models"):
        model.encode_multi_vector("a", is_query=True)


def test_tokens_without_attention_are_never_removed(folder_of):
    described = describe(folder_of("pylate"))
    with pytest.raises(gte_deploy.ConfigError, match="to which no token attends"):
        TorchBackend(load_described(described), described.spec, packed=True)
    attended = describe(folder_of("pylate, attention to all tokens"))
    assert TorchBackend(load_described(attended), attended.spec, packed=True)._is_packed


def test_numbers_that_are_not_finite_at_tokens_without_attention_are_found():
    batch = Batch(np.ones((1, 3), np.int64), np.array([[1, 1, 0]]))
    values = {"token_vectors": np.array([[[1.0], [1.0], [np.nan]]], np.float32)}
    check_finite(values, batch, [0])
    with pytest.raises(gte_deploy.NonFiniteError, match="token_vectors for the inputs 5"):
        check_finite(values, batch, [5], np.ones((1, 3), np.bool_))
