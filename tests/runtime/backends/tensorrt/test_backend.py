"""The TensorRT backend's own work: what it checks, queues, keeps and frees, over doubles of CUDA and of an engine.

The double of CUDA carries out on the host what is queued, when it is waited for; the double of an engine computes a
formula over its input buffers. That a GPU computes what PyTorch does is tested on one: tests/contract, marked gpu.
"""

import ctypes
import dataclasses
import enum
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
from gte_deploy.backends.tensorrt.backend import TensorRTBackend
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.plan import check_plan, open_plan
from gte_deploy.backends.tensorrt.variants import DTYPE_NAMES
from gte_deploy.bundle.manifest import FileEntry, PlanEntry
from gte_deploy.core.errors import BackendError, BundleError, InputError, MissingDependencyError
from gte_deploy.core.spec import ModelSpec, Profile, TensorSpec

HIDDEN, VOCABULARY = 4, 50
SPEC = ModelSpec(task="fill-mask", max_length=64, vocab_size=VOCABULARY, hidden_size=HIDDEN, pad_token_id=0)
PROFILES = (Profile((1, 1), (4, 8), (4, 16)), Profile((1, 17), (2, 32), (2, 64)))
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64, "int32": np.int32}
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}


def plan_of(variant="tensorrt", dtype="float32", **changes):
    fields = {
        "path": "tensorrt/model.plan",
        "variant": variant,
        "version": "10.9.0.34",
        "compute_capabilities": ("8.6", "8.9"),
        "profiles": PROFILES,
        "inputs": (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("attention_mask", "int64", ("batch", "sequence")),
            TensorSpec("mask_positions", "int64", ("masks", 2)),
        ),
        "outputs": (
            TensorSpec("last_hidden_state", dtype, ("batch", "sequence", HIDDEN)),
            TensorSpec("logits", dtype, ("masks", VOCABULARY)),
        ),
        "layers": {},
    }
    return PlanEntry(**fields | changes)


PACKED_PROFILES = (Profile((1, 1), (2, 16), (4, 32)), Profile((1, 1), (4, 64), (8, 128)))


def packed_plan(**changes):
    fields = {
        "profiles": PACKED_PROFILES,
        "inputs": (
            TensorSpec("input_ids", "int64", ("tokens",)),
            TensorSpec("mask_positions", "int64", ("num_masks",)),
            TensorSpec("position_ids", "int64", ("tokens",)),
            TensorSpec("query_lengths", "int32", ("batch_and_one",)),
            TensorSpec("kv_lengths", "int32", ("batch_and_one",)),
        ),
        "outputs": (
            TensorSpec("last_hidden_state", "float32", ("tokens", HIDDEN)),
            TensorSpec("logits", "float32", ("num_masks", VOCABULARY)),
        ),
    }
    return plan_of(**fields | changes)


def formula(ids, mask, positions):
    """Every value depends on all real tokens of its row, on nothing else, and is a float16."""
    real = np.where(mask == 1, ids, 0)
    total = real.sum(axis=1)[:, None, None] % 128
    hidden = real[:, :, None] + total + np.arange(HIDDEN) / 4
    row, token = positions.T
    logits = hidden[row, token, :1] + np.arange(VOCABULARY)
    return {"last_hidden_state": hidden.astype(np.float32), "logits": logits.astype(np.float32)}


def with_types(ids, types):
    """Another id where the type is 1: what `formula` makes of it differs."""
    return ids + 16 * types


def packed_formula(input_ids, mask_positions, position_ids, query_lengths, kv_lengths):
    """The same of texts in a row, as TRT_Attention takes them."""
    assert query_lengths.tolist() == kv_lengths.tolist() and query_lengths[0] == 0
    assert query_lengths[-1] == len(input_ids) and (np.diff(query_lengths) > 0).all(), "a text without a token"
    parts = []
    for start, end in zip(query_lengths, query_lengths[1:], strict=False):
        text, places = input_ids[None, start:end], position_ids[start:end]
        assert places.tolist() == list(range(len(places))) or not (text.any() or places.any()), (
            "neither text nor padding"
        )
        parts.append(formula(text, np.ones_like(text), np.zeros((1, 2), int))["last_hidden_state"][0])
    hidden = np.concatenate(parts)
    return {"last_hidden_state": hidden, "logits": hidden[mask_positions, :1] + np.arange(VOCABULARY, dtype=np.float32)}


