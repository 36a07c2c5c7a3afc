"""The shipped model, and one of base size, on a real Triton: the answers of the runtime, and the rest of a
server's life: bad input, many callers, overload, metrics, broken repositories.

The ONNX Runtime backend is a stand-in (see tests/support/triton_server.py); the rest is Triton's own.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gte_deploy
from gte_deploy.core.errors import BackendError, InputError, UnavailableError
from gte_deploy.exporters.export import export
from gte_deploy.exporters.verification import parity
from gte_deploy.exporters.verification.cases import Case
from gte_deploy.models import builtin_path
from gte_deploy.models.checkpoint import copy_tokenizer, save_model
from gte_deploy.models.config import build_config
from gte_deploy.models.families.gte import GTE
from triton_server import Server, ServerError

pytestmark = pytest.mark.xdist_group("triton")

TEXTS = [
    "A text.",
    "",
    " ",
    "Zażółć gęślą jaźń: привет, 你好世界, مرحبا 👩‍👩‍👧 e\u0301 \u202e\ufffd",
    "one\x00two\nthree\tfour [SEP] [MASK] [PAD]",
    "a considerably longer text, " * 40,
    "The president of the united [MASK] of America.",
]
MASKED = [
    "The president of the united [MASK] of America.",
    "[MASK]",
    "The [MASK] sat on the [MASK], and żółw 你好 [MASK].",
    "a long text " * 50 + "[MASK]",
]


@pytest.fixture(scope="module", params=["tiny", pytest.param("base", marks=pytest.mark.slow)])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("served")
    if request.param == "tiny":
        checkpoint = builtin_path()
    else:
        import torch

        torch.manual_seed(0)
        checkpoint = folder / "checkpoint"
        save_model(GTE.model_class("fill-mask")(build_config("gte-en-mlm-base")), checkpoint, layout="native")
        copy_tokenizer(builtin_path(), checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        # The export's own proof, up to 8,192 tokens, is tested elsewhere; here the answers are compared.
        patch.setattr(parity, "parity_cases", lambda *_, **__: [Case(17, batch=2, ragged=True)])
        yield export(checkpoint, folder / "bundle").path


@pytest.fixture(scope="module")
def repository(repository_of: Callable[..., Path], bundle: Path) -> Path:
    return repository_of(bundle)


@pytest.fixture(scope="module")
def local(bundle: Path) -> Iterator[gte_deploy.Model]:
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(triton: Path, repository: Path) -> Iterator[Any]:
    with Server(repository, folder=triton) as server:
        yield server


_CLIENTS = (
    "http",
    "grpc, token ids",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpc", "http, token ids")),
)


@pytest.fixture(scope="module", params=_CLIENTS)
def client(request: pytest.FixtureRequest, server: Any, connect: Callable[..., Any], bundle: Path) -> Iterator[Any]:
    """A client for each protocol, which sends texts, or token ids by the bundle's tokenizer."""
    protocol, _, ids = request.param.partition(", ")
    with connect(server, protocol, timeout_s=600, tokenizer=bundle if ids else None) as client:
        yield client


@pytest.fixture
def raw(server: Any) -> Iterator[Any]:
    """tritonclient's own, to send what ours would not."""
    import tritonclient.grpc

    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        yield client


def assert_same_answers(ours: Any, theirs: Any) -> None:
    """Fill-mask answers of any nesting: the same but for 1e-5 of a score."""
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for each, other in zip(ours, theirs, strict=True):
            assert_same_answers(each, other)
        return
    assert {**ours, "score": 0} == {**theirs, "score": 0}
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_embeddings": True}, {"truncate_dim": 64, "normalize_embeddings": True}, {"pooling": "cls"}]
    + [{"prompt": "prompt: "}, {"truncation": True, "max_length": 16}, {"precision": "ubinary"}],
    ids=str,
)
def test_encode(client: Any, local: gte_deploy.Model, options: dict[str, Any]):
    ours, theirs = client.encode(TEXTS, **options), local.encode(TEXTS, **options)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(client.encode(TEXTS[3], **options), theirs[3], rtol=0, atol=1e-5)


def test_token_embeddings(client: Any, local: gte_deploy.Model):
    for ours, theirs in zip(
        client.encode(TEXTS, output_value="token_embeddings"),
        local.encode(TEXTS, output_value="token_embeddings"),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    if client.tokenizer is not None:
        rule = gte_deploy.TokenChunks(5, 1)
        for ours, theirs in zip(*(model.encode(TEXTS, chunks=rule) for model in (client, local)), strict=True):
            assert ours.offsets.tolist() == theirs.offsets.tolist()
            np.testing.assert_allclose(ours.embeddings, theirs.embeddings, rtol=0, atol=1e-5)
    ours, theirs = (model.encode(TEXTS[3], output_value=None) for model in (client, local))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("inputs", [MASKED[0], MASKED, MASKED[2:3]], ids=["one", "several", "list of one"])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"targets": ["states", "kingdom", "żółw"], "top_k": 2}], ids=str)
