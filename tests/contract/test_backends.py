"""What every backend promises: one suite, run on each."""

import dataclasses
import threading

import numpy as np
import pytest

import gte_deploy
from gte_deploy.backends.base import Batch
from gte_deploy.text.batching import collate
from runtime_models import HALVES, ROW_TOLERANCE, ROW_TOLERANCE_OF_HALVES
from runtime_models import TEXTS as MASKED_TEXTS

GOLDEN_TOLERANCE, GOLDEN_LONG_TOLERANCE = 1e-4, 5e-4  # see tests/golden/README.md
# Of the largest value. Random weights make more of bfloat16's rounding than trained ones, for which parity is strict.
GOLDEN_BF16_SHARE = 0.1

TEXTS = ["the king of france", "a", "", "walking and playing in the old city " * 3, "中国 water!", "the queen is not"]


def batch_of(rows, length=None, *, positions=None):
    batch = collate([list(row) for row in rows], pad_token_id=0)
    if length is None:
        return dataclasses.replace(batch, mask_positions=positions)
    pad = ((0, 0), (0, length - batch.input_ids.shape[1]))
    return Batch(np.pad(batch.input_ids, pad), np.pad(batch.attention_mask, pad), positions)


@pytest.fixture
def same(repeat_tolerance):
    """`same(found, expected)`: of a batch that came again."""

    def check(found, expected):
        np.testing.assert_allclose(found, expected, rtol=0, atol=repeat_tolerance)

    return check


@pytest.fixture
def engines(models):
    return {task: model._backend for task, model in models.items()}


ROWS = [[2, 20, 21, 4, 22, 3], [2, 4, 3], [2, 30, 31, 32, 4, 33, 34, 4, 3]]
POSITIONS = np.array([[0, 3], [1, 1], [2, 4], [2, 7]])


def test_it_says_what_it_is(models, backend):
    for task, model in models.items():
        info = model.info()
        assert info["backend"] == model.backend == backend.split()[0]
        assert info["precision"] == {"tensorrt": "fp16"}.get(backend, "bf16" if "bf16" in backend else "fp32")
        assert info["backend_reason"] == "it was asked for"
        device = "cuda" if backend == "tensorrt" or "cuda" in backend else "cpu"
        assert (info["task"], info["device"], info["num_threads"]) == (task, device, 1)
        assert (info["max_length"], info["vocab_size"], info["hidden_size"]) == (128, 128, 32)


def test_shapes_and_dtypes(engines):
    expected = {"fill-mask": (4, 128), "classify": (3, 1)}
    for task, shape in expected.items():
        logits = engines[task].run(batch_of(ROWS, positions=POSITIONS), ["logits"])["logits"]
        assert logits.shape == shape and logits.dtype == np.float32
    outputs = engines["embed"].run(batch_of(ROWS), ["sentence_embedding", "last_hidden_state"])
    assert {name: (value.shape, value.dtype) for name, value in outputs.items()} == {
        "sentence_embedding": ((3, 32), np.float32),
        "last_hidden_state": ((3, 9, 32), np.float32),
    }


def test_only_what_is_asked_for(engines):
    for task, engine in engines.items():
        for name in engine.outputs:
            assert list(engine.run(batch_of(ROWS, positions=POSITIONS), [name])) == [name], task
        with pytest.raises(gte_deploy.BackendError, match="no output 'nope'; it offers"):
            engine.run(batch_of(ROWS), ["nope"])


def test_the_graphs_pooling_is_that_of_its_hidden_states(engines):
    outputs = engines["embed"].run(batch_of(ROWS), ["sentence_embedding", "last_hidden_state"])
    np.testing.assert_allclose(outputs["sentence_embedding"], outputs["last_hidden_state"][:, 0], atol=1e-6)


