"""The compared ways to run the model on a GPU: ours and others.

As in `side_by_side.contestants`, an object lives in a process of its own and has `embed` [B, H], `token_embeddings`
[T, H] and `mask_logits` [M, V], as far as its interface gives them. Each takes one padded batch of ids in host memory
and returns float32 in host memory: a server pays for the copies too. `device` is "cuda", or "cpu" to try the benchmark
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from side_by_side import contestants
from side_by_side.workloads import Job

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import Pooling

Array = NDArray[np.float32]


class Torch:
    """transformers' own classes with SDPA, eager or through torch.compile."""

    def __init__(self, checkpoint: Path, device: str, dtype: str = "float32", compile: bool = False) -> None:
        import torch

        from gte_deploy.models.checkpoint import load_model
        from gte_deploy.models.config import task_of

        model: Any = load_model(checkpoint, task=task_of(checkpoint)).eval()
        self._model: Any = model.to(device, getattr(torch, dtype))
        self._encoder = torch.compile(self._model.base_model) if compile else self._model.base_model
        self._device = device

    def embed(self, job: Job) -> Array:
        import torch

        with torch.inference_mode():
            hidden, weights = self._encode(job).float(), self._tensor(job.attention_mask).float()
            pooled = (hidden * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
            return pooled.cpu().numpy()

    def first_tokens(self, job: Job) -> Array:
        import torch

        with torch.inference_mode():
            return self._encode(job)[:, 0].float().cpu().numpy()

    def token_embeddings(self, job: Job) -> Array:
        import torch

        with torch.inference_mode():
            return self._encode(job)[self._tensor(job.attention_mask) == 1].float().cpu().numpy()

    def mask_logits(self, job: Job) -> Array:
        import torch

        assert job.mask_positions is not None  # a masked job has them
        rows, tokens = self._tensor(job.mask_positions).unbind(1)
        with torch.inference_mode():
            return self._model.lm_head(self._encode(job)[rows, tokens]).float().cpu().numpy()

    def _encode(self, job: Job) -> Any:
        # A mask of ones has no effect, but keeps SDPA from using its flash kernel.
        mask = None if job.attention_mask.all() else self._tensor(job.attention_mask)
        return self._encoder(input_ids=self._tensor(job.input_ids), attention_mask=mask)[0]

    def _tensor(self, array: NDArray[np.int64]) -> Any:
        import torch

        return torch.from_numpy(array).to(self._device)


class OnnxRuntime(contestants.OnnxRuntime):
    """A bare session with default options on the traced graph, without our fusions."""

    def __init__(self, folder: Path, device: str) -> None:
        import onnxruntime as ort

        provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
        self._session = ort.InferenceSession(folder / "model.onnx", providers=[provider])
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"ONNX Runtime has no {provider} here: pip install '.[gpu]'")
        self._inputs = {value.name for value in self._session.get_inputs()}


class GteDeploy:
    """gte_deploy.load on a bundle or checkpoint."""

    def __init__(self, folder: Path, device: str, backend: str, **options: Any) -> None:
        import gte_deploy

        path = folder / "bundle" if (folder / "bundle").is_dir() else folder
        self._model = gte_deploy.load(path, backend=backend, device=device, **options)  # type: ignore[arg-type]

    def embed(self, job: Job) -> Array:
        return self._run(job, "sentence_embedding")

    def token_embeddings(self, job: Job) -> Array:
        return self._run(job, "last_hidden_state")[job.attention_mask == 1]

    def mask_logits(self, job: Job) -> Array:
        return self._run(job, "logits")

    def _run(self, job: Job, output: str) -> Array:
        # Not public: runs the batch as it is; `encode` would plan its own batches.
        batch = Batch(job.input_ids, job.attention_mask, job.mask_positions)
        return self._model._backend.run(batch, (output,))[output]


@dataclass(frozen=True)
class Contestant:
    """One row of the result.

    Args:
        name: the name in the tables.
        precision: the precision of its weights.
        factory: the class of the object that runs it.
        artefact: the name of its model, see `side_by_side.artefacts.Artefacts.path`.
        options: further arguments of `factory`.
        pooling: how `embed` pools.
        gives_states: whether it has `token_embeddings`.
    """

    name: str
    precision: str
    factory: type
    artefact: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pooling: Pooling = "mean"
    gives_states: bool = True

    @property
    def right_answer(self) -> str:
        """The method of contestant EXACT that gives what `embed` of this one should give."""
        return "embed" if self.pooling == "mean" else "first_tokens"

    @property
    def is_ours(self) -> bool:
        """Whether the contestant is gte-deploy."""
        return self.factory is GteDeploy


EXACT = "torch eager fp32"
"""The contestant whose answers are the right ones."""
REFERENCE = "torch eager fp16"
"""The contestant whose speed is 1."""

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_PACKED = {"backend": "torch", "precision": "bf16"}

CONTESTANTS = (
    *(
        Contestant(f"torch eager {name}", name, Torch, "checkpoint", {"dtype": dtype})
        for name, dtype in _DTYPES.items()
    ),
    *(
        Contestant(f"torch.compile {name}", name, Torch, "checkpoint", {"dtype": _DTYPES[name], "compile": True})
        for name in ("fp16", "bf16")
    ),
    Contestant("gte-deploy torch packed bf16", "bf16", GteDeploy, "checkpoint", _PACKED),
    Contestant("gte-deploy torch packed compiled bf16", "bf16", GteDeploy, "checkpoint", {**_PACKED, "compile": True}),
    Contestant("ORT CUDA plain graph", "fp32", OnnxRuntime, "plain"),
    *(
        Contestant(f"gte-deploy ORT CUDA {name}", name, GteDeploy, f"bundle-cuda-{name}", {"backend": "onnx"})
        for name in ("fp32", "fp16", "bf16")
    ),
    Contestant("gte-deploy ORT CUDA fp16 padded", "fp16", GteDeploy, "bundle-cuda-fp16-padded", {"backend": "onnx"}),
    Contestant("gte-deploy ORT CUDA fp16 CLS", "fp16", GteDeploy, "bundle-cuda-fp16-cls", {"backend": "onnx"}, "cls"),
    *(
        Contestant(
            f"gte-deploy TensorRT fp16 CLS{title}",
            "fp16",
            GteDeploy,
            f"bundle-tensorrt-fp16-cls{suffix}",
            {"backend": "tensorrt"},
            "cls",
            gives_states=not suffix,
        )
        for title, suffix in (("", ""), (", answer alone", "-answer"))
    ),
    Contestant("gte-deploy ORT TensorRT fp16", "fp16", GteDeploy, "bundle-onnx-only-fp16", {"backend": "onnx"}),
    *(
        Contestant(f"gte-deploy {title} {name}", name, GteDeploy, f"bundle-{kind}-{name}", {"backend": "tensorrt"})
        for title, kind in (("TensorRT", "tensorrt"), ("TensorRT-RTX", "rtx"))
        for name in ("fp16", "bf16", "int8", "fp8")
    ),
)