class HostRuntime:
    """cuda.bindings.runtime over the host's memory. Streams carry out what they hold once they are waited for."""

    cudaError_t = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorBroken": 900})
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")
    cudaStreamNonBlocking = 1

    def __init__(self, count=1):
        self.count = count
        self.memory, self.streams, self.graphs = {}, {}, {}
        self.capturing = {}
        self.calls = []
        self.breaks = set()
        self.threads = threading.local()
        self.lock = threading.Lock()

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if not callable(found) or not name.startswith("cuda") or isinstance(found, type):
            return found

        def call(*arguments):
            with self.lock:
                self.calls.append(name)
                if name in self.breaks:
                    return (self.cudaError_t.cudaErrorBroken,)
                return found(*arguments)

        return call

    def cudaGetErrorString(self, error):
        return self.cudaError_t.cudaSuccess, b"it broke"

    def cudaGetDeviceCount(self):
        return self.cudaError_t.cudaSuccess, self.count

    def cudaSetDevice(self, index):
        self.threads.device = index
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        assert self.threads.device == 0 and flags == self.cudaStreamNonBlocking
        stream = max(self.streams, default=0) + 1
        self.streams[stream] = []
        return self.cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]
        return (self.cudaError_t.cudaSuccess,)

    def _allocate(self, size):
        assert self.threads.device == 0 and size > 0
        buffer = (ctypes.c_byte * size)(*([85] * min(size, 64)))
        self.memory[ctypes.addressof(buffer)] = buffer
        return self.cudaError_t.cudaSuccess, ctypes.addressof(buffer)

    def _free(self, address):
        del self.memory[address]
        return (self.cudaError_t.cudaSuccess,)

    cudaMalloc = cudaMallocHost = _allocate
    cudaFree = cudaFreeHost = _free

    def check(self, address, size):
        assert address in self.memory and size <= len(self.memory[address]), "not within one allocation"

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        def copy():
            self.check(target, size)
            self.check(source, size)
            ctypes.memmove(target, source, size)

        self.queue(stream, copy)
        return (self.cudaError_t.cudaSuccess,)

    def queue(self, stream, work):
        self.capturing.get(stream, self.streams[stream]).append(work)

    def cudaStreamSynchronize(self, stream):
        assert stream not in self.capturing
        queued = self.streams[stream]
        while queued:
            queued.pop(0)()
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.streams[stream] and stream not in self.capturing
        self.capturing[stream] = []
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        return self.cudaError_t.cudaSuccess, self.capturing.pop(stream)

    def cudaGraphInstantiate(self, graph, flags):
        number = self.calls.count("cudaGraphInstantiate")
        self.graphs[number] = graph
        return self.cudaError_t.cudaSuccess, number

    def cudaGraphDestroy(self, graph):
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, number):
        del self.graphs[number]
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphLaunch(self, number, stream):
        self.streams[stream] += self.graphs[number]
        return (self.cudaError_t.cudaSuccess,)


class HostContext:
    def __init__(self, engine):
        self.engine = engine
        self.profile = self.scratch = None
        self.shapes, self.addresses = {}, {}

    def set_device_memory(self, address, size):
        self.engine.runtime.check(address, size)
        self.scratch = address

    def set_optimization_profile_async(self, profile, stream):
        self.profile, self.shapes = profile, {}
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        if self.engine.fails or (self.engine.cannot_be_captured and stream in self.engine.runtime.capturing):
            return False
        assert self.scratch in self.engine.runtime.memory
        state = dict(self.shapes), dict(self.addresses)

        def compute():
            assert state == (self.shapes, self.addresses), "a graph whose context has run something else"
            self.engine.compute(*state)

        with self.engine.runtime.lock:
            self.engine.runtime.queue(stream, compute)
        return True