def test_a_row_in_a_batch_is_the_row_alone(engines, row_tolerance):
    names = {"fill-mask": "logits", "embed": "sentence_embedding", "classify": "logits"}
    for task, engine in engines.items():
        name = names[task]
        positions = np.array([[0, 3], [1, 1], [2, 4]])
        together = engine.run(batch_of(ROWS, positions=positions), [name])[name]
        for index, row in enumerate(ROWS):
            alone = engine.run(batch_of([row], positions=np.array([[0, positions[index, 1]]])), [name])[name]
            np.testing.assert_allclose(together[index], alone[0], atol=row_tolerance, err_msg=task)


def test_padding_changes_nothing(engines, row_tolerance):
    for task, engine in engines.items():
        plain = engine.run(batch_of(ROWS), ["last_hidden_state"])["last_hidden_state"]
        padded = engine.run(batch_of(ROWS, 40), ["last_hidden_state"])["last_hidden_state"]
        for index, row in enumerate(ROWS):
            np.testing.assert_allclose(
                plain[index, : len(row)], padded[index, : len(row)], atol=row_tolerance, err_msg=task
            )


def test_what_stands_in_padding_changes_nothing(engines, row_tolerance):
    batch = batch_of(ROWS, 16)
    other = dataclasses.replace(batch, input_ids=np.where(batch.attention_mask == 1, batch.input_ids, 77))
    for engine in engines.values():
        one = engine.run(batch, ["last_hidden_state"])["last_hidden_state"]
        two = engine.run(other, ["last_hidden_state"])["last_hidden_state"]
        mask = batch.attention_mask == 1
        np.testing.assert_allclose(one[mask], two[mask], atol=row_tolerance)


def test_no_mask_gives_no_logits(engines):
    logits = engines["fill-mask"].run(batch_of(ROWS, positions=np.empty((0, 2), np.int64)), ["logits"])["logits"]
    assert logits.shape == (0, 128)


def test_every_length_up_to_the_limit(engines):
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 31, 32, 33, 127, 128):
        batch = batch_of([rng.integers(5, 80, length).tolist()])
        hidden = engines["embed"].run(batch, ["last_hidden_state"])["last_hidden_state"]
        assert hidden.shape == (1, length, 32) and np.isfinite(hidden).all()


GOOD = batch_of(ROWS, positions=POSITIONS)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": changed(GOOD.input_ids, (1, 1), -1)}, r"input_ids\[1, 1\] is -1"),
        ({"input_ids": changed(GOOD.input_ids, (2, 8), 128)}, r"input_ids\[2, 8\] is 128; the ids .* 0 to 127"),
        ({"input_ids": GOOD.input_ids.astype(np.int32)}, "input_ids must be int64 of rank 2; it is int32"),
        ({"input_ids": GOOD.input_ids[0]}, "rank 2; it is int64 of rank 1"),
        ({"input_ids": GOOD.input_ids.tolist()}, "input_ids must be a numpy array, not list"),
        ({"input_ids": GOOD.input_ids[:, :-1]}, "must be equal"),
        ({"attention_mask": changed(GOOD.attention_mask, 1, 0)}, r"attention_mask\[1\] is all zero"),
        ({"attention_mask": changed(GOOD.attention_mask, (0, 1), 2)}, r"attention_mask\[0, 1\] is 2"),
        ({"attention_mask": GOOD.attention_mask.astype(bool)}, "attention_mask must be int64"),
        ({"mask_positions": changed(POSITIONS, (3, 0), 3)}, r"mask_positions\[3\] is \[3, 7\], outside"),
        ({"mask_positions": changed(POSITIONS, (3, 1), -1)}, r"mask_positions\[3\] is \[2, -1\], outside"),
        ({"mask_positions": changed(POSITIONS, (1, 1), 8)}, r"mask_positions\[1\] is \[1, 8\], which is padding"),
        ({"mask_positions": POSITIONS[:, :1]}, "mask_positions must have the shape"),
        ({"token_type_ids": np.zeros_like(GOOD.input_ids)}, "this model has no token types"),
        ({"mask_positions": POSITIONS.astype(float)}, "mask_positions must be int64"),
        ({"input_ids": np.zeros((0, 4), np.int64), "attention_mask": np.zeros((0, 4), np.int64)}, "at least one row"),
        ({"input_ids": np.ones((1, 129), np.int64), "attention_mask": np.ones((1, 129), np.int64)}, "1 to 128"),
    ],
)
def test_a_bad_batch_is_refused_and_the_next_good_one_unchanged(engines, fields, message, same):
    engine = engines["fill-mask"]
    before = engine.run(GOOD, ["logits"])["logits"]
    with pytest.raises(gte_deploy.InputError, match=message):
        engine.run(dataclasses.replace(GOOD, **fields), ["logits"])
    same(engine.run(GOOD, ["logits"])["logits"], before)


