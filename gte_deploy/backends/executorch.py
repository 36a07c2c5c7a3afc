"""Runs the program of a bundle with ExecuTorch on the CPU, for trying on a computer what runs on a device."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_graph_inputs, check_outputs
from gte_deploy.backends.devices import parse_device
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import BackendError, MissingDependencyError
from gte_deploy.core.spec import ComputePrecision, ModelSpec, TensorSpec

_METHOD = "forward"
# One thread pool serves all programs of the process, and a program is not made for several threads.
_RUNNING = threading.Lock()


class ExecuTorchBackend:
    """A loaded program. Many threads may call `run`; the process computes one batch at a time."""

    name = "executorch"

    def __init__(
        self,
        program: Path,
        spec: ModelSpec,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: str = "cpu",
        num_threads: int | None = None,
        precision: ComputePrecision = "fp32",
    ) -> None:
        """Load a .pte file.

        `inputs` and `outputs` are those of the program in its order; it has no names itself. `num_threads` is for all
        programs of the process; the default is every CPU that this process may use.

        Raises:
            MissingDependencyError: executorch is not installed.
            BackendError: the device is not the CPU, or ExecuTorch refuses the program.
        """
        if parse_device(device)[0] != "cpu":
            raise BackendError(f"the executorch backend runs only on device 'cpu', not on {device!r}")
        self.spec = spec
        self.device = device
        self.precision: ComputePrecision = precision
        self.num_threads = num_threads or available_cpus()
        self.outputs = tuple(tensor.name for tensor in outputs)
        self._inputs = tuple(tensor.name for tensor in inputs)
        check_graph_inputs(program, self._inputs, spec)
        with _RUNNING:
            self._method: Any = _load(program, self.num_threads)
        sizes = {name: self._size(number) for number, name in enumerate(self._inputs)}
        self._max_batch, longest = sizes["input_ids"]
        self._max_masks = sizes.get("mask_positions", (1, 2))[0]
        if longest < spec.max_length:
            raise BackendError(
                f"{program} takes {longest:,} tokens, and its model {spec.max_length:,}. Export the bundle again."
            )

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        check_outputs(outputs, self.outputs)
        check_batch(batch, self.spec)
        with _RUNNING:
            if self._method is None:
                raise BackendError("this model is closed; load it again")
            parts = [self._run_part(part) for part in _in_rows(batch, self._max_batch)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in outputs}
        if "logits" in found and batch.mask_positions is not None and len(batch.mask_positions):
            found["logits"] = _in_order(found["logits"], batch.mask_positions, self._max_batch)
        return found

    def close(self) -> None:
        """See `Backend.close`."""
        with _RUNNING:
            self._method = None

    def _size(self, number: int) -> Sequence[int]:
        """The largest shape of an input."""
        return self._method.metadata.input_tensor_meta(number).sizes()

    def _run_part(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """Run as many rows as the program takes, with all of their masks."""
        positions = batch.mask_positions
        if "mask_positions" not in self._inputs:
            return self._execute(batch)
        if positions is None or not len(positions):  # the program has at least one mask
            found = self._execute(_with_masks(batch, np.zeros((1, 2), np.int64)))
            return {**found, "logits": found["logits"][:0]}
        runs = [
            self._execute(_with_masks(batch, positions[first : first + self._max_masks]))
            for first in range(0, len(positions), self._max_masks)
        ]
        return {**runs[0], "logits": np.concatenate([run["logits"] for run in runs])}

    def _execute(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        import torch

        arrays = batch.graph_inputs(self._inputs).values()
        try:
            results = self._method.execute([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays])
        except RuntimeError as error:
            raise BackendError(f"ExecuTorch failed on a batch of {batch.input_ids.shape}: {error}") from error
        return dict(zip(self.outputs, (result.numpy() for result in results), strict=True))


def _load(program: Path, num_threads: int) -> Any:
    try:
        from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingDependencyError("executorch", "executorch") from error
    if portable_lib._threadpool_get_thread_count() != num_threads:
        portable_lib._unsafe_reset_threadpool(num_threads)
    try:
        return Runtime.get().load_program(program).load_method(_METHOD)
    except (RuntimeError, KeyError) as error:
        raise BackendError(f"ExecuTorch cannot open {program}: {error}. Export the bundle again.") from error


def _in_rows(batch: Batch, most: int) -> Iterator[Batch]:
    """Split a batch into batches of at most `most` rows, with the masks of each in the caller's order."""
    positions, types = batch.mask_positions, batch.token_type_ids
    for first in range(0, len(batch.input_ids), most):
        rows = slice(first, first + most)
        own = None
        if positions is not None:
            own = positions[positions[:, 0] // most == first // most] - np.array([first, 0])
        yield Batch(batch.input_ids[rows], batch.attention_mask[rows], own, None if types is None else types[rows])


def _in_order(logits: NDArray[np.float32], positions: NDArray[np.int64], most: int) -> NDArray[np.float32]:
    """Put the logits [M, V] of split rows into the order of `positions`."""
    ordered = np.empty_like(logits)
    ordered[np.argsort(positions[:, 0] // most, kind="stable")] = logits
    return ordered


def _with_masks(batch: Batch, positions: NDArray[np.int64]) -> Batch:
    return Batch(batch.input_ids, batch.attention_mask, positions, batch.token_type_ids)
