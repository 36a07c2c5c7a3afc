"""Runs the engine of a bundle with TensorRT or TensorRT-RTX on an NVIDIA GPU.

An execution context serves one thread at a time. So each run borrows an execution slot: a stream with its own buffers
and contexts. With two slots one thread copies while another computes; more slots would only hold memory. `graph_cache`
decides which shapes a slot captures as CUDA graphs.
"""

import itertools
import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_outputs, check_takes_types
from gte_deploy.backends.tensorrt.cuda import Cuda, release_outside_capture
from gte_deploy.backends.tensorrt.graph_cache import GraphCache, GraphLimits
from gte_deploy.backends.tensorrt.padding_free import PaddingFreeLayout
from gte_deploy.backends.tensorrt.plan import open_plan
from gte_deploy.backends.tensorrt.runtime_cache import RuntimeCache, cache_file
from gte_deploy.backends.tensorrt.shapes import PaddedLayout, SubBatch
from gte_deploy.bundle.manifest import Manifest, PlanEntry
from gte_deploy.core.errors import BackendError
from gte_deploy.core.spec import ModelSpec, Precision

logger = logging.getLogger(__name__)

_NUM_SLOTS = 2
# Page-locked host memory is scarce: a larger output gets no more at once than a batch needs.
PINNED_AT_ONCE = 16 << 20
_COUNTED = ("runs", "replays", "preparations", "captures", "failed captures", "contexts", "contexts created")
# Data type in the manifest -> numpy's type in memory. numpy has no bfloat16; it is the upper half of a float32.
_NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Caches:
    """What an engine keeps to run faster.

    Args:
        graphs: limits of the CUDA graphs of each execution slot.
        kernels: the kernels that TensorRT-RTX compiles.
    """

    graphs: GraphLimits = field(default_factory=GraphLimits)
    kernels: RuntimeCache = field(default_factory=RuntimeCache)