def test_fill_mask(client: Any, local: gte_deploy.Model, inputs: Any, options: dict[str, Any]):
    assert_same_answers(client.fill_mask(inputs, **options), local.fill_mask(inputs, **options))


def test_8192_tokens(client: Any, local: gte_deploy.Model):
    text = "the " * 8189 + "[MASK]"  # with [CLS] and [SEP] 8,192
    assert local.tokenize(text)["input_ids"].shape == (1, 8192)
    with pytest.raises(InputError, match="input 1 has 8,193 tokens, special tokens included; the limit is 8,192"):
        client.encode(["short", "the " + text, "also short"])
    if client.info()["url"].startswith("http"):
        assert_same_answers(client.fill_mask(text), local.fill_mask(text))
    else:
        np.testing.assert_allclose(client.encode(text), local.encode(text), rtol=0, atol=1e-5)


def test_texts_that_cannot_be_answered_are_named(client: Any):
    texts = ["The [MASK]."] * 20
    with pytest.raises(InputError, match=r"^input 13 has no mask; write \[MASK\] where a word is to be predicted$"):
        client.fill_mask([*texts[:13], "none here", *texts])
    with pytest.raises(InputError, match=r"^input 20 lost its \[MASK\] by truncation"):
        client.fill_mask([*texts, "a " * 30 + "[MASK]"], truncation=True, max_length=16)
    with pytest.raises(InputError, match="max_length"):
        client.encode("a", max_length=8193)
    assert client.fill_mask(texts[0], top_k=1)[0]["token_str"]


def requests_answered(raw: Any, model: str) -> int:
    return int(raw.get_inference_statistics(model, as_json=True)["model_stats"][0].get("inference_count", 0))


def test_token_ids_pass_the_tokenizer_by(server: Any, connect: Callable[..., Any], raw: Any, bundle: Path):
    before = requests_answered(raw, "gte_tokenizer"), requests_answered(raw, "gte_embed_output")
    with connect(server, "grpc", tokenizer=bundle) as client:
        client.encode(TEXTS, normalize_embeddings=True)
        client.fill_mask(MASKED)
    assert (requests_answered(raw, "gte_tokenizer"), requests_answered(raw, "gte_embed_output")) == before
    with connect(server, "grpc") as client:
        client.encode(TEXTS, normalize_embeddings=True)
    assert requests_answered(raw, "gte_tokenizer") > before[0]
    assert requests_answered(raw, "gte_embed_output") == before[1], "the encoder finishes embeddings itself"


def test_wrong_token_ids_fail_alone(raw: Any, local: gte_deploy.Model):
    """Wrong ids, positions and masks in one batch with good requests: the good ones are answered as ever."""
    import tritonclient.grpc

    ids = local.tokenize("The president of the united states.")["input_ids"]
    expected = local.encode("The president of the united states.")
    vocab_size = local.spec.vocab_size

    def tensors(given: Any, position: int = 0) -> list[Any]:
        arrays = {"INPUT_IDS": given, "ATTENTION_MASK": np.ones_like(given), "MASK_POSITIONS": np.array([[position]])}
        made = [tritonclient.grpc.InferInput(name, list(array.shape), "INT64") for name, array in arrays.items()]
        for tensor, array in zip(made, arrays.values(), strict=True):
            tensor.set_data_from_numpy(array)
        return made

    wrong = [ids + vocab_size, -ids, np.where(ids == ids[0, 2], np.iinfo(np.int64).max, ids)]
    calls = [(ids, 0), *((each, 0) for each in wrong), (ids, 10**6), (ids, -5), (ids, 0)] * 3
    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(lambda call: raw.infer("gte_embed_ids", tensors(*call)), calls))
    for (given, _), result in zip(calls, results, strict=True):
        embedding = result.as_numpy("EMBEDDING")[0]
        if given is ids:
            np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)
        else:
            assert np.isnan(embedding).all()
    with pytest.raises(tritonclient.utils.InferenceServerException, match="token ids outside the vocabulary"):
        raw.infer("gte_fill_mask_ids", tensors(wrong[0]))
    with pytest.raises(tritonclient.utils.InferenceServerException, match="input 0 has 0 masks"):
        raw.infer("gte_fill_mask_ids", tensors(ids))


