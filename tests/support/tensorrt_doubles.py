"""Doubles of CUDA and of a TensorRT engine, for tests of the TensorRT backend on a machine without a GPU.

The double of CUDA carries out on the host what is queued, when it is waited for; the double of an engine computes a
formula over its input buffers.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
import types
import weakref

import numpy as np

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.backend import Caches, TensorRTBackend
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.graph_cache import GraphLimits
from gte_deploy.backends.tensorrt.runtime_cache import RuntimeCache
from gte_deploy.bundle.manifest import PlanEntry
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
    """cuda.bindings.runtime over the host's memory. Streams carry out what they hold once they are waited for.

    As on a GPU, a thread that is capturing must not allocate, free or wait: that makes its capture invalid. Each thread
    has a current device. `problems` lists calls that a thread made on another device than the backend's.
    """

    cudaError_t = enum.IntEnum(
        "cudaError_t",
        {
            "cudaSuccess": 0,
            "cudaErrorInvalidValue": 1,
            "cudaErrorMemoryAllocation": 2,
            "cudaErrorBroken": 900,
            "cudaErrorStreamCaptureInvalidated": 901,
        },
    )
    _NOT_IN_A_CAPTURE = ("cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaStreamSynchronize")
    _ON_ANY_DEVICE = ("cudaGetDevice", "cudaSetDevice", "cudaGetDeviceCount", "cudaGetErrorString")
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")
    cudaStreamNonBlocking = 1

    def __init__(self, count=1, used=0):
        self.count = count
        self.used = used
        self.memory, self.streams, self.graphs = {}, {}, {}
        self.capturing, self.invalid = {}, set()
        self.capturing_threads = {}
        self.problems = []
        self.memory_bytes, self.context_bytes, self.graph_bytes = 1 << 40, 1 << 20, 1 << 19
        self.num_contexts = 0
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
                if name not in self._ON_ANY_DEVICE and self.device() != self.used:
                    self.problems.append(f"{name} on device {self.device()}")
                if name in self.breaks:
                    return (self.cudaError_t.cudaErrorBroken,)
                stream = self.capturing_threads.get(threading.get_ident())
                if stream is not None and name in self._NOT_IN_A_CAPTURE:
                    self.invalid.add(stream)
                    return (self.cudaError_t.cudaErrorStreamCaptureInvalidated,)
                return found(*arguments)

        return call

    def cudaGetErrorString(self, error):
        return self.cudaError_t.cudaSuccess, b"it broke"

    def cudaGetDeviceCount(self):
        return self.cudaError_t.cudaSuccess, self.count

    def device(self):
        """The current device of the calling thread."""
        return getattr(self.threads, "device", 0)

    def lose_context(self):
        self.num_contexts -= 1

    def free_bytes(self):
        held = sum(map(len, self.memory.values())) + self.num_contexts * self.context_bytes
        return self.memory_bytes - held - len(self.graphs) * self.graph_bytes

    def cudaMemGetInfo(self):
        return self.cudaError_t.cudaSuccess, self.free_bytes(), self.memory_bytes

    def cudaGetDevice(self):
        return self.cudaError_t.cudaSuccess, self.device()

    def cudaSetDevice(self, index):
        self.threads.device = index
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        stream = max(self.streams, default=0) + 1
        self.streams[stream] = []
        return self.cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]
        return (self.cudaError_t.cudaSuccess,)

    def _allocate(self, size):
        assert size > 0
        if size > self.free_bytes():
            return (self.cudaError_t.cudaErrorMemoryAllocation,)
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
        self.capturing_threads[threading.get_ident()] = stream
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        graph = self.capturing.pop(stream)
        del self.capturing_threads[threading.get_ident()]
        if stream in self.invalid:
            self.invalid.remove(stream)
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return self.cudaError_t.cudaSuccess, graph

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
    def __init__(self, engine, cache=None):
        self.engine, self.cache = engine, cache
        engine.runtime.num_contexts += 1
        weakref.finalize(self, engine.runtime.lose_context)
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
        is_captured = stream in self.engine.runtime.capturing
        if self.engine.fails or (self.engine.cannot_be_captured and is_captured):
            return False
        if is_captured and self.engine.during_capture is not None:
            self.engine.during_capture()
        assert self.scratch in self.engine.runtime.memory
        if self.cache is not None and self.shapes["input_ids"] not in self.cache.kernels:
            self.cache.kernels.append(self.shapes["input_ids"])
            self.engine.compiled.append(self.shapes["input_ids"])
        state = dict(self.shapes), dict(self.addresses)

        def compute():
            assert state == (self.shapes, self.addresses), "a graph whose context has run something else"
            self.engine.compute(*state)

        with self.engine.runtime.lock:
            self.engine.runtime.queue(stream, compute)
        return True


class HostCache:
    """TensorRT-RTX's IRuntimeCache: takes what was serialised in the same environment."""

    def __init__(self, environment):
        self.environment, self.kernels = environment, []

    def serialize(self):
        return json.dumps([self.environment, self.kernels]).encode()

    def deserialize(self, data):
        try:
            environment, kernels = json.loads(data)
        except ValueError:
            return False
        if environment != self.environment:
            return False
        self.kernels = [tuple(kernel) for kernel in kernels]
        return True


class HostConfig:
    """TensorRT-RTX's IRuntimeConfig."""

    def __init__(self, environment):
        self.environment, self.cache = environment, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return HostCache(self.environment)

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class HostEngine:
    device_memory_size_v2 = 1000

    def __init__(self, plan, runtime):
        self.plan, self.runtime = plan, runtime
        self.tensors = {tensor.name: tensor for tensor in (*plan.inputs, *plan.outputs)}
        self.contexts = []
        self.fails = self.cannot_be_captured = False
        self.during_capture = self.max_contexts = None
        self.environment = "driver 1"
        self.compiled = []
        """Shapes that TensorRT-RTX compiled kernels for."""

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
        return HostConfig(self.environment)

    def create_execution_context(self, how):
        if self.max_contexts is not None and self.runtime.num_contexts >= self.max_contexts:
            return None
        self.contexts.append(how)
        return HostContext(self, getattr(how, "cache", None))

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
        for name, values in ((tensor.name, found[tensor.name]) for tensor in self.plan.outputs):
            out = view(name)
            out[:] = values.view(np.uint32) >> 16 if out.dtype == np.uint16 else values


STRATEGIES = types.SimpleNamespace(
    ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
    CudaGraphStrategy=types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph"),
)


def backend_over(runtime, plan=None, spec=SPEC, *, limits=None, runtime_cache=None):
    """A backend over the doubles."""
    plan = plan or plan_of()
    cuda = Cuda(runtime.used, runtime=runtime)
    device = f"cuda:{runtime.used}"
    caches = Caches(limits or GraphLimits(), runtime_cache or RuntimeCache())
    engine = HostEngine(plan, runtime)
    return TensorRTBackend(engine, plan, spec, trt=STRATEGIES, cuda=cuda, device=device, caches=caches)


def engine_of(backend):
    """The double of the engine that a backend runs."""
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