def assert_golden(found, expected, backend, atol=GOLDEN_TOLERANCE):
    atol = GOLDEN_BF16_SHARE * np.abs(expected).max() if "bf16" in backend or backend in HALVES else atol
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["mlm", "embed_ntk", "rerank"])
def test_golden_results(backend, load_on, golden_dir, name):
    if backend == "tensorrt":
        pytest.skip(
            "TensorRT has no fused attention for heads of 8; tests/runtime/test_on_gpus.py has the built-in model"
        )
    expected = np.load(golden_dir / name / "expected.npz")
    with load_on(backend, golden_dir / name, max_length=2000) as model:  # 8,192 would only slow the export
        engine = model._backend
        positions = expected["mask_positions"] if name == "mlm" else None
        batch = Batch(expected["input_ids"], expected["attention_mask"], positions)
        hidden = engine.run(batch, ["last_hidden_state"])["last_hidden_state"]
        mask = expected["attention_mask"] == 1
        assert_golden(hidden[mask], expected["hidden"][mask], backend)
        logits = {"mlm": "mask_logits", "rerank": "scores"}.get(name)
        if logits is not None:
            assert_golden(engine.run(batch, ["logits"])["logits"], expected[logits], backend)
        ids = expected["long_input_ids"]
        long = engine.run(Batch(ids, np.ones_like(ids), None), ["last_hidden_state"])["last_hidden_state"]
        assert_golden(long[:, -8:], expected["long_hidden_tail"], backend, GOLDEN_LONG_TOLERANCE)


def test_closed(backend, load_on, word_checkpoints):
    with load_on(backend, word_checkpoints["embed"]) as model:
        model.encode("a")
    model.close()
    with pytest.raises(gte_deploy.BackendError, match="closed"):
        model.encode("a")


def test_closing_while_others_run_breaks_none_of_them(backend, load_on, word_checkpoints, row_tolerance):
    model = load_on(backend, word_checkpoints["embed"], num_threads=1)
    expected = model.encode(TEXTS)
    problems = []

    def work():
        try:
            for _ in range(50):
                np.testing.assert_allclose(model.encode(TEXTS), expected, atol=row_tolerance)
        except gte_deploy.BackendError as error:
            if "closed" not in str(error):
                problems.append(error)
        except AssertionError as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    model.close()
    for thread in threads:
        thread.join()
    assert problems == []