def infer(raw: Any, name: str, array: Any, datatype: str, model: str = "gte_embed") -> Any:
    import tritonclient.grpc

    tensor = tritonclient.grpc.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return raw.infer(model, [tensor])


@pytest.mark.parametrize(
    ("name", "array", "datatype", "message"),
    [
        ("TEXT", np.array([b"a"], dtype=object), "BYTES", "shape"),
        ("TEXT", np.array([[b"a", b"b"]], dtype=object), "BYTES", "shape"),
        ("TEXT", np.array([[b"a"]] * 100, dtype=object), "BYTES", "batch"),
        ("TEXT", np.array([[1]], dtype=np.int32), "INT32", "data-type"),
        ("TEXTS", np.array([[b"a"]], dtype=object), "BYTES", "input"),
        ("TEXT", np.array([[b"\xff\xfe"]], dtype=object), "BYTES", "UTF-8|utf-8"),
    ],
    ids=["rank", "columns", "batch", "dtype", "name", "bytes"],
)
def test_wrong_tensors_are_refused(raw: Any, name: str, array: Any, datatype: str, message: str):
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=message) as caught:
        infer(raw, name, array, datatype)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert infer(raw, "TEXT", np.array([[b"a"]], dtype=object), "BYTES").as_numpy("EMBEDDING").shape[0] == 1


def executed_batches(raw: Any) -> dict[int, int]:
    """How often the encoder ran with each number of rows."""
    statistics = raw.get_inference_statistics("gte_encoder", as_json=True)["model_stats"][0]
    return {int(each["batch_size"]): int(each["compute_infer"]["count"]) for each in statistics["batch_stats"]}


def test_requests_of_several_callers_run_as_one_batch(
    server: Any, connect: Callable[..., Any], raw: Any, local: gte_deploy.Model
):
    texts = [f"text number {number} of several callers" for number in range(64)]
    before = executed_batches(raw)
    with connect(server, "grpc") as client, ThreadPoolExecutor(32) as pool:
        embeddings = np.stack(list(pool.map(client.encode, texts)))
    np.testing.assert_allclose(embeddings, local.encode(texts), rtol=0, atol=1e-5)
    ran = {size: count - before.get(size, 0) for size, count in executed_batches(raw).items()}
    assert sum(size * count for size, count in ran.items()) == len(texts)
    assert sum(ran.values()) <= len(texts) / 2, ran
    assert max(size for size, count in ran.items() if count) >= 4, ran


def test_metrics(server: Any, connect: Callable[..., Any]):
    def successes(model: str) -> float:
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
            text = response.read().decode()
        return float(re.search(rf'^nv_inference_request_success{{model="{model}",[^}}]*}} (\S+)', text, re.M)[1])

    before = successes("gte_embed_fast"), successes("gte_encoder")
    with connect(server, "http") as client:
        client.encode("one more")
    for _ in range(100):  # they follow the answer by a moment
        after = successes("gte_embed_fast"), successes("gte_encoder")
        if after == (before[0] + 1, before[1] + 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"{before} became {after}")


@pytest.mark.parametrize(
    ("bound", "reason"),
    [({"max_queue_size": 2}, "maximum queue size"), ({"queue_timeout_s": 0.05}, "timeout expired")],
    ids=["size", "time"],
)
def test_overload_is_answered(
    triton: Path,
    repository_of: Callable[..., Path],
    bundle: Path,
    connect: Callable[..., Any],
    local: gte_deploy.Model,
    bound: dict[str, Any],
    reason: str,
):
    small = repository_of(bundle, max_batch_size=2, **bound)
    texts = [f"{number} " + "the queue is short " * 50 for number in range(30)]
    expected = local.encode(texts)

    def outcome(client: Any, text: str) -> Any:
        try:
            return client.encode(text)
        except UnavailableError as error:
            return str(error)

    with Server(small, folder=triton) as server:
        for protocol in ("http", "grpc"):
            with connect(server, protocol, connections=30) as client:
                with ThreadPoolExecutor(30) as pool:
                    outcomes = list(pool.map(partial(outcome, client), texts))
                refused = [each for each in outcomes if isinstance(each, str)]
                answered = [number for number, each in enumerate(outcomes) if not isinstance(each, str)]
                assert refused and answered
                assert all(reason in each for each in refused), set(refused)
                np.testing.assert_allclose([outcomes[i] for i in answered], expected[answered], rtol=0, atol=1e-5)
                np.testing.assert_allclose(client.encode(texts[0]), expected[0], rtol=0, atol=1e-5)  # it lives on