class HostEngine:
    device_memory_size_v2 = 1000

    def __init__(self, plan, runtime):
        self.plan, self.runtime = plan, runtime
        self.tensors = {tensor.name: tensor for tensor in (*plan.inputs, *plan.outputs)}
        self.contexts = []
        self.fails = self.cannot_be_captured = False

    num_io_tensors = property(lambda self: len(self.tensors))
    num_optimization_profiles = property(lambda self: len(self.plan.profiles))

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name=NAMES[self.tensors[name].dtype])

    def get_tensor_shape(self, name):
        return [-1 if isinstance(size, str) else size for size in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name, index):
        profile, is_packed = self.plan.profiles[index], len(self.tensors["input_ids"].shape) == 1
        if name == "mask_positions":
            return [(count,) if is_packed else (count, 2) for count in (1, 2, 4)]
        ends = [profile.min, profile.opt, profile.max]
        if not is_packed:
            return ends
        return [(texts + 1,) if name.endswith("_lengths") else (tokens,) for texts, tokens in ends]

    def create_runtime_config(self):
        return types.SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, how):
        self.contexts.append(how)
        return HostContext(self)

    def compute(self, shapes, addresses):
        sizes = {
            axis: size
            for name, shape in shapes.items()
            for axis, size in zip(self.tensors[name].shape, shape, strict=True)
        }

        def view(name):
            tensor = self.tensors[name]
            shape = tuple(sizes.get(size, size) for size in tensor.shape)
            dtype = np.dtype(NUMPY[tensor.dtype])
            count = int(np.prod(shape))
            self.runtime.check(addresses[name], count * dtype.itemsize)
            memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

        inputs = {tensor.name: view(tensor.name) for tensor in self.plan.inputs}
        if "token_type_ids" in inputs:
            inputs["input_ids"] = with_types(inputs["input_ids"], inputs.pop("token_type_ids"))
        if "query_lengths" in inputs:
            found = packed_formula(**inputs)
        else:
            assert inputs["attention_mask"].any(axis=1).all(), "a row without a token"
            found = formula(*inputs.values())
        for name, values in found.items():
            out = view(name)
            out[:] = values.view(np.uint32) >> 16 if out.dtype == np.uint16 else values


STRATEGIES = types.SimpleNamespace(
    ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
    CudaGraphStrategy=types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph"),
)


@pytest.fixture
def runtime():
    return HostRuntime()


@pytest.fixture
def make(runtime):
    """`make(plan)`: a backend over the doubles."""

    def backend(plan=None, spec=SPEC):
        plan = plan or plan_of()
        return TensorRTBackend(
            HostEngine(plan, runtime), plan, spec, trt=STRATEGIES, cuda=Cuda(0, runtime=runtime), device="cuda:0"
        )

    return backend


def engine_of(backend):
    return backend._engine._engine


def random_batch(rng, rows, length, masks):
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1, VOCABULARY, (rows, length))
    row = rng.integers(0, rows, masks)
    return Batch(ids, mask, np.stack([row, rng.integers(0, lengths[row])], axis=1).reshape(-1, 2))


def assert_right(backend, batch, outputs=("last_hidden_state", "logits")):
    found = backend.run(batch, outputs)
    ids = with_types(batch.input_ids, batch.graph_inputs(["token_type_ids"])["token_type_ids"])
    expected = formula(ids, batch.attention_mask, batch.mask_positions)
    real = batch.attention_mask == 1
    assert list(found) == list(outputs)
    for name, values in found.items():
        assert values.dtype == np.float32 and values.shape == expected[name].shape and values.flags.owndata
        where = real if name == "last_hidden_state" else slice(None)
        np.testing.assert_array_equal(values[where], expected[name][where], err_msg=name)


@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_of_every_shape(make, variant, dtype):
    backend, rng = make(plan_of(variant, dtype)), np.random.default_rng(0)
    for _ in range(60):
        rows, length, masks = rng.integers(1, 12), rng.integers(1, 65), rng.integers(0, 12)
        outputs = [("last_hidden_state", "logits"), ("logits",), ("last_hidden_state",)][rng.integers(3)]
        assert_right(backend, random_batch(rng, rows, length, masks), outputs)


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
    for _ in range(3):
        assert_right(backend, batch)
    assert seen == [(72,)] * 3, "72 tokens, and not 4 x 64"
    assert len(runtime.graphs) == 1


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
    assert not runtime.streams


