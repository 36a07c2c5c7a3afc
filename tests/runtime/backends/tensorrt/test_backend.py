"""The TensorRT backend's own work: what it checks, queues, keeps and frees, over doubles of CUDA and of an engine.

That a GPU computes what PyTorch does is tested on one: tests/contract, marked gpu.
"""

import dataclasses
import functools
import gc
import hashlib
import sys
import threading
import types

import numpy as np
import pytest

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt import backend as tensorrt_backend
from gte_deploy.backends.tensorrt import cuda as cuda_module
from gte_deploy.backends.tensorrt import plan as tensorrt_plan
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.graph_cache import GraphLimits
from gte_deploy.backends.tensorrt.plan import check_plan, open_plan
from gte_deploy.backends.tensorrt.variants import DTYPE_NAMES
from gte_deploy.bundle.manifest import FileEntry
from gte_deploy.core.errors import BackendError, BundleError, InputError, MissingDependencyError
from gte_deploy.core.spec import Profile, TensorSpec
from tensorrt_doubles import (
    HIDDEN,
    PACKED_PROFILES,
    PROFILES,
    SPEC,
    VOCABULARY,
    HostEngine,
    HostRuntime,
    assert_right,
    backend_over,
    engine_of,
    packed_plan,
    plan_of,
    random_batch,
)


@pytest.fixture
def runtime():
    runtime = HostRuntime()
    yield runtime
    assert runtime.problems == []


@pytest.fixture
def make(runtime):
    """`make(plan)`: a backend over the doubles."""
    return functools.partial(backend_over, runtime)


@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_of_every_shape(make, variant, dtype):
    backend, rng = make(plan_of(variant, dtype)), np.random.default_rng(0)
    for _ in range(60):
        rows, length, masks = rng.integers(1, 12), rng.integers(1, 65), rng.integers(0, 12)
        outputs = [("last_hidden_state", "logits"), ("logits",), ("last_hidden_state",)][rng.integers(3)]
        assert_right(backend, random_batch(rng, rows, length, masks), outputs)


@pytest.mark.parametrize("plan", [plan_of(), plan_of("tensorrt-rtx"), packed_plan()], ids=["padded", "rtx", "packed"])
def test_an_engine_that_gives_only_the_answer(make, plan):
    backend, rng = make(dataclasses.replace(plan, outputs=plan.outputs[1:])), np.random.default_rng(0)
    assert backend.outputs == ("logits",)
    for _ in range(20):
        batch = random_batch(rng, rng.integers(1, 12), rng.integers(1, 65), rng.integers(0, 12))
        assert_right(backend, batch, ("logits",))
    backend.warm_up([batch], ("logits",))
    with pytest.raises(BackendError, match="'last_hidden_state'; it offers logits. Export it with --outputs all"):
        backend.run(batch, ("last_hidden_state",))


@pytest.mark.parametrize("packed", [False, True])
def test_types_reach_the_engine_and_those_of_the_batch_before_do_not(make, packed):
    plan = packed_plan() if packed else plan_of()
    shape = ("tokens",) if packed else ("batch", "sequence")
    typed = dataclasses.replace(plan, inputs=(*plan.inputs, TensorSpec("token_type_ids", "int64", shape)))
    spec = dataclasses.replace(SPEC, token_types=True, type_vocab_size=2)
    backend, rng = make(typed, spec), np.random.default_rng(0)
    for number in range(40):
        batch = random_batch(rng, rng.integers(1, 12), rng.integers(1, 65), rng.integers(1, 12))
        types = None if number % 4 == 3 else rng.integers(0, 2, batch.input_ids.shape)
        assert_right(backend, dataclasses.replace(batch, token_type_ids=types))


@pytest.mark.parametrize("token_types", [False, True])
def test_an_engine_that_does_not_fit_the_models_types_is_refused(make, token_types):
    plan = plan_of()
    inputs = (
        plan.inputs if token_types else (*plan.inputs, TensorSpec("token_type_ids", "int64", ("batch", "sequence")))
    )
    spec = dataclasses.replace(SPEC, token_types=token_types, type_vocab_size=2)
    with pytest.raises(BackendError, match=r"the engine .* token_type_ids, and the model has"):
        make(dataclasses.replace(plan, inputs=inputs), spec)