class TensorRTBackend:
    """One engine; `run` may be called from many threads at once."""

    name = "tensorrt"
    num_threads = 1
    lanes = _NUM_SLOTS
    """The number of batches that are worked on at once."""

    def __init__(
        self,
        engine: Any,
        plan: PlanEntry,
        spec: ModelSpec,
        *,
        trt: Any,
        cuda: Cuda,
        device: str = "cuda:0",
        precision: Precision = "fp16",
        caches: Caches | None = None,
    ) -> None:
        """Run `engine`, which the module `trt` deserialised from the plan; see `open_tensorrt_backend`.

        `precision` is the precision of the plan, whose data types are fixed.

        Raises:
            BackendError: the engine takes token types and the model has none, or the engine lacks them.
        """
        check_takes_types(f"the engine {plan.path}", [tensor.name for tensor in plan.inputs], spec)
        self.spec = spec
        self.device = device
        self.precision: Precision = precision
        self.outputs = tuple(tensor.name for tensor in plan.outputs)
        caches = caches or Caches()
        self._kernels = caches.kernels
        self._engine: _Engine | None = _Engine(engine, plan, trt, cuda, caches)
        self._counts = self._engine.counts
        self._returned = threading.Condition()
        self._warming_up = threading.Lock()
        self._idle: list[_Slot] = []
        self._num_slots = 0
        # For models that nobody closed. At the end of the interpreter the driver frees everything itself.
        self._finalizer = weakref.finalize(self, _free_dropped, cuda, [self._engine], self._idle)
        self._finalizer.atexit = False
        # The latest finalizer runs first, so the kernels are saved before the engine is freed.
        self._last_save = weakref.finalize(self, release_outside_capture, self._kernels.save)

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`.

        A batch is padded to a profile, or packed for a padding-free engine. A batch with more rows or masks than a
        profile takes is split into sub-batches.
        """
        engine = self._opened()
        jobs, results = self._jobs(engine, batch, outputs)
        with self._borrowed_slot(engine) as slot:
            _run_in(slot, jobs)
        return results

    def shapes_to_warm_up(self) -> list[tuple[int, int]]:
        """(rows, tokens of a row) of the smallest, the tuned and the largest shape of each profile, each once."""
        plan = self._opened().plan
        shapes = [shape for profile in plan.profiles for shape in (profile.min, profile.opt, profile.max)]
        if plan.padding_free:  # (texts, tokens of all texts)
            shapes = [(texts, max(1, tokens // texts)) for texts, tokens in shapes]
        return list(dict.fromkeys(shapes))

    def warm_up(self, batches: Sequence[Batch], outputs: Sequence[str]) -> None:
        """Run each batch in each execution slot, until its shape has a CUDA graph if there is room for one.

        That also compiles kernels and reserves memory. Other threads wait meanwhile.

        Raises:
            InputError, BackendError: see `run`.
        """
        engine = self._opened()
        jobs = [self._jobs(engine, batch, outputs)[0] for batch in batches]
        with self._warming_up, ExitStack() as stack:
            # One thread takes all slots at a time: two would wait for each other.
            slots = [stack.enter_context(self._borrowed_slot(engine)) for _ in range(_NUM_SLOTS)]
            for slot, jobs_of_batch in itertools.product(slots, jobs):
                for _ in range(engine.limits.least_sights):
                    _run_in(slot, jobs_of_batch)
            self._kernels.save()

    def counts(self) -> dict[str, int]:
        """Numbers since the model was loaded.

        "runs" of the engine; "replays" among them, from a CUDA graph; "preparations": runs that created a context or
        captured a graph; "captures" and "failed captures"; "contexts" that exist, and "contexts created" so far.
        """
        return self._counts.read()

    def close(self) -> None:
        """See `Backend.close`. Runs in progress finish."""
        self._finalizer.detach()
        with self._returned:
            engine, self._engine = self._engine, None
            idle = self._idle[:]
            self._idle.clear()
            self._returned.notify_all()
        if engine is not None:
            self._last_save()
            cuda, owned = engine.cuda, [engine, *idle]
            del engine, idle
            _free(cuda, owned)

    def _opened(self) -> "_Engine":
        if self._engine is None:
            raise BackendError("this model is closed; load it again")
        return self._engine

    def _jobs(
        self, engine: "_Engine", batch: Batch, outputs: Sequence[str]
    ) -> tuple[list["_Job"], dict[str, NDArray[np.float32]]]:
        """Check a batch and split it; return the parts, and the arrays that they will fill."""
        check_outputs(outputs, self.outputs)
        check_batch(batch, self.spec)
        sub_batches = list(engine.layout.split(batch, engine.plan.profiles, engine.masks))
        results = engine.layout.results(batch, outputs)
        return [_Job(batch, sub_batch, results, self.spec.pad_token_id) for sub_batch in sub_batches], results

    @contextmanager
    def _borrowed_slot(self, engine: "_Engine") -> Iterator["_Slot"]:
        with self._returned:
            while self._engine is not None and not self._idle and self._num_slots == _NUM_SLOTS:
                self._returned.wait()
            if self._engine is None:
                raise BackendError("this model is closed; load it again")
            slot = self._idle.pop() if self._idle else None
            self._num_slots += slot is None
        sound = False
        try:
            with engine.cuda.use():
                slot = slot or _Slot(engine)
                yield slot
                sound = True
                self._keep_kernels()
        finally:
            with self._returned:
                keep = sound and self._engine is not None
                if keep and slot is not None:
                    self._idle.append(slot)
                else:
                    self._num_slots -= 1
                self._returned.notify()
            if slot is not None and not keep:
                _free(engine.cuda, [slot])

    def _keep_kernels(self) -> None:
        """Save new kernels from time to time, while no other run is in progress. Runs that begin wait for it."""
        with self._returned:
            if len(self._idle) == self._num_slots - 1:
                self._kernels.save_if_due()


def open_tensorrt_backend(folder: Path, manifest: Manifest, *, device: str = "cuda") -> TensorRTBackend:
    """Open the engine of a bundle on the GPU `device`.

    Raises:
        BundleError: the plan differs from the manifest.
        BackendError: the bundle has no plan, or this TensorRT or GPU does not fit it.
        MissingDependencyError: cuda-bindings is not installed.
    """
    plan = manifest.plan
    if plan is None:
        raise BackendError(
            f"{folder} holds no TensorRT engine. Load it with backend='auto', or export one with --format trt."
        )
    file = manifest.files[plan.path]
    trt, cuda, engine = open_plan(folder, plan, file, device)
    is_rtx = plan.variant == "tensorrt-rtx"
    kernels = cache_file(file.sha256, plan.version, cuda.capability()) if is_rtx else None
    return TensorRTBackend(
        engine,
        plan,
        manifest.spec,
        trt=trt,
        cuda=cuda,
        device=device,
        precision=manifest.precision,
        caches=Caches(kernels=RuntimeCache(kernels)),
    )


class _Counts:
    """Numbers that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = Counter({name: 0 for name in _COUNTED})

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._numbers[name] += number

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._numbers)


class _Engine:
    """An engine, and the facts about it that its execution slots need."""

    def __init__(self, engine: Any, plan: PlanEntry, trt: Any, cuda: Cuda, caches: Caches) -> None:
        self.plan = plan
        self.cuda = cuda
        self.limits = caches.graphs
        self.kernels = caches.kernels
        self.counts = _Counts()
        self.inputs = [tensor.name for tensor in plan.inputs]
        tensors = (*plan.inputs, *plan.outputs)
        axes = {tensor.name: tensor.shape for tensor in tensors}
        self.layout: PaddedLayout | PaddingFreeLayout = (
            PaddingFreeLayout(axes) if plan.padding_free else PaddedLayout(axes)
        )
        self.dtypes = {tensor.name: _NUMPY_DTYPES[tensor.dtype] for tensor in tensors}
        self.masks: list[tuple[int, int]] | None = None
        """(least, most) mask positions of each profile."""
        if "mask_positions" in self.inputs:
            limits = [engine.get_tensor_profile_shape("mask_positions", i) for i in range(len(plan.profiles))]
            self.masks = [(max(1, low[0]), high[0]) for low, _, high in limits]
        self.most_bytes = self._most_bytes()
        """Bytes of each tensor at the largest shape of any profile."""
        # TensorRT-RTX compiles kernels for a shape while other runs use it, and captures CUDA graphs itself.
        self.is_rtx = plan.variant == "tensorrt-rtx"
        self._engine = engine
        self._trt = trt

    @property
    def scratch_bytes(self) -> int:
        """Bytes that a context needs for the activations of any profile."""
        return int(self._engine.device_memory_size_v2)

    def _most_bytes(self) -> dict[str, int]:
        most = dict.fromkeys(self.dtypes, 1)
        for index, profile in enumerate(self.plan.profiles):
            shapes = self.layout.shapes(profile.max, 0 if self.masks is None else self.masks[index][1])
            for name, shape in shapes.items():
                most[name] = max(most[name], math.prod(shape) * self.dtypes[name].itemsize)
        return most

    def create_context(self) -> Any:
        """A context without memory for its activations."""
        strategy: Any = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.is_rtx:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.kernels.attach(config)
            strategy = config
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BackendError("TensorRT could not create an execution context; its log says why")
        return context


@dataclass(frozen=True)
class _Job:
    """A sub-batch to compute, and the arrays of the whole batch that its rows are written to."""

    batch: Batch
    sub_batch: SubBatch
    results: Mapping[str, NDArray[np.float32]]
    pad_token_id: int


@dataclass(frozen=True)
class _Graph:
    """A captured CUDA graph. It depends on the state of its context, so no other shape may run on that context."""

    handle: Any
    context: Any
    size: int
    """Bytes of memory on the GPU, with those of the context."""


class _Slot:
    """An execution slot: a stream, buffers, and contexts that share the memory for activations. One run at a time."""

    def __init__(self, engine: _Engine) -> None:
        cuda = engine.cuda
        self._engine = engine
        self._stream = cuda.create_stream()
        self._scratch = cuda.device_memory()
        self._device = {name: cuda.device_memory() for name in engine.dtypes}
        self._host = {name: cuda.pinned_memory() for name in engine.dtypes}
        self._contexts: dict[int, Any] = {}
        """For runs without a graph: profile -> context."""
        self._graphs: GraphCache[_Graph] = GraphCache(engine.limits)

    def run(self, job: _Job) -> None:
        """Compute a sub-batch and write its rows into the results."""
        engine, sub_batch = self._engine, job.sub_batch
        engine.counts.add("runs")
        common = engine.layout.with_common_shape(sub_batch, engine.plan.profiles[sub_batch.profile])
        common_job = replace(job, sub_batch=common)
        if engine.is_rtx:  # it compiles kernels for each shape
            self._compute(common_job)
            return
        key = (common.profile, common.shape, common.num_masks, tuple(job.results))
        graph = self._graphs.find(key)
        if graph is not None:
            engine.counts.add("replays")
            self._compute(common_job, graph)
            return
        self._compute(job)
        if self._graphs.wants(key):
            self._capture(key, common_job)

    def close(self) -> None:
        """Free everything on the GPU."""
        self._drop_graphs()
        self._engine.counts.add("contexts", -len(self._contexts))
        self._contexts.clear()
        for memory in (self._scratch, *self._device.values(), *self._host.values()):
            memory.close()
        self._engine.cuda.release("cudaStreamDestroy", self._stream)

    def _compute(self, job: _Job, graph: _Graph | None = None) -> None:
        """Run the engine on a sub-batch, and write its rows into the results."""
        cuda, shapes = self._engine.cuda, self._load(job)
        if graph is not None:
            cuda.launch(graph.handle, self._stream)
        else:
            context = self._context_for(job.sub_batch.profile)
            self._bind(context, shapes)
            self._enqueue(context, shapes, tuple(job.results))
        cuda.synchronize(self._stream)
        for name, result in job.results.items():
            values = self._array(name, shapes)
            if values.dtype == np.uint16:  # bfloat16
                values = (values.astype(np.uint32) << 16).view(np.float32)
            self._engine.layout.place(name, values, job.sub_batch, result)

    def _load(self, job: _Job) -> Shapes:
        """Write a sub-batch to the input buffers of the host; return the shapes of all tensors."""
        engine = self._engine
        shapes = engine.layout.shapes(job.sub_batch.shape, job.sub_batch.num_masks)
        self._reserve(shapes, job.results)
        inputs = {name: self._array(name, shapes) for name in engine.inputs}
        engine.layout.write(job.batch, job.sub_batch, inputs, pad_token_id=job.pad_token_id)
        return shapes

    def _reserve(self, shapes: Shapes, results: Mapping[str, Any]) -> None:
        """Provide the buffers. One that moves loses all CUDA graphs, so most are as large as they can get at once."""
        moved = False
        for name in shapes:
            most = self._engine.most_bytes[name]
            moved |= self._device[name].reserve(most)
            if name in self._engine.inputs or name in results:
                moved |= self._host[name].reserve(min(most, max(self._bytes(name, shapes), PINNED_AT_ONCE)))
        if moved:
            self._drop_graphs()

    def _capture(self, key: Any, job: _Job) -> None:
        """Capture the shape of a sub-batch as a CUDA graph. A failure is logged; runs do not need the graph."""
        counts, graphs = self._engine.counts, self._graphs
        counts.add("preparations")
        try:
            graph = self._new_graph(job)
        except RuntimeError as error:  # TensorRT's own, and BackendError
            counts.add("failed captures")
            pause = graphs.fail(key)
            what = f"no CUDA graph for the shape {job.sub_batch.shape}"
            if graphs.is_off:
                what += ", and this engine runs without CUDA graphs from now on"
            else:
                what += f"; it is tried again after {pause} runs"
            logger.warning("%s: %s", what, str(error))  # the error itself would keep the context alive
            self._engine.cuda.synchronize(self._stream)  # the next run writes to the buffers that it copies
            return
        counts.add("captures")
        graphs.add(key, graph, graph.size)

    def _new_graph(self, job: _Job) -> _Graph:
        cuda, outputs = self._engine.cuda, tuple(job.results)
        shapes = self._load(job)
        free = cuda.free_bytes()
        context, least_size = self._context_for_graph(job.sub_batch.profile)
        try:
            self._bind(context, shapes)
            # The work that a context does only in its first run of a shape cannot be captured.
            self._enqueue(context, shapes, outputs)
            cuda.synchronize(self._stream)
            handle = cuda.capture(self._stream, lambda: self._enqueue(context, shapes, outputs))
        except BaseException:
            self._engine.counts.add("contexts", -1)
            raise
        # Other threads and processes take memory too, so this is an estimate.
        return _Graph(handle, context, max(free - cuda.free_bytes(), least_size))

    def _context_for_graph(self, profile: int) -> tuple[Any, int]:
        """A context for a graph alone, new or of a graph that gave way, and the bytes that it is known to take."""
        former = self._graphs.make_room()
        if former is None:
            return self._create_context(profile), 0
        self._engine.cuda.release("cudaGraphExecDestroy", former.handle)
        try:
            self._choose_profile(former.context, profile)
        except BaseException:
            self._engine.counts.add("contexts", -1)
            raise
        return former.context, former.size

    def _enqueue(self, context: Any, shapes: Shapes, outputs: tuple[str, ...]) -> None:
        cuda, stream = self._engine.cuda, self._stream
        for name in self._engine.inputs:
            cuda.to_device(self._device[name].address, self._host[name].address, self._bytes(name, shapes), stream)
        _require(context.execute_async_v3(stream), "run the engine")
        for name in outputs:
            cuda.to_host(self._host[name].address, self._device[name].address, self._bytes(name, shapes), stream)

    def _context_for(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._engine.counts.add("preparations")
            self._contexts[profile] = self._create_context(profile)
        return self._contexts[profile]

    def _create_context(self, profile: int) -> Any:
        context = self._engine.create_context()
        size = self._engine.scratch_bytes
        self._scratch.reserve(max(1, size))
        context.set_device_memory(self._scratch.address, size)
        self._choose_profile(context, profile)
        self._engine.counts.add("contexts")
        self._engine.counts.add("contexts created")
        return context

    def _choose_profile(self, context: Any, profile: int) -> None:
        _require(context.set_optimization_profile_async(profile, self._stream), f"take profile {profile}")

    def _bind(self, context: Any, shapes: Shapes) -> None:
        for name, shape in shapes.items():
            if name in self._engine.inputs:
                _require(context.set_input_shape(name, shape), f"take {name} of shape {shape}")
            _require(context.set_tensor_address(name, self._device[name].address), f"take the buffer of {name}")

    def _drop_graphs(self) -> None:
        for graph in self._graphs.clear():
            self._engine.cuda.release("cudaGraphExecDestroy", graph.handle)
            self._engine.counts.add("contexts", -1)

    def _array(self, name: str, shapes: Shapes) -> NDArray[Any]:
        return self._host[name].array(shapes[name], self._engine.dtypes[name])

    def _bytes(self, name: str, shapes: Shapes) -> int:
        return math.prod(shapes[name]) * self._engine.dtypes[name].itemsize


def _run_in(slot: _Slot, jobs: Sequence[_Job]) -> None:
    """Run the parts of a batch.

    Raises:
        BackendError: TensorRT or CUDA failed.
    """
    try:
        for job in jobs:
            slot.run(job)
    except RuntimeError as error:  # TensorRT's own, and BackendError
        raise BackendError(f"TensorRT failed on a batch of {jobs[0].batch.input_ids.shape}: {error}") from error


def _free_dropped(cuda: Cuda, owned: list[Any], idle: list[_Slot]) -> None:
    """Free the engine, in the list `owned`, and the slots of a backend that nobody closed."""
    owned += idle
    idle.clear()
    release_outside_capture(lambda: _free(cuda, owned))


def _free(cuda: Cuda, owned: list[Any]) -> None:
    """Close slots and drop engines, the last first, and empty the list.

    TensorRT frees the memory of an engine or context with the last reference, so the list must hold that.
    """
    try:
        with cuda.use():
            while owned:
                item = owned.pop()
                if isinstance(item, _Slot):
                    item.close()
                del item
    except BackendError as error:
        logger.debug("the memory of an engine was not freed: %s", error)


def _require(done: bool, what: str) -> None:
    if not done:
        raise BackendError(f"TensorRT refused to {what}; its log says why")