def test_memory_is_reused_and_grows(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    assert_right(backend, random_batch(rng, 1, 3, 1))
    small = len(runtime.memory)
    assert_right(backend, random_batch(rng, 2, 64, 4))
    assert_right(backend, random_batch(rng, 4, 16, 4))
    allocated = runtime.calls.count("cudaMalloc") + runtime.calls.count("cudaMallocHost")
    for _ in range(20):
        assert_right(backend, random_batch(rng, rng.integers(1, 5), rng.integers(1, 65), rng.integers(0, 5)))
    assert runtime.calls.count("cudaMalloc") + runtime.calls.count("cudaMallocHost") == allocated
    assert len(runtime.memory) == small and len(runtime.streams) == 1


def test_only_what_is_asked_for_is_copied_back(make, runtime):
    backend, batch = make(), random_batch(np.random.default_rng(0), 1, 8, 1)
    backend.run(batch, ["logits"])
    assert runtime.calls.count("cudaMemcpyAsync") == 3 + 1


def test_a_shape_that_comes_again_is_replayed_as_a_graph(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    for _ in range(6):
        assert_right(backend, random_batch(rng, 2, 8, 2))
        assert_right(backend, random_batch(rng, 2, 20, 2))
    assert len(runtime.graphs) == 2 and runtime.calls.count("cudaGraphLaunch") == 2 * 4
    assert runtime.calls.count("cudaGraphDestroy") == 2, "what they were instantiated of"
    # One context for each profile, and one for each graph.
    assert engine_of(backend).contexts == ["user managed"] * 4
    assert_right(backend, random_batch(rng, 2, 8, 2), ("logits",))
    assert runtime.calls.count("cudaGraphLaunch") == 2 * 4, "other outputs are another graph"


def test_lengths_that_pad_to_one_share_a_graph(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    for length in (9, 10, 11, 12):
        assert_right(backend, random_batch(rng, 2, length, 1))
    assert len(runtime.graphs) == 1 and runtime.calls.count("cudaGraphLaunch") == 2


def test_a_graph_goes_with_the_memory_it_was_captured_of(make, runtime):
    backend, rng = make(), np.random.default_rng(0)
    for _ in range(3):
        assert_right(backend, random_batch(rng, 1, 8, 1))
    assert len(runtime.graphs) == 1
    assert_right(backend, random_batch(rng, 2, 64, 4))
    assert not runtime.graphs
    for _ in range(3):
        assert_right(backend, random_batch(rng, 1, 8, 1))
    assert len(runtime.graphs) == 1


def test_graphs_are_bounded(make, runtime, monkeypatch):
    monkeypatch.setattr(tensorrt_backend, "KEPT_GRAPHS", 2)
    monkeypatch.setattr(tensorrt_backend, "REMEMBERED_SHAPES", 3)
    backend, rng = make(), np.random.default_rng(0)
    assert_right(backend, random_batch(rng, 4, 16, 4))
    for rows in (1, 2, 3):
        for _ in range(3):
            assert_right(backend, random_batch(rng, rows, 8, 1))
    assert len(runtime.graphs) == 2
    (slot,) = backend._idle
    assert len(slot._seen) == 3


@pytest.mark.parametrize(
    "what", ["cudaGraphInstantiate: CUDA error 900, it broke", "TensorRT refused to run the engine"]
)
def test_an_engine_that_cannot_be_captured_runs_without_graphs(make, runtime, caplog, what):
    backend, rng = make(), np.random.default_rng(0)
    engine_of(backend).cannot_be_captured = "refused" in what
    runtime.breaks.add(what.partition(":")[0])
    for _ in range(5):
        assert_right(backend, random_batch(rng, 2, 8, 2))
    assert caplog.text.count(f"without CUDA graphs: {what}") == 1
    assert runtime.calls.count("cudaStreamBeginCapture") == 1 and not runtime.capturing


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
    with pytest.raises(MissingDependencyError, match=r"gte-deploy\[trt\]"):
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