def test_a_padding_free_engine_gives_what_others_do(make):
    backend, rng = make(packed_plan()), np.random.default_rng(0)
    for _ in range(60):
        rows, length, masks = rng.integers(1, 20), rng.integers(1, 65), rng.integers(0, 12)
        outputs = [("last_hidden_state", "logits"), ("logits",), ("last_hidden_state",)][rng.integers(3)]
        batch = random_batch(rng, rows, length, masks)
        assert_right(backend, batch, outputs)
        if "last_hidden_state" in outputs:
            assert not backend.run(batch, outputs)["last_hidden_state"][batch.attention_mask == 0].any()


def test_a_padding_free_engine_computes_no_padding_and_replays_its_graphs(make, runtime):
    backend, rng = make(packed_plan()), np.random.default_rng(0)
    lengths = np.array([64, 1, 2, 5])
    mask = (np.arange(64) < lengths[:, None]).astype(np.int64)
    batch = Batch(rng.integers(1, VOCABULARY, mask.shape), mask, np.array([[3, 4]]))
    seen, engine = [], engine_of(backend)
    compute = engine.compute
    engine.compute = lambda shapes, addresses: (seen.append(shapes["input_ids"]), compute(shapes, addresses))
    for _ in range(4):
        assert_right(backend, batch)
    assert set(seen) == {(72,)}, "72 tokens, and not 4 x 64"
    assert len(runtime.graphs) == 1 and runtime.calls.count("cudaGraphLaunch") == 1


def test_a_text_that_a_padding_free_engine_does_not_take(make, runtime):
    backend = make(packed_plan(profiles=PACKED_PROFILES[:1]))
    ids = np.ones((2, 33), np.int64)
    with pytest.raises(InputError, match=r"33 tokens, and the engine's profiles \(texts x tokens.* are 1x1:2x16:4x32"):
        backend.run(Batch(ids, ids), ["logits"])
    assert not runtime.streams


def test_bfloat16_comes_back_as_float32(make):
    backend = make(plan_of(dtype="bfloat16"))
    ids = np.full((2, 3), 2)
    found = backend.run(Batch(ids, np.ones_like(ids)), ["last_hidden_state"])["last_hidden_state"]
    np.testing.assert_array_equal(found, np.broadcast_to(8 + np.arange(HIDDEN) / 4, (2, 3, HIDDEN)))


def test_inputs_of_32_bits(make):
    plan = plan_of()
    inputs = tuple(TensorSpec(tensor.name, "int32", tensor.shape) for tensor in plan.inputs)
    assert_right(make(plan_of(inputs=inputs)), random_batch(np.random.default_rng(0), 3, 20, 4))


def test_an_engine_without_masks(make):
    outputs = (TensorSpec("last_hidden_state", "float32", ("batch", "sequence", HIDDEN)),)
    plan = plan_of(inputs=plan_of().inputs[:2], outputs=outputs)
    backend = make(plan)
    engine_of(backend).compute = lambda shapes, addresses: None
    ids = np.ones((2, 3), np.int64)
    assert backend.run(Batch(ids, ids), ["last_hidden_state"])["last_hidden_state"].shape == (2, 3, HIDDEN)


def test_what_cannot_be_run_is_refused_before_anything_is_queued(make, runtime):
    backend = make(plan_of(profiles=PROFILES[:1]))
    ids = np.ones((1, 17), np.int64)
    for batch, error, message in (
        (Batch(ids, ids), InputError, r"17 tokens, and the engine's profiles .* are 1x1:4x8:4x16"),
        (Batch(ids - 2, ids), InputError, r"input_ids\[0, 0\] is -1"),
    ):
        with pytest.raises(error, match=message):
            backend.run(batch, ["logits"])
    with pytest.raises(BackendError, match="no output 'nope'"):
        backend.run(Batch(ids, ids), ["nope"])
    assert not runtime.streams and "cudaStreamCreateWithFlags" not in runtime.calls