class TestModel:
    """The object above a backend, on each of them."""

    def test_order_is_kept_whatever_the_batches(self, models, row_tolerance):
        model = models["embed"]
        expected = np.stack([model.encode(text) for text in TEXTS])
        for options in (
            {},
            {"batch_size": 1},
            {"batch_size": 2},
            {"max_batch_tokens": 1},
            {"max_batch_tokens": 10_000},
        ):
            np.testing.assert_allclose(model.encode(TEXTS, **options), expected, atol=row_tolerance)
            reverse = model.encode(TEXTS[::-1], **options)
            np.testing.assert_allclose(reverse, expected[::-1], atol=row_tolerance)

    def test_a_list_tokenised_in_parts_answers_the_same(self, models, monkeypatch, row_tolerance):
        masked = list(MASKED_TEXTS) * 3
        pairs = [("the king", text) for text in TEXTS * 3]
        expected = models["embed"].encode(TEXTS * 3), models["classify"].predict(pairs)
        tokens = [[c["token"] for c in np.ravel(answer)] for answer in models["fill-mask"].fill_mask(masked)]
        monkeypatch.setattr("gte_deploy.text.batching.WINDOW", 4)
        np.testing.assert_allclose(models["embed"].encode(TEXTS * 3), expected[0], atol=row_tolerance)
        np.testing.assert_allclose(models["classify"].predict(pairs), expected[1], atol=row_tolerance)
        assert [[c["token"] for c in np.ravel(a)] for a in models["fill-mask"].fill_mask(masked)] == tokens

    def test_an_input_that_is_refused_costs_no_run(self, models, monkeypatch):
        """Tokenising goes on beside the model, and yet finds first what it refuses, with the caller's index."""
        monkeypatch.setattr("gte_deploy.text.batching.WINDOW", 4)

        def run(batch, outputs):
            raise AssertionError("the model ran")

        for task, call, wrong, message in (
            ("embed", "encode", "the " * 127, "input 17 has 129 tokens"),
            ("fill-mask", "fill_mask", "the king is old", "input 17 has no mask"),
            ("fill-mask", "fill_mask", "[MASK] " * 127, "input 17 has 129 tokens"),
            ("classify", "predict", "the " * 127, "input 17 has 129 tokens"),
        ):
            inputs = ["the [MASK] is old and good"] * 20
            inputs[17] = wrong
            monkeypatch.setattr(models[task]._backend, "run", run)
            with pytest.raises(gte_deploy.InputError, match=message):
                getattr(models[task], call)([[text] for text in inputs] if call == "predict" else inputs)

    def test_fill_mask_of_a_list_is_that_of_each_text(self, models, row_tolerance):
        model, texts = models["fill-mask"], list(MASKED_TEXTS)
        top_k = 1 if row_tolerance == ROW_TOLERANCE_OF_HALVES else 3  # rounding may swap neighbours
        together = model.fill_mask(texts, top_k=top_k)
        for text, answer in zip(texts, together, strict=True):
            alone = model.fill_mask(text, top_k=top_k)
            flat = [c for masks in (alone if isinstance(alone[0], list) else [alone]) for c in masks]
            also = [c for masks in (answer if isinstance(answer[0], list) else [answer]) for c in masks]
            for one, other in zip(flat, also, strict=True):
                assert {**one, "score": 0} == {**other, "score": 0}
                assert one["score"] == pytest.approx(other["score"], abs=row_tolerance)

    def test_poolings(self, models, row_tolerance):
        for model in (models["embed"], models["fill-mask"]):
            tokens = model.encode(TEXTS, output_value="token_embeddings")
            for pooling, expected in (("cls", [t[0] for t in tokens]), ("mean", [t.mean(axis=0) for t in tokens])):
                np.testing.assert_allclose(model.encode(TEXTS, pooling=pooling), expected, atol=row_tolerance)

    def test_tokenize_is_what_is_run(self, models, row_tolerance):
        features = models["embed"].tokenize(TEXTS)
        assert {name: array.dtype for name, array in features.items()} == {
            "input_ids": np.int64,
            "attention_mask": np.int64,
        }
        outputs = models["embed"]._backend.run(Batch(**features), ["sentence_embedding"])["sentence_embedding"]
        np.testing.assert_allclose(models["embed"].encode(TEXTS), outputs, atol=row_tolerance)

    def test_rank(self, models):
        documents = [text for text in TEXTS if text]
        ranking = models["classify"].rank("the king", documents, return_documents=True)
        scores = models["classify"].predict([["the king", text] for text in documents])
        assert [entry["corpus_id"] for entry in ranking] == np.argsort(-scores, kind="stable").tolist()
        assert [entry["text"] for entry in ranking] == [documents[entry["corpus_id"]] for entry in ranking]


