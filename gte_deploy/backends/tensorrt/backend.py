"""Runs the engine of a bundle with TensorRT or TensorRT-RTX on an NVIDIA GPU.

An execution context serves one thread at a time. So each run borrows an execution slot: a stream with its own buffers
and contexts. With two slots one thread copies while another computes; more slots would only hold memory.
"""

import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_outputs, check_takes_types
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.padding_free import PaddingFreeLayout
from gte_deploy.backends.tensorrt.plan import open_plan
from gte_deploy.backends.tensorrt.shapes import PaddedLayout, SubBatch
from gte_deploy.bundle.manifest import Manifest, PlanEntry
from gte_deploy.core.errors import BackendError
from gte_deploy.core.spec import ModelSpec, Precision

logger = logging.getLogger(__name__)

_NUM_SLOTS = 2
# CUDA graphs that one slot keeps. Each graph keeps a context, which shares the slot's memory for activations.
KEPT_GRAPHS = 32
REMEMBERED_SHAPES = 1024
# Data type in the manifest -> numpy's type in memory. numpy has no bfloat16; it is the upper half of a float32.
_NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
}

Shapes = dict[str, tuple[int, ...]]


class TensorRTBackend:
    """One engine; `run` may be called from many threads at once."""

    name = "tensorrt"
    num_threads = 1

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
        self._engine: _Engine | None = _Engine(engine, plan, trt, cuda)
        self._returned = threading.Condition()
        self._idle: list[_Slot] = []
        self._num_slots = 0
        # For models that nobody closed. At the end of the interpreter the driver frees everything itself.
        weakref.finalize(self, _close_slots, self._idle).atexit = False

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`.

        A batch is padded to a profile, or packed for a padding-free engine. A batch with more rows or masks than a
        profile takes is split into sub-batches.
        """
        engine = self._engine
        if engine is None:
            raise BackendError("this model is closed; load it again")
        check_outputs(outputs, self.outputs)
        check_batch(batch, self.spec)
        sub_batches = list(engine.layout.split(batch, engine.plan.profiles, engine.masks))
        results = engine.layout.results(batch, outputs)
        with self._borrowed_slot(engine) as slot:
            try:
                for sub_batch in sub_batches:
                    slot.run(batch, sub_batch, results, pad_token_id=self.spec.pad_token_id)
            except RuntimeError as error:  # TensorRT's own, and BackendError
                raise BackendError(f"TensorRT failed on a batch of {batch.input_ids.shape}: {error}") from error
        return results

    def close(self) -> None:
        """See `Backend.close`. Runs in progress finish."""
        with self._returned:
            self._engine = None
            idle = self._idle[:]
            self._idle.clear()
            self._returned.notify_all()
        _close_slots(idle)

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
            engine.cuda.use()
            slot = slot or _Slot(engine)
            yield slot
            sound = True
        finally:
            with self._returned:
                keep = sound and self._engine is not None
                if keep and slot is not None:
                    self._idle.append(slot)
                else:
                    self._num_slots -= 1
                self._returned.notify()
            if slot is not None and not keep:
                slot.close()


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
    trt, cuda, engine = open_plan(folder, plan, manifest.files[plan.path], device)
    return TensorRTBackend(engine, plan, manifest.spec, trt=trt, cuda=cuda, device=device, precision=manifest.precision)


class _Engine:
    """An engine, and the facts about it that its execution slots need."""

    def __init__(self, engine: Any, plan: PlanEntry, trt: Any, cuda: Cuda) -> None:
        self.plan = plan
        self.cuda = cuda
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
        # TensorRT-RTX compiles kernels for a shape while other runs use it, and captures CUDA graphs itself.
        self.is_rtx = plan.variant == "tensorrt-rtx"
        self.is_captured = not self.is_rtx
        self._engine = engine
        self._trt = trt

    @property
    def scratch_bytes(self) -> int:
        """Bytes that a context needs for the activations of any profile."""
        return int(self._engine.device_memory_size_v2)

    def create_context(self) -> Any:
        """A context without memory for its activations."""
        strategy: Any = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.is_rtx:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            strategy = config
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BackendError("TensorRT could not create an execution context; its log says why")
        return context


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
        # A graph depends on the state of its context, and is undefined once the context runs another shape. So each
        # graph has its own context.
        self._graphs: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()

    def run(
        self, batch: Batch, sub_batch: SubBatch, results: Mapping[str, NDArray[np.float32]], *, pad_token_id: int
    ) -> None:
        """Compute a sub-batch and write its rows into `results`."""
        engine = self._engine
        shapes = engine.layout.shapes(sub_batch.shape, sub_batch.num_masks)
        self._reserve(shapes, results)
        inputs = {name: self._array(name, shapes) for name in engine.inputs}
        engine.layout.write(batch, sub_batch, inputs, pad_token_id=pad_token_id)
        self._compute(sub_batch.profile, shapes, tuple(results))
        for name, result in results.items():
            values = self._array(name, shapes)
            if values.dtype == np.uint16:  # bfloat16
                values = (values.astype(np.uint32) << 16).view(np.float32)
            engine.layout.place(name, values, sub_batch, result)

    def close(self) -> None:
        """Free everything on the GPU."""
        self._drop_graphs()
        self._contexts.clear()
        for memory in (self._scratch, *self._device.values(), *self._host.values()):
            memory.close()
        self._engine.cuda.release("cudaStreamDestroy", self._stream)

    def _reserve(self, shapes: Shapes, results: Mapping[str, Any]) -> None:
        moved = False
        for name in shapes:
            size = max(1, self._bytes(name, shapes))
            moved |= self._device[name].reserve(size)
            if name in self._engine.inputs or name in results:
                moved |= self._host[name].reserve(size)
        if moved:
            self._drop_graphs()

    def _compute(self, profile: int, shapes: Shapes, outputs: tuple[str, ...]) -> None:
        """Run the engine from the input buffers of the host to its output buffers."""
        key = (profile, tuple(shapes.values()), outputs)
        cuda, stream = self._engine.cuda, self._stream
        if key in self._graphs:
            self._graphs.move_to_end(key)
            cuda.launch(self._graphs[key][0], stream)
            cuda.synchronize(stream)
            return
        is_repeated = self._engine.is_captured and self._was_seen(key)
        if profile not in self._contexts and not is_repeated:
            self._contexts[profile] = self._create_context(profile)
        context = self._create_context(profile) if is_repeated else self._contexts[profile]
        self._bind(context, shapes)
        self._enqueue(context, shapes, outputs)
        cuda.synchronize(stream)
        if is_repeated:  # after the run: the work that a context does only in its first run cannot be captured
            self._capture(key, context, shapes, outputs)

    def _capture(self, key: Any, context: Any, shapes: Shapes, outputs: tuple[str, ...]) -> None:
        try:
            graph = self._engine.cuda.capture(self._stream, lambda: self._enqueue(context, shapes, outputs))
        except BackendError as error:
            logger.warning("running this engine without CUDA graphs: %s", error)
            self._engine.is_captured = False
            return
        if len(self._graphs) == KEPT_GRAPHS:
            self._release_graph(self._graphs.popitem(last=False)[1])
        self._graphs[key] = graph, context

    def _enqueue(self, context: Any, shapes: Shapes, outputs: tuple[str, ...]) -> None:
        cuda, stream = self._engine.cuda, self._stream
        for name in self._engine.inputs:
            cuda.to_device(self._device[name].address, self._host[name].address, self._bytes(name, shapes), stream)
        _require(context.execute_async_v3(stream), "run the engine")
        for name in outputs:
            cuda.to_host(self._host[name].address, self._device[name].address, self._bytes(name, shapes), stream)

    def _create_context(self, profile: int) -> Any:
        context = self._engine.create_context()
        size = self._engine.scratch_bytes
        self._scratch.reserve(max(1, size))
        context.set_device_memory(self._scratch.address, size)
        _require(context.set_optimization_profile_async(profile, self._stream), f"take profile {profile}")
        return context

    def _bind(self, context: Any, shapes: Shapes) -> None:
        for name, shape in shapes.items():
            if name in self._engine.inputs:
                _require(context.set_input_shape(name, shape), f"take {name} of shape {shape}")
            _require(context.set_tensor_address(name, self._device[name].address), f"take the buffer of {name}")

    def _was_seen(self, key: Any) -> bool:
        seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED_SHAPES:
            self._seen.popitem(last=False)
        return seen

    def _drop_graphs(self) -> None:
        while self._graphs:
            self._release_graph(self._graphs.popitem()[1])

    def _release_graph(self, entry: tuple[Any, Any]) -> None:
        self._engine.cuda.release("cudaGraphExecDestroy", entry[0])

    def _array(self, name: str, shapes: Shapes) -> NDArray[Any]:
        return self._host[name].array(shapes[name], self._engine.dtypes[name])

    def _bytes(self, name: str, shapes: Shapes) -> int:
        return math.prod(shapes[name]) * self._engine.dtypes[name].itemsize


def _close_slots(slots: Sequence[_Slot]) -> None:
    for slot in slots:
        slot.close()


def _require(done: bool, what: str) -> None:
    if not done:
        raise BackendError(f"TensorRT refused to {what}; its log says why")