def test_memory_is_allocated_once(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    assert_right(backend, random_batch(rng, 1, 3, 1))
    allocated = runtime.calls.count("cudaMalloc") + runtime.calls.count("cudaMallocHost")
    for _ in range(20):
        assert_right(backend, random_batch(rng, rng.integers(1, 5), rng.integers(1, 65), rng.integers(0, 5)))
    assert runtime.calls.count("cudaMalloc") + runtime.calls.count("cudaMallocHost") == allocated
    assert len(runtime.streams) == 1


def test_page_locked_memory_of_large_outputs_grows(make, runtime, monkeypatch):
    monkeypatch.setattr(tensorrt_backend, "PINNED_AT_ONCE", 64)
    backend, rng = make(), np.random.default_rng(0)
    for rows, length in ((4, 8), (4, 16), (2, 64)):
        before = runtime.calls.count("cudaMallocHost")
        assert_right(backend, random_batch(rng, rows, length, 1))
        assert runtime.calls.count("cudaMallocHost") > before
    assert runtime.calls.count("cudaMalloc") == 5 + 1, "each tensor and the activations"
    assert len(runtime.memory) == 5 + 5 + 1


def test_only_what_is_asked_for_is_copied_back(make, runtime):
    backend, batch = make(), random_batch(np.random.default_rng(0), 1, 8, 1)
    backend.run(batch, ["logits"])
    assert runtime.calls.count("cudaMemcpyAsync") == 3 + 1


def test_a_shape_that_comes_often_is_replayed_as_a_graph(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    for _ in range(6):
        assert_right(backend, random_batch(rng, 2, 8, 2))
        assert_right(backend, random_batch(rng, 2, 20, 2))
    assert len(runtime.graphs) == 2 and runtime.calls.count("cudaGraphLaunch") == 2 * 3, "from the fourth run on"
    assert runtime.calls.count("cudaGraphDestroy") == 2, "what they were instantiated of"
    # One context for each profile, and one for each graph.
    assert engine_of(backend).contexts == ["user managed"] * 4
    assert_right(backend, random_batch(rng, 2, 8, 2), ("logits",))
    assert runtime.calls.count("cudaGraphLaunch") == 2 * 3, "other outputs are another graph"
    assert backend.counts() == {
        "runs": 13,
        "replays": 6,
        "preparations": 4,
        "captures": 2,
        "failed captures": 0,
        "contexts": 4,
        "contexts created": 4,
    }


def test_lengths_and_rows_that_pad_to_one_shape_share_a_graph(make, runtime):
    plan = plan_of(profiles=(Profile((1, 1), (4, 8), (16, 16)),))
    backend, rng = make(plan), np.random.default_rng(0)
    for rows, length in ((9, 9), (10, 10), (9, 11), (10, 16), (9, 12)):
        assert_right(backend, random_batch(rng, rows, length, 1))
    assert len(runtime.graphs) == 1 and runtime.calls.count("cudaGraphLaunch") == 2
    assert_right(backend, random_batch(rng, 11, 9, 1))
    assert runtime.calls.count("cudaGraphLaunch") == 2, "11 rows are padded to 12"


def test_rows_are_not_padded_without_a_graph(make):
    backend, rng = make(plan_of(profiles=(Profile((1, 1), (4, 8), (16, 16)),))), np.random.default_rng(0)
    seen, engine = [], engine_of(backend)
    compute = engine.compute
    engine.compute = lambda shapes, addresses: (seen.append(shapes["input_ids"]), compute(shapes, addresses))
    for _ in range(4):
        assert_right(backend, random_batch(rng, 9, 8, 1))
    assert seen == [(9, 8)] * 3 + [(10, 8)] * 2, "one run before the capture, and one replay"


def test_a_graph_goes_with_the_memory_it_was_captured_of(make, runtime, monkeypatch):
    monkeypatch.setattr(tensorrt_backend, "PINNED_AT_ONCE", 64)
    backend, rng = make(), np.random.default_rng(0)
    for _ in range(3):
        assert_right(backend, random_batch(rng, 1, 8, 1))
    assert len(runtime.graphs) == 1
    assert_right(backend, random_batch(rng, 2, 64, 4))
    assert not runtime.graphs
    assert_right(backend, random_batch(rng, 1, 8, 1))
    assert len(runtime.graphs) == 1, "the sights before count"


def test_a_full_cache_reuses_the_contexts_of_its_graphs(make, runtime):
    limits = GraphLimits(max_graphs=2, window=8, pause=1, least_replays=0)
    backend, rng = make(limits=limits), np.random.default_rng(0)
    assert_right(backend, random_batch(rng, 4, 16, 4))
    assert_right(backend, random_batch(rng, 2, 64, 4))
    for rows, length in ((1, 8), (2, 8), (3, 8), (1, 20), (1, 40)):
        for _ in range(20):
            assert_right(backend, random_batch(rng, rows, length, 1))
        assert len(runtime.graphs) <= 2
    counts = backend.counts()
    assert counts["captures"] == 5, "each became the most frequent one"
    assert counts["contexts"] == counts["contexts created"] == runtime.num_contexts == 2 + 2


def test_the_memory_of_graphs_is_bounded(make, runtime):
    # A context of 1 MiB and a graph of half a MiB, as the driver reports them.
    backend, rng = make(limits=GraphLimits(max_bytes=4 << 20)), np.random.default_rng(0)
    assert_right(backend, random_batch(rng, 4, 16, 4))
    for rows in (1, 2, 3, 4):
        for _ in range(4):
            assert_right(backend, random_batch(rng, rows, 8, 1))
    assert len(runtime.graphs) == 3, "with two there was room for more"


def test_without_memory_for_a_graph_the_engine_runs_without_one(make, runtime, caplog):
    backend, rng = make(), np.random.default_rng(0)
    assert_right(backend, random_batch(rng, 4, 16, 4))
    engine = engine_of(backend)
    engine.max_contexts = runtime.num_contexts
    for _ in range(5):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert not runtime.graphs and "could not create an execution context" in caplog.text
    assert backend.counts()["contexts"] == runtime.num_contexts == 1


@pytest.mark.parametrize(
    "what", ["cudaGraphInstantiate: CUDA error 900, it broke", "TensorRT refused to run the engine"]
)
def test_a_failed_capture_is_tried_again_later(make, runtime, caplog, what):
    backend, rng = make(limits=GraphLimits(pause=4)), np.random.default_rng(0)
    engine_of(backend).cannot_be_captured = "refused" in what
    runtime.breaks.add(what.partition(":")[0])
    for _ in range(10):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert caplog.text.count(f"no CUDA graph for the shape (2, 8); it is tried again after 8 runs: {what}") == 1
    assert runtime.calls.count("cudaStreamBeginCapture") == 1 and not runtime.capturing
    engine_of(backend).cannot_be_captured = False
    runtime.breaks.clear()
    for _ in range(2):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert len(runtime.graphs) == 1 and runtime.calls.count("cudaGraphLaunch") == 1
    assert backend.counts()["failed captures"] == 1
    assert backend.counts()["contexts"] == runtime.num_contexts == 2


def test_an_engine_that_can_never_be_captured_is_left_alone(make, runtime, caplog):
    backend, rng = make(limits=GraphLimits(pause=1, max_failures=3)), np.random.default_rng(0)
    engine_of(backend).cannot_be_captured = True
    for _ in range(10):
        for rows in (1, 2):
            assert_right(backend, random_batch(rng, rows, 8, 1))
    assert runtime.calls.count("cudaStreamBeginCapture") == 3
    assert caplog.text.count("runs without CUDA graphs from now on: TensorRT refused to run the engine") == 1


def test_what_another_finalizer_frees_during_a_capture_spoils_one_try(make, runtime):
    """Memory that is not this package's: its finalizer does not know of the capture."""
    backend, rng = make(limits=GraphLimits(pause=1)), np.random.default_rng(0)
    engine, memory = engine_of(backend), Cuda(0, runtime=runtime).device_memory()
    memory.reserve(10)
    engine.during_capture = memory.close
    for _ in range(8):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert backend.counts()["failed captures"] == 1 and len(runtime.graphs) == 1


def test_a_model_that_is_collected_during_a_capture_is_freed_after_it(make, runtime):
    backend, other, rng = make(), make(), np.random.default_rng(0)
    assert_right(other, random_batch(rng, 1, 8, 1))
    held, freed_inside = len(runtime.memory), []
    lost = [other]
    del other

    def collect():
        if lost:
            lost.clear()
            gc.collect()
            freed_inside.append(len(runtime.memory) < held)

    assert_right(backend, random_batch(rng, 2, 8, 2))
    both = len(runtime.memory)
    engine_of(backend).during_capture = collect
    for _ in range(3):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert freed_inside == [False] and len(runtime.memory) == both - held
    assert backend.counts()["failed captures"] == 0 and len(runtime.graphs) == 1
    assert len(runtime.streams) == 1


def test_the_callers_gpu_is_restored():
    runtime = HostRuntime(count=3, used=1)
    backend, rng = backend_over(runtime), np.random.default_rng(0)
    runtime.cudaSetDevice(2)
    for _ in range(5):
        assert_right(backend, random_batch(rng, 2, 8, 2))
        assert runtime.device() == 2
    backend.warm_up([random_batch(rng, 2, 8, 2)], ["logits"])
    assert runtime.device() == 2
    runtime.breaks.add("cudaStreamSynchronize")
    with pytest.raises(BackendError):
        backend.run(random_batch(rng, 2, 8, 2), ["logits"])
    assert runtime.device() == 2
    runtime.breaks.clear()
    assert_right(backend, random_batch(rng, 2, 8, 2))
    backend.close()
    assert runtime.device() == 2
    backend = backend_over(runtime)
    assert_right(backend, random_batch(rng, 2, 8, 2))
    del backend
    gc.collect()
    assert runtime.device() == 2 and not runtime.memory and not runtime.streams
    assert runtime.problems == [], "every call was on GPU 1"


def test_opening_a_plan_restores_the_callers_gpu(module, folder, runtime):
    runtime.count, runtime.used = 2, 1
    open_plan(folder, plan_of(), FILE, "cuda:1")
    assert runtime.device() == 0 and module.device_at_opening == 1


def test_warming_up_captures_in_every_slot(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    assert backend.shapes_to_warm_up() == [(1, 1), (4, 8), (4, 16), (1, 17), (2, 32), (2, 64)]
    batches = [random_batch(rng, rows, length, 1) for rows, length in ((2, 64), (4, 16), (1, 8))]
    backend.warm_up(batches, ("logits",))
    assert len(runtime.streams) == 2 and len(runtime.graphs) == 2 * 3
    before = backend.counts()
    threads = [threading.Thread(target=backend.run, args=(batch, ["logits"])) for batch in batches * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = backend.counts()
    assert after["replays"] - before["replays"] == 12 and after["preparations"] == before["preparations"]
    assert make(packed_plan()).shapes_to_warm_up() == [(1, 1), (2, 8), (4, 8), (4, 16), (8, 16)]


def test_threads_that_warm_up_and_run_do_not_wait_for_each_other_for_ever(make):
    backend, problems = make(), []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(5):
                backend.warm_up([random_batch(rng, 1, 8, 1)], ("logits",))
                assert_right(backend, random_batch(rng, 2, 8, 1))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert problems == [] and not any(thread.is_alive() for thread in threads)


def test_rtx_captures_by_itself(make, runtime):
    backend, rng = make(plan_of("tensorrt-rtx")), np.random.default_rng(0)
    for _ in range(5):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert "cudaStreamBeginCapture" not in runtime.calls
    (config,) = engine_of(backend).contexts
    assert config.cuda_graph_strategy == "whole graph"


def test_many_threads_share_two_slots(make, runtime):
    backend, problems = make(), []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(25):
                assert_right(backend, random_batch(rng, rng.integers(1, 9), rng.integers(1, 65), rng.integers(0, 6)))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(runtime.streams) <= 2 and len(backend._idle) == len(runtime.streams)


def test_a_third_thread_waits_for_a_slot(make, runtime):
    backend, batch = make(), random_batch(np.random.default_rng(0), 1, 8, 1)
    engine, inside, go_on = engine_of(backend), threading.Semaphore(0), threading.Event()
    compute = engine.compute

    def slow(*state):
        inside.release()
        runtime.lock.release()
        go_on.wait(10)
        runtime.lock.acquire()
        compute(*state)

    engine.compute = slow
    threads = [threading.Thread(target=backend.run, args=(batch, ["logits"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=10) and inside.acquire(timeout=10)
    assert not inside.acquire(timeout=0.1), "the third runs beside them"
    go_on.set()
    for thread in threads:
        thread.join()
    assert inside.acquire(timeout=0) and len(runtime.streams) == 2


def test_close_frees_everything_and_again_nothing(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    for _ in range(3):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert runtime.graphs
    backend.close()
    assert not runtime.memory and not runtime.streams and not runtime.graphs
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(random_batch(rng, 2, 8, 2), ["logits"])


def test_closing_lets_what_runs_end_and_wakes_who_waits(make, runtime):
    backend, batch, errors = make(), random_batch(np.random.default_rng(0), 1, 8, 1), []
    engine, started, go_on = engine_of(backend), threading.Semaphore(0), threading.Event()
    compute = engine.compute

    def slow(*state):
        started.release()
        runtime.lock.release()
        go_on.wait(10)
        runtime.lock.acquire()
        compute(*state)

    engine.compute = slow

    def work():
        try:
            assert_right(backend, batch)
        except BackendError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert started.acquire(timeout=10) and started.acquire(timeout=10)
    backend.close()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert errors == ["this model is closed; load it again"] * 4
    assert not runtime.memory and not runtime.streams


def test_what_is_dropped_unclosed_is_freed(make, runtime):
    backend = make()
    assert_right(backend, random_batch(np.random.default_rng(0), 1, 8, 1))
    assert runtime.memory
    del backend
    gc.collect()
    assert not runtime.memory and not runtime.streams


@pytest.mark.parametrize("what", ["cudaMallocHost", "cudaMemcpyAsync", "cudaStreamSynchronize", "engine"])
def test_a_failure_is_typed_and_costs_one_slot(make, runtime, what):
    backend, batch = make(), random_batch(np.random.default_rng(0), 1, 8, 1)
    engine = engine_of(backend)
    runtime.breaks.add(what)
    engine.fails = what == "engine"
    with pytest.raises(BackendError, match=r"TensorRT failed on a batch of \(1, 8\): .*(it broke|refused to run)"):
        backend.run(batch, ["logits"])
    assert not runtime.memory and not runtime.streams and backend._num_slots == 0
    runtime.breaks.clear()
    engine.fails = False
    assert_right(backend, batch)
    assert len(runtime.streams) == 1


# What is checked before a plan is deserialised.


@pytest.fixture
def module(monkeypatch, runtime):
    """TensorRT 10.9.0.34, whose Runtime gives the engine of `module.plan`."""
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.9.0.34"
    module.deserialised = []

    class ILogger:
        Severity = types.SimpleNamespace(WARNING=1, INFO=2, VERBOSE=3)

    class Runtime:
        def __init__(self, logger):
            assert isinstance(logger, ILogger)

        def deserialize_cuda_engine(self, data):
            module.device_at_opening = runtime.device()
            module.deserialised.append(data)
            return None if module.plan is None else HostEngine(module.plan, runtime)

    module.ILogger, module.Runtime, module.plan = ILogger, Runtime, plan_of()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda_module, "import_runtime", lambda extra: runtime)
    monkeypatch.setattr(cuda_module, "gpu_capability", lambda index: "8.9")
    return module


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/model.plan").write_bytes(b"the plan")
    return tmp_path


FILE = FileEntry(8, hashlib.sha256(b"the plan").hexdigest())


def test_a_plan_that_fits_is_opened(module, folder):
    trt, _, engine = open_plan(folder, plan_of(), FILE, "cuda")
    assert trt is module and engine.num_io_tensors == 5 and module.deserialised == [b"the plan"]


def test_a_padding_free_plan_is_held_against_its_manifest(module, folder):
    module.plan = packed_plan()
    assert open_plan(folder, packed_plan(), FILE, "cuda")[2].num_io_tensors == 7
    for plan in (packed_plan(profiles=PACKED_PROFILES[:1]), packed_plan(profiles=PACKED_PROFILES[::-1]), plan_of()):
        with pytest.raises(BundleError, match="the engine .* has the (tensors|profiles) .*, and the manifest says"):
            open_plan(folder, plan, FILE, "cuda")


@pytest.mark.parametrize(
    ("plan", "device", "message"),
    [
        (
            plan_of(version="10.9.0.33"),
            "cuda",
            r"built with TensorRT 10\.9\.0\.33.*10\.9\.0\.34 is installed here: pip install",
        ),
        (plan_of(compute_capabilities=("9.0",)), "cuda:0", r"capability 9\.0, and cuda:0 has 8\.9.*--target sm89"),
        (plan_of(), "cpu", "runs on a GPU, not on device 'cpu'"),
        (plan_of(), "cuda:1", "'cuda:1' does not exist: CUDA sees 1 GPUs"),
    ],
)
def test_a_plan_that_does_not_fit_is_not_deserialised(module, folder, plan, device, message):
    with pytest.raises(BackendError, match=message):
        open_plan(folder, plan, FILE, device)
    assert module.deserialised == []


def test_a_plan_that_is_not_the_manifests_is_not_deserialised(module, folder):
    (folder / "tensorrt/model.plan").write_bytes(b"the plot")
    with pytest.raises(BundleError, match="sha256 .*, and the manifest says"):
        open_plan(folder, plan_of(), FILE, "cuda")
    assert module.deserialised == []


def test_a_variant_that_is_not_installed_is_named_with_its_version(monkeypatch):
    for variant, name, extra in (("tensorrt", "TensorRT 10", "trt"), ("tensorrt-rtx", "TensorRT-RTX 10", "rtx")):
        monkeypatch.setitem(sys.modules, variant.replace("-", "_"), None)
        with pytest.raises(
            BackendError, match=rf"built with {name}.*not installed.*\[{extra}\].*{variant}==10\.9\.0\.34"
        ):
            check_plan(plan_of(variant), "cuda")


def test_without_cuda_bindings_the_extra_is_named(module, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"\[trt\]"):
        check_plan(plan_of(), "cuda")


def test_a_plan_that_tensorrt_refuses(module, folder):
    module.plan = None
    with pytest.raises(BackendError, match=r"TensorRT 10\.9\.0\.34 refuses tensorrt/model\.plan"):
        open_plan(folder, plan_of(), FILE, "cuda")


@pytest.mark.parametrize(
    "plan",
    [plan_of(dtype="float16"), plan_of(profiles=PROFILES[:1]), plan_of(outputs=plan_of().outputs[:1])],
)
def test_an_engine_that_is_not_what_the_manifest_says(module, folder, plan):
    with pytest.raises(BundleError, match="the engine .* has the (tensors|profiles) .*, and the manifest says"):
        open_plan(folder, plan, FILE, "cuda")


def test_tensorrts_log_is_ours(module, folder, caplog):
    caplog.set_level("DEBUG", logger="gte_deploy.backends.tensorrt.plan")
    theirs = tensorrt_plan._logger_for(module)
    assert theirs is tensorrt_plan._logger_for(module)
    for severity in (0, 1, 2):
        theirs.log(severity, "a message")
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "DEBUG"]
    assert caplog.messages[0] == "tensorrt: a message"


# The real thing, as far as it goes without a GPU.


def has_gpu():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    status, count = runtime.cudaGetDeviceCount()
    return status == runtime.cudaError_t.cudaSuccess and count > 0


def test_a_machine_without_a_gpu_is_told_so():
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used here \(cudaGetDeviceCount: CUDA error \d+, \w"):
        Cuda(0)


def test_the_installed_tensorrt_rtx_is_held_against_the_plan():
    trt = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(
        BackendError, match=rf"built with TensorRT-RTX 10\.9\.0\.34.*{trt.__version__} is installed here"
    ):
        check_plan(plan_of("tensorrt-rtx"), "cuda")
    if not has_gpu():
        with pytest.raises(BackendError, match="no NVIDIA GPU"):
            check_plan(plan_of("tensorrt-rtx", version=trt.__version__), "cuda")


def test_tensorrt_rtx_has_what_is_asked_of_it():
    """Names that are used on a GPU alone."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    for kind, names in (
        (trt.IRuntimeConfig, "set_execution_context_allocation_strategy cuda_graph_strategy"),
        (trt.ICudaEngine, "create_runtime_config create_execution_context device_memory_size_v2 num_io_tensors"),
        (trt.ICudaEngine, "get_tensor_name get_tensor_dtype get_tensor_shape get_tensor_profile_shape"),
        (trt.ICudaEngine, "num_optimization_profiles"),
        (trt.IExecutionContext, "set_device_memory set_optimization_profile_async set_input_shape set_tensor_address"),
        (trt.IExecutionContext, "execute_async_v3"),
    ):
        for name in names.split():
            assert hasattr(kind, name), name
    assert {trt.DataType.HALF.name, trt.DataType.BF16.name, trt.DataType.FLOAT.name} <= set(DTYPE_NAMES)


def test_cuda_bindings_have_what_is_asked_of_them():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in vars(HostRuntime):
        if name.startswith("cuda"):
            assert hasattr(runtime, name), name
