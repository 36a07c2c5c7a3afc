"""Model.classify_tokens against transformers' token-classification pipeline on the same checkpoint."""

import numpy as np
import pytest

import gte_deploy
from factories import write_labels, write_xlmr_tokenizer
from gte_deploy import InputError
from runtime_models import MAX_LENGTH, make_word_checkpoint

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
STRATEGIES = ("none", "simple", "first", "average", "max")
UNIGRAM = (
    *("\u2581", "\u2581the", "\u2581king", "\u2581queen", "\u2581paris", "\u2581france", "\u2581walk", "ing", "ed"),
    *("\u2581old", "er", "\u2581city", "\u2581of", "\u2581a", "\u2581and", "n't", "é", "ö", "中", "国", "\u2581c"),
    *".,!?()'-\"abcdefghijklmnopqrstuvwxyzABCP123",
)
TEXTS = (
    "Paris is the capital of France.",
    "the king walked (readable) to the older city, and he isn't old!",
    "naïve café: 中国 has a CITY, ÉÉ walking 🙂 the queen of straße 2.1",
    "unknownword xyz",
    "  the   king\t\n walks ",
    "[SEP] the [MASK] <s> a",
    "",
    "the",
)


def make_tagger(folder, *, unigram=False, **options):
    """A classifier of tokens whose labels are in use, each of them."""
    make_word_checkpoint(folder, task="token-classify", num_labels=len(LABELS), seed=7, **options)
    write_labels(folder, LABELS)
    if unigram:
        write_xlmr_tokenizer(folder, UNIGRAM, max_length=MAX_LENGTH)
    return folder