def edited_encoder(repository: Path, target: Path, pattern: str, replacement: str) -> Path:
    """A repository of the encoder alone, with another configuration for the CPU."""
    shutil.copytree(repository / "gte_encoder", target / "gte_encoder", copy_function=os.link)
    config = target / "gte_encoder" / "configs" / "cpu.pbtxt"
    text, count = re.subn(pattern, replacement, config.read_text())
    assert count, f"nothing to edit in {config}"
    config.unlink()  # it is a link to the original
    config.write_text(text)
    return target


@pytest.mark.parametrize(
    ("pattern", "replacement", "reason"),
    [
        ('name: "attention_mask"', 'name: "attention_masks"', "gte_encoder.*attention_masks: the graph has only"),
        ("TYPE_INT64", "TYPE_INT32", "config.pbtxt has TYPE_INT32, the graph tensor"),
        (r"max_batch_size: \d+", "max_batch_size: few", "Expected integer, got: few"),
        (r'default_model_filename: ".*?"', 'default_model_filename: "gone.onnx"', "unable to find .*gone.onnx"),
    ],
    ids=["name", "dtype", "syntax", "file"],
)
def test_a_broken_repository_is_refused_with_its_reason(
    triton: Path, repository: Path, tmp_path: Path, pattern: str, replacement: str, reason: str
):
    broken = edited_encoder(repository, tmp_path / "broken", pattern, replacement)
    with pytest.raises(ServerError, match=reason):
        Server(broken, folder=triton).close()


def test_a_server_of_something_else_and_one_that_is_gone(
    triton: Path, repository: Path, tmp_path: Path, connect: Callable[..., Any]
):
    shutil.copytree(repository / "gte_encoder", tmp_path / "gte_encoder", copy_function=os.link)
    with Server(tmp_path, folder=triton) as server:
        for protocol in ("http", "grpc"):
            with pytest.raises(BackendError, match="gte_embed"):
                connect(server, protocol)
    for protocol in ("http", "grpc"):
        with pytest.raises(UnavailableError):
            connect(server, protocol)


def raw_masks(text: str, top_k: int) -> list[Any]:
    import tritonclient.grpc

    kinds = {"TEXT": "BYTES", "TOP_K": "INT32"}
    inputs = [tritonclient.grpc.InferInput(name, [1, 1], kind) for name, kind in kinds.items()]
    inputs[0].set_data_from_numpy(np.array([[text.encode()]], dtype=object))
    inputs[1].set_data_from_numpy(np.array([[top_k]], dtype=np.int32))
    return inputs


@pytest.mark.parametrize("bundle", ["tiny"], indirect=True)  # the time is that of the answers, not of the encoder
def test_many_masks_and_answers_keep_nobody_waiting(raw: Any, server: Any, connect: Callable[..., Any]):
    """A request of 2 kB that would get 91,566 long answers is refused; one within the limits takes seconds at most."""
    from tritonclient.utils import InferenceServerException

    words = "the " * 500
    with connect(server, "http") as client:
        expected = client.fill_mask("The [MASK] sat.")
        started = time.monotonic()
        with pytest.raises(InferenceServerException, match="with 3 masks and top_k 30,522 would get 91,566 answers"):
            raw.infer("gte_fill_mask", raw_masks(words + "[MASK] [MASK] [MASK]", 30_522))
        assert client.fill_mask("The [MASK] sat.") == expected
        assert time.monotonic() - started < 5  # 36 s and 0.4 GB when each answer decoded its whole text
        # As many answers as one text may get.
        whole = raw.infer("gte_fill_mask", raw_masks(words + "[MASK]", 30_000)).as_numpy("SEQUENCE")
        assert whole.shape == (1, 1, 30_000) and len(set(whole.ravel())) > 29_000
        assert client.fill_mask("The [MASK] sat.") == expected
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("bundle", ["tiny"], indirect=True)
def test_gaps_without_end_keep_nobody_waiting(server: Any, connect: Callable[..., Any]):
    """Four megabytes of spaces have no token, so all of them would be read to find the ones that stay."""
    with connect(server, "http") as client:
        expected = client.encode("The cat sat.")
        started = time.monotonic()
        for _ in range(3):
            with pytest.raises(InputError, match="of which at most 1,048,576 are read to find its first 8,190 tokens"):
                client.encode(" " * (4 << 20), truncation=True)
        np.testing.assert_array_equal(client.encode("The cat sat."), expected)
        assert time.monotonic() - started < 8  # it took 1.7 s for each of them, on an idle machine
        # Long texts of words are cut as ever, and a list of them goes in several requests.
        long = ["the cat sat " * 100_000 + str(number) for number in range(5)]
        assert client.encode(long, truncation=True, max_length=16).shape == (5, 256)
