"""PyTorch in float32: the reference that every other backend is compared with.

Shapes: B rows, S tokens, M masks, H hidden size, V vocabulary, L labels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_outputs
from gte_deploy.backends.devices import parse_device
from gte_deploy.checkpoint_spec import spec_from_checkpoint
from gte_deploy.errors import BackendError, MissingDependencyError
from gte_deploy.spec import ComputePrecision, ModelSpec
from gte_deploy.threads import available_cpus

logger = logging.getLogger(__name__)

_OUTPUTS: dict[str, tuple[str, ...]] = {
    "fill-mask": ("last_hidden_state", "logits"),
    "embed": ("last_hidden_state", "sentence_embedding"),
    "classify": ("last_hidden_state", "logits"),
    "token-classify": ("last_hidden_state", "logits"),
}


class TorchBackend:
    """One of transformers' Gte modules in evaluation mode; `run` may be called from many threads at once."""

    name = "torch"
    precision: ComputePrecision = "fp32"

    def __init__(self, model: Any, spec: ModelSpec, *, device: str = "cpu", num_threads: int | None = None) -> None:
        """Move `model` to `device`.

        PyTorch's thread count belongs to the whole process. `num_threads` sets it; without it the count is left as it
        is, unless it is above the CPUs that the process may use: then it is lowered to them.

        Raises:
            BackendError: the device is not there.
        """
        self.spec = spec
        self.device = device
        self.outputs = _OUTPUTS[spec.task]
        self._model: Any = model.to(_torch_device(device)).eval()
        self.num_threads = _set_threads(num_threads)

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        import torch

        model = self._model
        if model is None:
            raise BackendError("this model is closed; load it again")
        check_batch(batch, self.spec)
        check_outputs(outputs, self.outputs)
        try:
            with torch.inference_mode():
                tensors = self._compute(model, batch, outputs)
                return {name: tensors[name].float().cpu().numpy() for name in outputs}
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed on a batch of {batch.input_ids.shape}: {error}") from error

    def close(self) -> None:
        """See `Backend.close`."""
        self._model = None

    def _compute(self, model: Any, batch: Batch, outputs: Sequence[str]) -> dict[str, Any]:
        import torch

        encoder = model if self.spec.task == "embed" else model.gte
        device = _torch_device(self.device)
        # A mask of ones says nothing, and scaled_dot_product_attention is faster and smaller without one.
        mask = None if batch.attention_mask.all() else torch.tensor(batch.attention_mask, device=device)
        encoded = encoder(input_ids=torch.tensor(batch.input_ids, device=device), attention_mask=mask)
        tensors = {"last_hidden_state": encoded.last_hidden_state}
        if "sentence_embedding" in outputs:
            tensors["sentence_embedding"] = self._pooled(encoded.last_hidden_state, mask)
        if "logits" in outputs:
            tensors["logits"] = self._logits(model, encoded, batch)
        return tensors

    def _pooled(self, hidden: Any, mask: Any) -> Any:
        if self.spec.pooling == "cls":
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(dim=1)
        weights = mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def _logits(self, model: Any, encoded: Any, batch: Batch) -> Any:
        hidden = encoded.last_hidden_state
        if self.spec.task == "classify":
            return model.classifier(encoded.pooler_output)
        if self.spec.task == "token-classify":
            return model.classifier(hidden)
        if batch.mask_positions is None:
            raise BackendError("logits of a fill-mask model need mask_positions in the batch")
        # Only these rows: the whole [S, V] product of one long text would take a gigabyte.
        rows, tokens = batch.mask_positions[:, 0], batch.mask_positions[:, 1]
        return model.lm_head(hidden[rows, tokens])


def open_torch_backend(folder: Path, *, device: str = "cpu", num_threads: int | None = None) -> TorchBackend:
    """Load a checkpoint folder of either layout.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        CheckpointError, ConfigError: the folder cannot be honoured.
    """
    for module in ("torch", "transformers"):
        _require(module)
    _torch_device(device)
    from gte_deploy.models.checkpoint import load_model
    from gte_deploy.models.config import task_of

    task = task_of(folder)
    model = load_model(folder, task=task)
    return TorchBackend(model, spec_from_checkpoint(folder, model.config, task), device=device, num_threads=num_threads)


def _require(module: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(module, "torch") from error


def _torch_device(device: str) -> Any:
    import torch

    kind, index = parse_device(device)
    if kind == "cpu":
        return torch.device("cpu")
    if index >= (count := torch.cuda.device_count()):
        raise BackendError(f"device {device!r} is not there: PyTorch sees {count} CUDA devices. Pass device='cpu'.")
    return torch.device("cuda", index)


def _set_threads(num_threads: int | None) -> int:
    import torch

    wanted = num_threads or min(torch.get_num_threads(), available_cpus())
    if wanted != torch.get_num_threads():
        logger.info("setting PyTorch's thread count of this process to %d", wanted)
        torch.set_num_threads(wanted)
    return wanted
