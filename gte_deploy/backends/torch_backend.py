"""PyTorch: in float32 the reference that every other backend is compared with, in bfloat16 padding-free on GPUs.

Shapes: B rows, S tokens, T tokens of all rows without padding, M masks, H hidden size, V vocabulary, L labels.
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
from gte_deploy.errors import BackendError, MissingDependencyError
from gte_deploy.quiet import keep_caches_in_ours
from gte_deploy.spec import ComputePrecision, ModelSpec, Task
from gte_deploy.threads import available_cpus
from gte_deploy.tokenization import TextTokenizer

logger = logging.getLogger(__name__)

_OUTPUTS: dict[str, tuple[str, ...]] = {
    "fill-mask": ("last_hidden_state", "logits"),
    "embed": ("last_hidden_state", "sentence_embedding"),
    "classify": ("last_hidden_state", "logits"),
    "token-classify": ("last_hidden_state", "logits"),
    "sparse": ("last_hidden_state", "sparse_embedding"),
}


class TorchBackend:
    """One of transformers' Gte modules in evaluation mode; `run` may be called from many threads at once."""

    name = "torch"

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        packed: bool | None = None,
        compile: bool = False,
    ) -> None:
        """Move `model` to `device`; it is in float32 or bfloat16.

        PyTorch's thread count belongs to the whole process. `num_threads` sets it; without it the count is left as it
        is, unless it is above the CPUs that the process may use: then it is lowered to them.

        `packed` computes no padding: the rows lie behind one another, and attention is of variable length. Its kernel
        is CUDA's for 16 bits, so that is the default; elsewhere attention goes row by row, and the answers are the
        same. `compile` compiles the encoder with torch.compile, for all shapes.

        Raises:
            BackendError: the device is not there.
        """
        import torch

        self.spec = spec
        self.device = device
        self.outputs = _OUTPUTS[spec.task]
        if spec.head_task == "fill-mask":  # a splade model's checkpoint fills masks, too
            self.outputs = tuple(dict.fromkeys((*self.outputs, "logits")))
        self.precision: ComputePrecision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        on_cuda = parse_device(device)[0] == "cuda"
        self._is_packed = on_cuda and self.precision == "bf16" if packed is None else packed
        if self._is_packed:
            from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention

            register_packed_attention()
            model.set_attn_implementation(PACKED_ATTENTION)
        self._model: Any = model.to(_torch_device(device)).eval()
        self._sparse: Any = None
        if spec.sparse is not None:
            from gte_deploy.models.sparse_heads import sparse_head

            self._sparse = sparse_head(self._model, spec.sparse)
        encoder = self._model if spec.task == "embed" else self._model.gte
        self._encoder: Any = torch.compile(encoder, dynamic=True) if compile else encoder
        self.num_threads = _set_threads(num_threads)
        self._is_forked = False

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        import torch

        model, encoder = self._model, self._encoder
        if model is None or encoder is None:
            raise BackendError("this model is closed; load it again")
        check_batch(batch, self.spec)
        check_outputs(outputs, self.outputs)
        if "logits" in outputs and self.spec.head_task == "fill-mask" and batch.mask_positions is None:
            raise BackendError("logits of a fill-mask model need mask_positions in the batch")
        compute = self._packed if self._is_packed else self._padded
        try:
            if self._is_forked and torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            with torch.inference_mode():
                tensors = compute(model, encoder, batch, outputs)
                return {name: tensors[name].float().cpu().numpy() for name in outputs}
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed on a batch of {batch.input_ids.shape}: {error}") from error

    def close(self) -> None:
        """See `Backend.close`."""
        self._model = self._encoder = self._sparse = None

    def compute_in_forked_process(self) -> None:
        """Go on in a child of the process that loaded the model, with one thread.

        OpenMP's threads did not survive the fork, and whoever shared work with them would wait for good. Compiled code
        has its number of threads in it, so the encoder is no longer compiled.
        """
        self._is_forked = True
        self.num_threads = 1
        if self._model is not None:
            self._encoder = self._model if self.spec.task == "embed" else self._model.gte

    def _padded(self, model: Any, encoder: Any, batch: Batch, outputs: Sequence[str]) -> dict[str, Any]:
        # A mask of ones says nothing, and scaled_dot_product_attention is faster and smaller without one.
        mask = None if batch.attention_mask.all() else self._tensor(batch.attention_mask)
        types = None if batch.token_type_ids is None else self._tensor(batch.token_type_ids)
        encoded = encoder(input_ids=self._tensor(batch.input_ids), attention_mask=mask, token_type_ids=types)
        hidden = encoded.last_hidden_state
        tensors = {"last_hidden_state": hidden}
        if "sentence_embedding" in outputs:
            tensors["sentence_embedding"] = self._projected(model, self._pooled(hidden, mask))
        if "sparse_embedding" in outputs:
            tensors["sparse_embedding"] = self._sparse_embedding(hidden, batch)
        if "logits" not in outputs:
            return tensors
        if self.spec.task == "classify":
            tensors["logits"] = model.classifier(encoded.pooler_output)
        elif self.spec.task == "token-classify":
            tensors["logits"] = model.classifier(hidden)
        else:
            assert batch.mask_positions is not None  # `run` has looked
            # Only these rows: the whole [S, V] product of one long text would take a gigabyte.
            tensors["logits"] = model.lm_head(hidden[batch.mask_positions[:, 0], batch.mask_positions[:, 1]])
        return tensors

    def _packed(self, model: Any, encoder: Any, batch: Batch, outputs: Sequence[str]) -> dict[str, Any]:
        """As `_padded`, over the T real tokens of all rows as one row; what stands at padding is 0."""
        import torch

        real = batch.attention_mask == 1
        rows, columns = (self._tensor(places) for places in np.nonzero(real))
        lengths = real.sum(axis=1)
        starts = np.concatenate(([0], lengths.cumsum()))
        types = batch.token_type_ids
        hidden = encoder(
            input_ids=self._tensor(batch.input_ids[real])[None],
            token_type_ids=None if types is None else self._tensor(types[real])[None],
            position_ids=columns[None],
            cu_seqlens=self._tensor(starts.astype(np.int32)),
            # A bound is enough, and few different ones are compiled for less often.
            max_seqlen=1 << int(lengths.max() - 1).bit_length(),
        ).last_hidden_state[0]

        def padded(values: Any) -> Any:
            out = values.new_zeros((*real.shape, values.shape[-1]))
            out[rows, columns] = values
            return out

        tensors = {}
        if "last_hidden_state" in outputs:
            tensors["last_hidden_state"] = padded(hidden)
        if "sentence_embedding" in outputs:
            if self.spec.pooling == "cls":
                pooled = hidden[starts[:-1]]
            else:
                pooled = torch.segment_reduce(hidden.float(), "mean", lengths=self._tensor(lengths))
            tensors["sentence_embedding"] = self._projected(model, pooled)
        if "sparse_embedding" in outputs:
            tensors["sparse_embedding"] = self._sparse_embedding(padded(hidden), batch)
        if "logits" not in outputs:
            return tensors
        if self.spec.task == "classify":
            tensors["logits"] = model.classifier(model.gte.pooler(hidden[starts[:-1], None]))
        elif self.spec.task == "token-classify":
            tensors["logits"] = padded(model.classifier(hidden))
        else:
            assert batch.mask_positions is not None  # `run` has looked
            row, column = batch.mask_positions.T
            tensors["logits"] = model.lm_head(hidden[starts[row] + real.cumsum(axis=1)[row, column] - 1])
        return tensors

    def _sparse_embedding(self, hidden: Any, batch: Batch) -> Any:
        return self._sparse(hidden, self._tensor(batch.attention_mask), self._tensor(batch.input_ids))

    def _pooled(self, hidden: Any, mask: Any) -> Any:
        if self.spec.pooling == "cls":
            return hidden[:, 0]
        if mask is None:
            return hidden.float().mean(dim=1)
        weights = mask[:, :, None]
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)

    def _projected(self, model: Any, pooled: Any) -> Any:
        projection = getattr(model, "sentence_projection", None)
        return pooled if projection is None else projection(pooled.to(model.dtype))

    def _tensor(self, array: NDArray[Any]) -> Any:
        import torch

        return torch.tensor(array, device=_torch_device(self.device))


def open_torch_backend(
    folder: Path,
    *,
    task: Task | None = None,
    device: str = "cpu",
    num_threads: int | None = None,
    precision: ComputePrecision = "fp32",
    compile: bool = False,
) -> tuple[TorchBackend, TextTokenizer]:
    """Load a checkpoint folder of either layout, for `task` or for what it was made for, and its tokenizer.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        CheckpointError, ConfigError: the folder cannot be honoured.
    """
    keep_caches_in_ours()
    for module in ("torch", "transformers"):
        _require(module)
    _torch_device(device)
    import torch

    from gte_deploy.models.checkpoint import load_model
    from gte_deploy.models.description import describe

    description = describe(folder, task=task or "auto")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(folder, task=description.task, dtype=dtype)
    backend = TorchBackend(model, description.spec, device=device, num_threads=num_threads, compile=compile)
    return backend, TextTokenizer(**description.tokenizer.parts())


def _require(module: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(module, "torch") from error
    except OSError as error:  # PyTorch looks for a folder for temporary files
        raise BackendError(f"{module} is installed and cannot be imported: {error}") from error


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