@pytest.fixture(scope="module", params=["wordpiece", "unigram"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger") / request.param
    return make_tagger(folder, unigram=request.param == "unigram")


@pytest.fixture(scope="module")
def pipe(checkpoint):
    from transformers import pipeline

    pipe = pipeline("token-classification", model=str(checkpoint), device="cpu")
    pipe.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return pipe


@pytest.fixture(scope="module")
def model(checkpoint):
    with gte_deploy.load(checkpoint, backend="torch", num_threads=1) as model:
        yield model


def assert_same_entities(ours, theirs, tolerance=1e-5):
    """The same texts, each with the same entities: keys in their order, and values."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert [list(entity) for entity in our] == [list(entity) for entity in their]
        for entity, expected in zip(our, their, strict=True):
            assert type(entity["score"]) is float
            assert entity["score"] == pytest.approx(float(expected["score"]), abs=tolerance)
            assert {**entity, "score": 0} == {**expected, "score": 0}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ignored", [("O",), (), ("B-PER", "I-PER", "PER"), ("MISC", "LOC", "O")])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_strategies(strategy, ignored, model, pipe):
    expected = pipe(list(TEXTS), aggregation_strategy=strategy, ignore_labels=list(ignored))
    got = model.classify_tokens(list(TEXTS), aggregation_strategy=strategy, ignore_labels=ignored)
    assert sum(map(len, got)) > 10
    assert_same_entities(got, expected)


def test_the_labels_are_all_in_use(model):
    seen = {
        entity["entity"] for entities in model.classify_tokens(list(TEXTS), ignore_labels=()) for entity in entities
    }
    assert seen == set(LABELS)


def test_forms(model, pipe):
    for inputs in (TEXTS[0], [TEXTS[0]], list(TEXTS[:2])):
        expected, got = pipe(inputs), model.classify_tokens(inputs)
        assert isinstance(got[0], dict) == isinstance(expected[0], dict)
        if isinstance(inputs, str):
            expected, got = [expected], [got]
        assert_same_entities(got, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("delimiter", [" ", "", "--"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_words(strategy, delimiter, model, pipe):
    words = [["the", "king", "walked", "isn't", "Café"], ["paris", "", "中国", "of france"]]
    options = {"aggregation_strategy": strategy, "is_split_into_words": True, "delimiter": delimiter}
    for inputs in (words, words[:1], words[0]):
        assert_same_entities(model.classify_tokens(inputs, **options), pipe(inputs, **options))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("stride", [0, 3, 20])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_windows_of_long_texts(strategy, stride, model, pipe, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer, "model_max_length", 32)
    texts = ["the king walked to the older city, and he isn't old! " * 7, "paris", "中国 " * 90]
    # One text at a time: the pipeline pads the windows of a text alone.
    expected = [pipe(text, aggregation_strategy=strategy, stride=stride) for text in texts]
    got = model.classify_tokens(texts, aggregation_strategy=strategy, stride=stride, max_length=32, batch_size=2)
    assert_same_entities(got, expected)


@pytest.mark.parametrize("times", [40, 4000])
def test_truncation(times, model, pipe):
    text = "the king walked, isn't old 中国 " * times
    with pytest.raises(InputError, match=r"input 1 has.*limit is 128"):
        model.classify_tokens(["a", text])
    got = model.classify_tokens(["a", text], truncation=True)
    assert_same_entities(got, pipe(["a", text]))


def test_places_of_the_caller(model, pipe):
    (length,) = {len(row) for row in model.tokenize(TEXTS[0])["input_ids"]}
    places = [(i, i + 2) for i in range(length)]
    assert_same_entities(
        [model.classify_tokens(TEXTS[0], offset_mapping=places, ignore_labels=())],
        [pipe(TEXTS[0], offset_mapping=places, ignore_labels=[])],
    )
    for wrong in ([], [(0, 1)], "no", [[(0, 1)], [(0, 1)]], [(0, 1, 2)] * length, [(-1, 0)] * length):
        with pytest.raises(InputError, match="offset_mapping"):
            model.classify_tokens(TEXTS[0], offset_mapping=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation_strategy": "best"}, "aggregation_strategy is 'best'; expected one of none, simple, first"),
        ({"stride": 3}, "stride joins what windows"),
        ({"stride": 126, "aggregation_strategy": "simple"}, "stride must be an integer from 0 to 125"),
        ({"stride": True, "aggregation_strategy": "simple"}, "stride must be an integer"),
        ({"ignore_labels": [3]}, "ignore_labels must be names"),
        ({"is_split_into_words": True}, "a list of its words"),
        ({"max_length": 129}, "max_length must be an integer from 3 to 128"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_wrong_arguments(options, message, model):
    with pytest.raises(InputError, match=message):
        model.classify_tokens("the king", **options)


@pytest.mark.parametrize("inputs", [[], [["a"]], [1], None, b"a", ["a", None]])
@pytest.mark.parametrize("words", [False, True])
def test_wrong_inputs(inputs, words, model):
    if words and inputs == [["a"]]:
        return
    with pytest.raises(InputError, match="inputs"):
        model.classify_tokens(inputs, is_split_into_words=words)


def test_enumerations_of_transformers(model):
    from transformers.pipelines.token_classification import AggregationStrategy

    expected = model.classify_tokens(TEXTS[1], aggregation_strategy="simple")
    assert model.classify_tokens(TEXTS[1], aggregation_strategy=AggregationStrategy.SIMPLE) == expected
    assert model.classify_tokens(TEXTS[1], aggregation_strategy=None) == model.classify_tokens(TEXTS[1])


def test_every_backend_answers_alike(backend, load_on, tmp_path):
    checkpoint = make_tagger(tmp_path / "c")
    with gte_deploy.load(checkpoint, backend="torch", num_threads=1) as torch_model:
        expected = torch_model.classify_tokens(list(TEXTS), ignore_labels=())
        logits = torch_model.predict(list(TEXTS))
    tolerance = 0.05 if "bf16" in backend or backend == "tensorrt" else 1e-4
    with load_on(backend, checkpoint, num_threads=1) as model:
        got = model.classify_tokens(list(TEXTS), ignore_labels=())
        if tolerance < 0.01:
            assert_same_entities(got, expected, tolerance)
        for ours, theirs in zip(model.predict(list(TEXTS)), logits, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=20 * tolerance)


def test_predict_gives_the_logits_of_tokens(model, checkpoint):
    import torch
    from transformers import AutoModelForTokenClassification

    theirs = AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    got = model.predict(list(TEXTS))
    for text, logits in zip(TEXTS, got, strict=True):
        ids = torch.from_numpy(model.tokenize(text)["input_ids"])
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 1:-1].numpy()
        assert logits.dtype == np.float32 and logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(model.predict(text), expected, atol=1e-4)
    best = [LABELS[int(row.argmax())] for row in got[0]]
    assert best == [entity["entity"] for entity in model.classify_tokens(TEXTS[0], ignore_labels=())]
    softmax = torch.softmax(torch.from_numpy(got[1]), -1)
    np.testing.assert_allclose(model.predict(TEXTS[1], apply_softmax=True), softmax, atol=1e-5)
    np.testing.assert_allclose(model.predict(TEXTS[1], activation_fn=torch.nn.Softmax(-1)), softmax, atol=1e-5)
    tensors = model.predict(list(TEXTS[:2]), convert_to_tensor=True)
    assert all(isinstance(each, torch.Tensor) for each in tensors)
    with pytest.raises(InputError, match="this needs a classify or multi-vector model"):
        model.rank("a", ["b"])


def test_other_tasks_are_refused(word_checkpoints):
    with gte_deploy.load(word_checkpoints["classify"], backend="torch") as model:
        with pytest.raises(InputError, match="this needs a token-classify model"):
            model.classify_tokens("a")