@pytest.mark.parametrize("other", ["onnx", "openvino"])
def test_backends_agree(load_on, word_checkpoints, other):
    """The same texts give the same answers on all of them."""
    for task, checkpoint in word_checkpoints.items():
        torch, engine = (load_on(name, checkpoint) for name in ("torch", other))
        if task == "fill-mask":
            one, two = (model.fill_mask("the [MASK] is old", top_k=20) for model in (torch, engine))
            assert [a["token"] for a in one] == [a["token"] for a in two]
        elif task == "embed":
            np.testing.assert_allclose(torch.encode(TEXTS), engine.encode(TEXTS), atol=1e-4)
        else:
            pairs = [("the king", text) for text in TEXTS]
            np.testing.assert_allclose(torch.predict(pairs), engine.predict(pairs), atol=1e-4)


def test_arrays_of_any_layout(engines, same):
    """Views and read-only arrays are answered as their copies are, and are left as they were."""
    batch = batch_of(ROWS, positions=POSITIONS)
    ids = np.repeat(batch.input_ids, 2, axis=1)[:, ::2]
    mask = np.asfortranarray(batch.attention_mask)
    for array in (ids, mask):
        array.flags.writeable = False
    engine = engines["fill-mask"]
    for name in engine.outputs:
        found = engine.run(Batch(ids, mask, POSITIONS[::-1][::-1]), [name])[name]
        same(found, engine.run(batch, [name])[name])
    np.testing.assert_array_equal(ids, batch.input_ids)


def test_results_are_the_callers_own(engines, same):
    engine = engines["fill-mask"]
    first = engine.run(GOOD, ["logits", "last_hidden_state"])
    kept = {name: value.copy() for name, value in first.items()}
    engine.run(dataclasses.replace(GOOD, input_ids=GOOD.input_ids[:, ::-1].copy()), ["logits", "last_hidden_state"])
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])
        value[:] = 7
    for name, value in engine.run(GOOD, ["logits", "last_hidden_state"]).items():
        same(value, kept[name])


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_the_classical_graph_answers_the_same(bundle_of, load_on, word_checkpoints, engine):
    """`logits all` computes every token's logits; what is taken of them, and the embeddings, are those of the masks."""
    checkpoint = word_checkpoints["fill-mask"]
    texts = list(MASKED_TEXTS)
    classical = bundle_of(checkpoint, logits="all")
    with load_on(engine, checkpoint) as masked, gte_deploy.load(classical, backend=engine) as model:
        assert model.spec.logits == "all"
        logits = model._backend.run(batch_of(ROWS), ["logits"])["logits"]
        assert logits.shape == (3, 9, 128)
        expected = masked._backend.run(batch_of(ROWS, positions=POSITIONS), ["logits"])["logits"]
        np.testing.assert_allclose(logits[POSITIONS[:, 0], POSITIONS[:, 1]], expected, atol=1e-4)
        got = [answer["token"] for answer in model.fill_mask(texts[0], top_k=20)]
        assert got == [answer["token"] for answer in masked.fill_mask(texts[0], top_k=20)]
        np.testing.assert_allclose(model.encode(TEXTS), masked.encode(TEXTS), atol=ROW_TOLERANCE)


@pytest.mark.gpu
def test_torch_on_cuda_agrees_with_the_cpu(word_checkpoints):
    for task, checkpoint in word_checkpoints.items():
        with gte_deploy.load(checkpoint) as cpu, gte_deploy.load(checkpoint, device="cuda:0") as cuda:
            assert cuda.device == "cuda:0"
            for name in cpu._backend.outputs:
                batch = batch_of(ROWS, positions=POSITIONS)
                one, two = (model._backend.run(batch, [name])[name] for model in (cpu, cuda))
                mask = batch.attention_mask == 1 if name == "last_hidden_state" else ...
                np.testing.assert_allclose(one[mask], two[mask], atol=1e-4, err_msg=f"{task} {name}")
