"""Streams: which engine gets a batch, order and errors, and that answers and memory stay those of one engine."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gte_deploy
from gte_deploy import cli
from gte_deploy.backends import picks
from gte_deploy.backends.base import Batch
from gte_deploy.backends.stream_plan import ListPick, StreamPlan
from gte_deploy.backends.streams import StreamedBackend, _Turns
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.lanes import in_lanes
from waiting import WAIT_S, wait_until

pytest.importorskip("onnxruntime")


class Engine:
    """Counts who is inside; `gate` holds a batch until it is set."""

    name, device, num_threads, precision, outputs = "onnx", "cpu", 2, "fp32", ("sentence_embedding",)

    def __init__(self, *, gate=None, fails=()):
        self.gate, self.fails, self.lock = gate, fails, threading.Lock()
        self.seen, self.inside, self.most, self.is_closed = [], 0, 0, False

    def run(self, batch, outputs):
        if self.is_closed:
            raise BackendError("this model is closed; load it again")
        with self.lock:
            self.seen.append(batch.input_ids.size)
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            if self.gate is not None:
                assert self.gate.wait(WAIT_S)
            time.sleep(0.002)
            if batch.input_ids.size in self.fails:
                raise BackendError(f"{batch.input_ids.size} broke")
            return {"sentence_embedding": batch.input_ids.sum(axis=1, keepdims=True).astype(np.float32)}
        finally:
            with self.lock:
                self.inside -= 1

    def close(self):
        self.is_closed = True


def batch_of(tokens):
    ids = np.ones((1, tokens), np.int64)
    return Batch(ids, ids)


def joined(whole, streams, *, count=2, packed=True, least=16):
    opened = []

    def open_streams():
        opened.append(streams)
        return streams

    plan = StreamPlan(count, 1, least, 2, packed, "a test")
    return StreamedBackend(whole, plan, open_streams), opened


def run(backend, tokens):
    return backend.run(batch_of(tokens), ["sentence_embedding"])["sentence_embedding"].item()


def in_list(backend, sizes, lanes=2):
    return list(in_lanes(lambda tokens: run(backend, tokens), sizes, lanes))


def test_single_batches_keep_all_threads_and_never_open_the_streams():
    whole, streams = Engine(), Engine()
    backend, opened = joined(whole, streams)
    assert [run(backend, tokens) for tokens in (3, 40)] == [3, 40]
    assert in_list(backend, [5]) == [5]
    assert whole.seen == [3, 40, 5] and opened == []


def test_a_list_goes_to_the_streams_which_open_once():
    whole, streams = Engine(), Engine()
    backend, opened = joined(whole, streams, count=3)
    assert in_list(backend, range(20, 50), lanes=3) == list(range(20, 50))
    assert whole.seen == [] and sorted(streams.seen) == list(range(20, 50)) and len(opened) == 1
    assert 1 < streams.most <= 3


def test_batches_that_are_too_small_for_weights_that_are_not_packed_run_one_at_a_time():
    whole, streams = Engine(), Engine()
    backend, _ = joined(whole, streams, packed=False, least=16)
    sizes = [40, 16, 15, 3, 2, 1] * 3
    assert in_list(backend, sizes) == sizes
    assert set(streams.seen) == {40, 16} and set(whole.seen) == {15, 3, 2, 1} and whole.most == 1


def test_callers_at_the_same_time_share_the_streams_and_no_more_get_in():
    gate = threading.Event()
    whole, streams = Engine(gate=gate), Engine(gate=gate)
    backend, _ = joined(whole, streams)
    with ThreadPoolExecutor(8) as callers:
        first = callers.submit(run, backend, 7)
        wait_until(lambda: whole.inside == 1)
        others = [callers.submit(run, backend, tokens) for tokens in range(20, 27)]
        wait_until(lambda: streams.inside == 2 and backend._running == 8)
        gate.set()
        assert first.result(WAIT_S) == 7 and [other.result(WAIT_S) for other in others] == list(range(20, 27))
    assert streams.most == 2 and whole.seen == [7]
    assert run(backend, 9) == 9 and whole.seen == [7, 9], "alone again"


def test_an_error_of_one_batch_ends_its_list_and_nothing_else():
    backend, _ = joined(Engine(), Engine(fails=(33,)))
    with pytest.raises(BackendError, match="33 broke"):
        in_list(backend, [40, 41, 33, 42, 43])
    assert in_list(backend, [40, 41, 42]) == [40, 41, 42]
    assert run(backend, 33) == 33 and backend._running == 0


def test_streams_that_do_not_open_are_an_error_of_the_list_and_are_tried_again():
    whole, streams, tries = Engine(), Engine(), []

    def open_streams():
        tries.append(1)
        if len(tries) == 1:
            raise BackendError("no memory")
        return streams

    backend = StreamedBackend(whole, StreamPlan(1, 1, 1, 2, True, ""), open_streams)
    with pytest.raises(BackendError, match="no memory"):
        in_list(backend, [20, 21], lanes=2)
    assert run(backend, 5) == 5
    assert in_list(backend, [20, 21]) == [20, 21] and whole.seen == [5]


def test_close_while_lists_run():
    gate = threading.Event()
    whole, streams = Engine(), Engine(gate=gate)
    backend, _ = joined(whole, streams)
    with ThreadPoolExecutor(1) as callers:
        answers = callers.submit(in_list, backend, range(20, 40))
        wait_until(lambda: streams.inside == 2)
        backend.close()
        gate.set()
        with pytest.raises(BackendError, match="closed"):
            answers.result(WAIT_S)
    backend.close()
    assert whole.is_closed and streams.is_closed
    for call in (lambda: run(backend, 4), lambda: in_list(backend, [20, 21])):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_warm_up_reaches_both_engines():
    whole, streams = Engine(), Engine()
    backend, _ = joined(whole, streams, packed=False)
    backend.warm_up([batch_of(20), batch_of(4)], ["sentence_embedding"])
    assert set(whole.seen) == {20, 4} and streams.seen == [20, 20]
    assert (32, 512) in backend.shapes_to_warm_up() and (1, 16) in backend.shapes_to_warm_up()


def test_turns_come_in_the_order_of_arrival_even_if_the_first_comes_back_at_once():
    turns, order, arrived = _Turns(1), [], []

    def visit(name):
        arrived.append(name)
        with turns.one():
            order.append(name)

    with ThreadPoolExecutor(4) as threads:
        with turns.one():
            for name in "abc":
                threads.submit(visit, name)
                wait_until(lambda: len(turns._waiting) == len(arrived) > "abc".index(name))  # noqa: B023 - at once
        visit("again")
    assert order == ["a", "b", "c", "again"]


def test_an_interrupted_wait_loses_no_turn():
    for given in (False, True):
        turns = _Turns(1)

        class Interrupted:
            def __init__(self, turns=turns, given=given):
                self.turns, self.given = turns, given

            def acquire(self):
                if self.turns._waiting:
                    if self.given:
                        self.turns._waiting.clear()  # the turn came at the same moment
                    raise KeyboardInterrupt

            def release(self):
                raise AssertionError("nobody waits")

        with turns.one(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("gte_deploy.backends.streams.threading.Lock", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                turns._enter()
            assert not turns._waiting and turns._free == int(given)


# --- real engines ---------------------------------------------------------------------------------------------------

WORDS = "paris france capital city river house water light king queen world time year day man woman old new big".split()
TEXTS = [" ".join(random.Random(number).choices(WORDS, k=3 + number * 7 % 60)) for number in range(60)]
CALLS = {
    "embed": lambda model, texts: model.encode(texts),
    "classify": lambda model, texts: model.predict([(text, "the old king") for text in texts]),
    "fill-mask": lambda model, texts: [
        [candidate["score"] for candidate in answer]
        for answer in model.fill_mask([f"the [MASK] {text}" for text in texts], top_k=3)
    ],
}


@pytest.fixture(params=["onnx", "openvino"])
def engine(request):
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return request.param


@pytest.mark.parametrize("task", CALLS)
def test_answers_are_those_of_one_stream_and_of_torch(word_checkpoints, load_on, engine, task):
    call, checkpoint = CALLS[task], word_checkpoints[task]
    with load_on("torch", checkpoint, num_threads=1) as judge, load_on(engine, checkpoint, streams=1) as one:
        expected, single = np.array(call(judge, TEXTS)), np.array(call(one, TEXTS))
    near = 1e-6 * np.abs(single).max()
    with load_on(engine, checkpoint, num_threads=3, streams=3, max_batch_tokens=256) as model:
        np.testing.assert_allclose(call(model, TEXTS), expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(call(model, TEXTS), single, rtol=0, atol=near)
        backend = model._backend
        assert isinstance(backend, StreamedBackend) and backend._streams is not None
        order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
        with ThreadPoolExecutor(4) as callers:
            futures = [callers.submit(call, model, [TEXTS[i] for i in order[start:]]) for start in (0, 5, 20, 58)]
            for start, future in zip((0, 5, 20, 58), futures, strict=True):
                np.testing.assert_allclose(future.result(60), single[order[start:]], rtol=0, atol=near)
        assert backend._running == 0


def test_one_thread_has_no_streams_and_a_list_is_cut_for_several(word_checkpoints, load_on):
    with load_on("onnx", word_checkpoints["embed"], num_threads=1) as model:
        assert not isinstance(model._backend, StreamedBackend)
        assert model.info()["lists"] == {"streams": 1, "threads": 1}
    with load_on("onnx", word_checkpoints["embed"], num_threads=4) as model:
        plan = model.info()["lists"]
        assert (plan["streams"], plan["threads"], plan["packed"]) == (4, 1, True)
        shapes, whole = [], model._backend._whole.run
        model._backend._whole.run = lambda batch, names: (shapes.append(batch.input_ids.shape), whole(batch, names))[1]
        model.encode("a text")
        words = ["old", "king", "sea", "man", "the"]
        pairs = [f"{one} {other}" for one in words for other in words[:4]]
        model.encode(pairs)  # 80 tokens: too few for several batches
        assert shapes == [(1, 4), (20, 4)] and model._backend._streams is None
        model.encode(TEXTS)
        assert len(shapes) == 2 and model._backend._streams is not None


def test_pickled_models_keep_their_streams(word_checkpoints, load_on):
    with load_on("onnx", word_checkpoints["embed"], num_threads=2, streams=2) as model:
        model.encode(TEXTS)
        copied = pickle.loads(pickle.dumps(model))
        with copied:
            assert copied.info()["lists"] == model.info()["lists"]
            np.testing.assert_array_equal(copied.encode(TEXTS), model.encode(TEXTS))


def test_only_bundles_on_a_cpu_have_streams(word_checkpoints, load_on):
    with pytest.raises(InputError, match=r"streams=2 is for bundles on onnx or openvino, and .* runs on torch"):
        gte_deploy.load(word_checkpoints["embed"], streams=2)
    with gte_deploy.load(word_checkpoints["embed"], streams=1, num_threads=1) as model:
        assert model.info()["lists"] == {"streams": 1, "threads": 1}


def test_a_replaced_bundle_is_not_opened_for_streams(tmp_path, word_checkpoints, bundle_of):
    bundle = shutil.copytree(bundle_of(word_checkpoints["embed"]), tmp_path / "bundle")
    with gte_deploy.load(bundle, backend="onnx", num_threads=2) as model:
        model.encode("a text")
        shutil.copytree(bundle_of(word_checkpoints["classify"]), bundle, dirs_exist_ok=True)
        with pytest.raises(BackendError, match="has changed since it was loaded"):
            model.encode(TEXTS)


def test_load_takes_the_measured_streams_and_info_names_them(
    tmp_path, monkeypatch, capsys, word_checkpoints, bundle_of
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gte_deploy.backends.choice.available_cpus", lambda: 4)
    monkeypatch.setattr("gte_deploy.backends.picks.available_cpus", lambda: 4)
    bundle = bundle_of(word_checkpoints["embed"])
    checksum = read_manifest(bundle).to_json()["checksum"]
    picks.save(checksum, picks.Pick("onnx", None, {}, "2026-11-29", {}, ListPick(streams=2, batch_tokens=640)))
    with gte_deploy.load(bundle) as model:
        plan = model.info()["lists"]
        assert (plan["streams"], plan["threads"], plan["batch_tokens"]) == (2, 2, 640)
        assert model.info()["max_batch_tokens"] == 640 and "bench --pick" in plan["reason"]
    with gte_deploy.load(bundle, streams=1, max_batch_tokens=300) as model:
        assert model.info()["lists"] == {"streams": 1, "threads": model.info()["num_threads"]}
        assert model.info()["max_batch_tokens"] == 300
    with gte_deploy.load(bundle, num_threads=3) as model:
        assert model.info()["lists"]["streams"] == 3, "it was measured with four threads"
    assert cli.main(["info", str(bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lists"]["streams"] == 2 and facts["engine"]["lists"] == {"streams": 2, "batch_tokens": 640}


MEMORY = """
    import dataclasses, sys, pathlib
    import numpy as np, onnx
    from onnx import TensorProto, helper, numpy_helper
    from gte_deploy.backends.base import Batch
    from gte_deploy.backends.onnxruntime import OnnxBackend
    from gte_deploy.backends.stream_plan import StreamPlan
    from gte_deploy.backends.streams import StreamedBackend
    from gte_deploy.bundle.manifest import read_manifest
    from gte_deploy.core.lanes import in_lanes

    bundle, folder = map(pathlib.Path, sys.argv[1:])
    width, layers = 3072, 4
    weights = width * width * 4 * layers
    values = np.random.default_rng(0).standard_normal((width, width), np.float32) / width
    tensors = [numpy_helper.from_array(values * (i + 1), f"w{i}") for i in range(layers)]
    tensors += [numpy_helper.from_array(values[:128], "table")]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers - 1)]
    nodes += [helper.make_node("MatMul", [f"h{layers - 1}", f"w{layers - 1}"], ["last_hidden_state"])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in
              ("input_ids", "attention_mask")]
    nodes += [helper.make_node("Identity", ["attention_mask"], ["unused"])]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "s", width])
    graph = helper.make_graph(nodes, "g", inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=1024)
    del model, graph, tensors, values
    spec = dataclasses.replace(read_manifest(bundle).spec, hidden_size=width)

    def own_bytes():
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    ids = np.ones((1, 64), np.int64)
    batch = Batch(ids, ids)
    whole = OnnxBackend(folder / "model.onnx", spec, num_threads=2)
    whole.run(batch, ["last_hidden_state"])
    for packed in (False, True):
        before = own_bytes()
        plan = StreamPlan(2, 1, 1, 2, packed, "")
        backend = StreamedBackend(whole, plan, lambda: OnnxBackend(folder / "model.onnx", spec, num_threads=1,
                                                                   packed=packed))
        sizes = []
        for _ in range(6):
            for found in in_lanes(lambda one: backend.run(one, ["last_hidden_state"]), [batch] * 4, 2):
                assert np.isfinite(found["last_hidden_state"]).all()
            sizes.append(own_bytes() - before)
        print(sizes[0] / weights, (sizes[-1] - sizes[1]) / weights)
"""


def test_streams_of_a_large_model_have_no_copy_of_the_weights(tmp_path, word_checkpoints, bundle_of):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), bundle_of(word_checkpoints["embed"]), tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (first, growth), (packed, _) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert first < 0.1 and growth < 0.05
    assert packed > 0.9, "the judge sees a copy where there is one"
