"""Runs a checkpoint with PyTorch.

In float32 it is the reference for every other backend. In bfloat16 on a GPU it computes no padding.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_outputs
from gte_deploy.backends.devices import parse_device
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import BackendError, ConfigError, MissingDependencyError
from gte_deploy.core.quiet import keep_caches_in_ours
from gte_deploy.core.spec import ComputePrecision, ModelSpec, TaskName
from gte_deploy.tasks.base import HIDDEN
from gte_deploy.text.tokenization import TextTokenizer

if TYPE_CHECKING:
    from gte_deploy.models.heads import Head, States

logger = logging.getLogger(__name__)


class TorchBackend:
    """A model of transformers in evaluation mode. Many threads may call `run` at once."""

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
        """Move `model`, which is in float32 or bfloat16, to `device`.

        PyTorch has one thread count for the whole process. `num_threads` sets it. Without `num_threads` the count
        stays, unless it is above the number of CPUs that the process may use: then it becomes that number.

        With `packed`, no padding is computed: the rows follow one another, and attention has variable lengths. CUDA has
        a kernel for that in 16 bits, so it is the default there. Elsewhere attention runs row by row, with the same
        answers. Models with biased scores (ALiBi) always run padded, and so do multi-vector models that score tokens
        without attention. `compile` compiles the encoder with torch.compile, for all shapes.

        Raises:
            BackendError: the device is missing.
            ConfigError: `packed` is True, and the model's family has no attention without padding, or the model scores
                tokens without attention.
        """
        import torch

        self.spec = spec
        self.device = device
        self.precision: ComputePrecision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        self._is_packed = self._packs(model, packed)
        if self._is_packed:
            from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention

            register_packed_attention()
            model.set_attn_implementation(PACKED_ATTENTION)
        self._model: Any = model.to(_torch_device(device)).eval()
        self._heads = _heads(self._model, spec)
        self.outputs: tuple[str, ...] = (HIDDEN, *self._heads)
        encoder = self._model.base_model
        self._encoder: Any = torch.compile(encoder, dynamic=True) if compile else encoder
        self.num_threads = _set_threads(num_threads)
        self._is_forked = False

    def _packs(self, model: Any, asked: bool | None) -> bool:
        """Whether to run without padding: as asked, or where it is faster."""
        from gte_deploy.models.families import family_of

        family = family_of(model.config)
        if asked and not family.runs_packed:
            raise ConfigError(
                f"models of model_type {model.config.model_type!r} have {family.positions} positions, which attention "
                "without padding does not compute. Leave out `packed`."
            )
        if self.spec.multi_vector is not None and self.spec.multi_vector.scores_unattended:
            if asked:
                raise ConfigError(
                    "this model scores the tokens that lengthen queries, to which no token attends: they are computed "
                    "as padding is. Leave out `packed`."
                )
            return False
        is_faster = parse_device(self.device)[0] == "cuda" and self.precision == "bf16"
        return is_faster and family.runs_packed if asked is None else asked

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        import torch

        heads, encoder = self._heads, self._encoder
        if encoder is None:
            raise BackendError("this model is closed; load it again")
        check_batch(batch, self.spec)
        check_outputs(outputs, self.outputs)
        if "logits" in outputs and self.spec.head_task == "fill-mask" and batch.mask_positions is None:
            raise BackendError("logits of a fill-mask model need mask_positions in the batch")
        try:
            if self._is_forked and torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            with torch.inference_mode():
                states = self._states(encoder, batch)
                tensors = {name: heads[name](states) for name in outputs if name in heads}
                if HIDDEN in outputs:
                    tensors[HIDDEN] = states.padded(states.hidden)
                return {name: tensors[name].float().cpu().numpy() for name in outputs}
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed on a batch of {batch.input_ids.shape}: {error}") from error

    def close(self) -> None:
        """See `Backend.close`."""
        self._model = self._encoder = None
        self._heads = {}

    def compute_in_forked_process(self) -> None:
        """Continue in a forked child of the process that loaded the model, with one thread.

        OpenMP's threads did not survive the fork, and code that waits for them would wait for ever. Compiled code has
        a fixed number of threads, so the encoder is no longer compiled.
        """
        self._is_forked = True
        self.num_threads = 1
        if self._model is not None:
            self._encoder = self._model.base_model

    def _states(self, encoder: Any, batch: Batch) -> "States":
        from gte_deploy.models.heads import encode_packed, encode_padded

        encode = encode_packed if self._is_packed else encode_padded
        return encode(encoder, batch, _torch_device(self.device))


def _heads(model: Any, spec: ModelSpec) -> "dict[str, Head]":
    """Output -> its head. A splade model can also fill masks."""
    from gte_deploy.models.heads import HeadOptions, make_heads

    heads = make_heads(model, HeadOptions.of(spec))
    if spec.task == "sparse" and spec.head_task == "fill-mask":
        heads += make_heads(model, HeadOptions("fill-mask"))
    return {head.output: head for head in heads}


def open_torch_backend(
    folder: Path,
    *,
    task: TaskName | None = None,
    device: str = "cpu",
    num_threads: int | None = None,
    precision: ComputePrecision = "fp32",
    compile: bool = False,
) -> tuple[TorchBackend, TextTokenizer]:
    """Load a checkpoint folder of either layout and its tokenizer, for `task` or the checkpoint's own task.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        CheckpointError, ConfigError: the folder cannot be read, or asks for something unsupported.
    """
    keep_caches_in_ours()
    for module in ("torch", "transformers"):
        _require(module)
    _torch_device(device)
    import torch

    from gte_deploy.models.checkpoint import load_described
    from gte_deploy.models.description import describe

    description = describe(folder, task=task or "auto")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_described(description, dtype=dtype)
    backend = TorchBackend(model, description.spec, device=device, num_threads=num_threads, compile=compile)
    return backend, TextTokenizer(**description.tokenizer.parts())


def _require(module: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(module, "torch") from error
    except OSError as error:  # PyTorch found no folder for temporary files
        raise BackendError(f"{module} is installed and cannot be imported: {error}") from error


def _torch_device(device: str) -> Any:
    import torch

    kind, index = parse_device(device)
    if kind == "cpu":
        return torch.device("cpu")
    if index >= (count := torch.cuda.device_count()):
        raise BackendError(f"device {device!r} does not exist: PyTorch sees {count} CUDA devices. Pass device='cpu'.")
    return torch.device("cuda", index)


def _set_threads(num_threads: int | None) -> int:
    import torch

    wanted = num_threads or min(torch.get_num_threads(), available_cpus())
    if wanted != torch.get_num_threads():
        logger.info("setting PyTorch's thread count of this process to %d", wanted)
        torch.set_num_threads(wanted)
    return wanted
