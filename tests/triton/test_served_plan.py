"""Repositories of TensorRT plans on a real Triton: requests are joined up to the rows that the plan takes.

No GPU is needed: the model gte_plan gets a configuration for the CPU, in which the bundle's graph stands in for the
plan, which has the same inputs and outputs. The rest is as exported, and Triton is real.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest

from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile
from plan_bundles import make_plan_bundle
from triton_server import Server

pytestmark = pytest.mark.xdist_group("triton")

SHORT, LONG = Profile((1, 1), (8, 16), (32, 32)), Profile((1, 33), (2, 64), (4, 128))


@pytest.fixture(scope="module")
def serve_plan(
    triton: Path, bundle_of: Callable[..., Path], repository_of: Callable[..., Path], tmp_path_factory: Any
) -> Callable[..., Any]:
    """`serve_plan(checkpoint)`: a server of a plan with the profiles SHORT and LONG, for a `with` block."""

    def start(checkpoint: Path) -> Any:
        folder = make_plan_bundle(bundle_of(checkpoint), tmp_path_factory.mktemp("plan") / "bundle", (SHORT, LONG))
        path = repository_of(None, engine=folder)
        put_graph_for_plan(path / "gte_plan", folder / read_manifest(folder).graphs["onnxruntime"].path)
        return Server(path, folder=triton)

    return start


def put_graph_for_plan(model: Path, graph: Path) -> None:
    """Let ONNX Runtime's stand-in run the graph, on the CPU, when the server starts with --model-config-name=cpu."""
    text = (model / "config.pbtxt").read_text()
    for old, new in (
        ('backend: "tensorrt"', 'backend: "onnxruntime"'),
        ('"model.plan"', '"model.onnx"'),
        ("KIND_GPU", "KIND_CPU"),
        ('  profile: "0"\n  profile: "1"\n', ""),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (model / "configs").mkdir()
    (model / "configs" / "cpu.pbtxt").write_text(text)
    for file in graph.parent.iterdir():
        shutil.copy(file, model / "1")
    shutil.copy(graph, model / "1" / "model.onnx")  # the name that Triton opens, whatever the bundle calls the graph


@pytest.fixture
def load_graph(load_on: Callable[..., Any]) -> Callable[[Path], Any]:
    return lambda checkpoint: load_on("onnx", checkpoint, num_threads=1)


def executed(raw: Any, model: str) -> tuple[int, int]:
    """Rows or requests that a model answered, and its runs."""
    (statistics,) = raw.get_inference_statistics(model, as_json=True)["model_stats"]
    return int(statistics.get("inference_count", 0)), int(statistics.get("execution_count", 0))


def all_at_once(raw: Any, texts: list[str]) -> Any:
    """Embeddings of single texts, whose requests are sent without waiting for the answers."""
    import tritonclient.grpc

    answers: Queue[tuple[int, Any]] = Queue()
    requests = []
    for text in texts:
        tensor = tritonclient.grpc.InferInput("TEXT", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=object))
        requests.append(tensor)
    for number, tensor in enumerate(requests):
        raw.async_infer("gte_embed_fast", [tensor], lambda result, error, i=number: answers.put((i, error or result)))
    found = dict(answers.get(timeout=60) for _ in texts)
    return np.concatenate([found[i].as_numpy("EMBEDDING") for i in range(len(texts))])


def test_short_texts_are_joined_in_larger_batches_than_long_ones(
    serve_plan: Callable[..., Any],
    connect: Callable[..., Any],
    load_graph: Callable[[Path], Any],
    word_checkpoints: dict[str, Path],
):
    import tritonclient.grpc

    checkpoint = word_checkpoints["embed"]
    short = [f"the king {number} of france" for number in range(96)]
    long = [f"{number} " + "river " * 60 for number in range(24)]
    with (
        serve_plan(checkpoint) as server,
        load_graph(checkpoint) as local,
        tritonclient.grpc.InferenceServerClient(server.grpc) as raw,
        connect(server, "grpc") as client,
    ):

        def rows_in_a_run(texts: list[str]) -> float:
            before, runs_before = executed(raw, "gte_plan")
            embeddings = all_at_once(raw, texts)
            np.testing.assert_allclose(embeddings, local.encode(texts), rtol=0, atol=1e-5)
            after, runs = executed(raw, "gte_plan")
            assert after - before == runs - runs_before, "the plan takes one batch at a time"
            return len(texts) / (runs - runs_before)

        assert rows_in_a_run(short) > 4 >= rows_in_a_run(long) > 1
        # A request with more rows than a long run takes is cut.
        np.testing.assert_allclose(client.encode(long), local.encode(long), rtol=0, atol=1e-5)
        mixed = [*short[:5], *long[:5]]
        for ours, theirs in zip(
            client.encode(mixed, output_value="token_embeddings"),
            local.encode(mixed, output_value="token_embeddings"),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_fill_mask_requests_are_joined(
    serve_plan: Callable[..., Any],
    connect: Callable[..., Any],
    load_graph: Callable[[Path], Any],
    word_checkpoints: dict[str, Path],
):
    import tritonclient.grpc

    checkpoint = word_checkpoints["fill-mask"]
    texts = ["the [MASK] of france", "[MASK] and [MASK] and [MASK]", "river " * 60 + "[MASK]"] * 16
    with (
        serve_plan(checkpoint) as server,
        load_graph(checkpoint) as local,
        tritonclient.grpc.InferenceServerClient(server.grpc) as raw,
        connect(server, "grpc") as client,
        ThreadPoolExecutor(48) as pool,
    ):
        _, before = executed(raw, "gte_plan")
        answers = list(pool.map(client.fill_mask, texts))
        _, after = executed(raw, "gte_plan")
        assert after - before <= len(texts) / 2
        for ours, theirs in zip(answers, map(local.fill_mask, texts), strict=True):
            flat, expected = ([each] if isinstance(each[0], dict) else each for each in (ours, theirs))
            assert [[item["token"] for item in best] for best in flat] == [
                [item["token"] for item in best] for best in expected
            ]
        with pytest.raises(InputError, match="input 1 has 129 tokens"):
            client.fill_mask([texts[0], "river " * 126 + "[MASK]"])
        np.testing.assert_allclose(client.encode(texts[:3]), local.encode(texts[:3]), rtol=0, atol=1e-5)
