"""The compared ways to run the model, ours and the peers', each used as its own documentation says.

A contestant lives in a process of its own, which imports its libraries. `embed` returns sentence embeddings [B, H]
float32, mean pooled and not normalised; `token_embeddings` the hidden states of the real tokens [T, H], row after row;
`mask_logits` the logits [M, V] at the job's mask positions. A class lacks methods that its interface does not allow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from side_by_side.machine import kernel_of
from side_by_side.peers import Infinity, OptimumIntel, SentenceTransformersBackend
from side_by_side.workloads import Job, Workload, is_list

Array = NDArray[np.float32]

_BATCH = 32  # sentence-transformers' default


def _in_batches(contestant: Any, job: Job) -> Array:
    """Embed a list as a script would that takes batches of it, which are tokenised already."""
    return np.concatenate([contestant.embed(part) for part in job.batches(_BATCH)])


class Torch:
    """transformers' own classes, eager with SDPA, in float32 or bfloat16, or through torch.compile."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str = "float32", compile: bool = False) -> None:
        import torch

        from gte_deploy.models.checkpoint import load_model
        from gte_deploy.models.config import task_of

        torch.set_num_threads(threads)
        self._model: Any = load_model(checkpoint, task=task_of(checkpoint)).eval().to(getattr(torch, dtype))
        self._encoder = torch.compile(self._model.base_model) if compile else self._model.base_model

    def embed(self, job: Job) -> Array:
        hidden = self._hidden(job)
        return mean_pooled(hidden, job.attention_mask)

    embed_list = _in_batches

    def token_embeddings(self, job: Job) -> Array:
        return self._hidden(job)[job.attention_mask == 1]

    def mask_logits(self, job: Job) -> Array:
        import torch

        rows, tokens = torch.from_numpy(job.mask_positions).unbind(1)
        with torch.inference_mode():
            hidden = self._encode(job)
            return self._model.lm_head(hidden[rows, tokens]).float().numpy()

    def _hidden(self, job: Job) -> Array:
        import torch

        with torch.inference_mode():
            return self._encode(job).float().numpy()

    def _encode(self, job: Job) -> Any:
        import torch

        ids, mask = torch.from_numpy(job.input_ids), torch.from_numpy(job.attention_mask)
        return self._encoder(input_ids=ids, attention_mask=mask)[0]


class OnnxRuntime:
    """A bare session with default options."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name for value in self._session.get_inputs()}

    def embed(self, job: Job) -> Array:
        return self._run(job, "sentence_embedding")

    embed_list = _in_batches

    def token_embeddings(self, job: Job) -> Array:
        return self._run(job, "last_hidden_state")[job.attention_mask == 1]

    def mask_logits(self, job: Job) -> Array:
        return self._run(job, "logits")

    def _run(self, job: Job, output: str) -> Array:
        return self._session.run([output], _feed(job, self._inputs))[0]


class OpenVino:
    """A compiled model on OpenVINO's CPU plugin, hinted for latency."""

    def __init__(self, folder: Path, threads: int, precision: str = "f32") -> None:
        from gte_deploy.core.quiet import import_openvino

        openvino = import_openvino()

        file = next(folder / name for name in ("model.xml", "model.onnx") if (folder / name).is_file())
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        compiled = openvino.Core().compile_model(str(file), "CPU", hints)
        self._inputs = {value.any_name for value in compiled.inputs}
        self._request = compiled.create_infer_request()

    def embed(self, job: Job) -> Array:
        return self._run(job, "sentence_embedding")

    embed_list = _in_batches

    def token_embeddings(self, job: Job) -> Array:
        return self._run(job, "last_hidden_state")[job.attention_mask == 1]

    def mask_logits(self, job: Job) -> Array:
        return self._run(job, "logits")

    def _run(self, job: Job, output: str) -> Array:
        results = self._request.infer(_feed(job, self._inputs), share_inputs=True)
        return np.array(results[output], dtype=np.float32)


class SentenceTransformers:
    """SentenceTransformer.encode on its torch backend."""

    def __init__(self, checkpoint: Path, threads: int, batch_size: int = _BATCH) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._batch_size = batch_size
        self._model = SentenceTransformer(str(checkpoint), device="cpu", local_files_only=True)

    def embed(self, job: Job) -> Array:
        return self._model.encode(job.texts, batch_size=self._batch_size, show_progress_bar=False)

    def token_embeddings(self, job: Job) -> Array:
        rows = self._model.encode(job.texts, output_value="token_embeddings", show_progress_bar=False)
        return np.concatenate([row.numpy() for row in rows])


class FastEmbed:
    """fastembed.TextEmbedding with the exported graph as a custom model."""

    def __init__(self, folder: Path, threads: int) -> None:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        bundle = folder / "bundle"
        more = [str(file.relative_to(bundle)) for file in (bundle / "onnx").glob("*.data")]
        TextEmbedding.add_custom_model(
            model="local/gte",
            pooling=PoolingType.MEAN,
            normalization=False,
            sources=ModelSource(hf="local/gte"),
            dim=1,
            model_file="onnx/model.onnx",
            additional_files=more,
        )
        self._model = TextEmbedding("local/gte", threads=threads, specific_model_path=str(bundle))

    def embed(self, job: Job) -> Array:
        return np.stack(list(self._model.embed(job.texts))).astype(np.float32, copy=False)


class LightEmbed:
    """light_embed.TextEmbedding on the exported graph."""

    def __init__(self, folder: Path, threads: int) -> None:
        from light_embed import TextEmbedding

        if threads != os.cpu_count():
            # ONNX Runtime's default is one pinned thread for every CPU, even for CPUs that the process may not use.
            raise ValueError(f"light-embed takes no number of threads: it can be compared with {os.cpu_count()} only")
        config = {"onnx_file": "onnx/model.onnx", "pooling_config_path": "1_Pooling", "normalize": False}
        self._model = TextEmbedding(str(folder / "bundle"), model_config=config, device="cpu")

    def embed(self, job: Job) -> Array:
        return self._model.encode(job.texts)


class GteDeploy:
    """gte_deploy.load on a bundle."""

    def __init__(self, folder: Path, threads: int, backend: str, precision: str | None = None) -> None:
        import gte_deploy

        options: dict[str, Any] = {} if precision is None else {"precision": precision}
        self._model = gte_deploy.load(folder / "bundle", backend=backend, num_threads=threads, **options)

    def embed(self, job: Job) -> Array:
        return self._model.encode(job.texts)

    def embed_padded(self, job: Job) -> Array:
        # Not public: `encode` would pad less. This is the cost for a caller without planned batches.
        batch = Batch(job.input_ids, job.attention_mask)
        return self._model._backend.run(batch, ("sentence_embedding",))["sentence_embedding"]

    def token_embeddings(self, job: Job) -> Array:
        return np.concatenate(self._model.encode(job.texts, output_value="token_embeddings"))

    def mask_logits(self, job: Job) -> Array:
        # Not public: `fill_mask` gives the best answers, not the logits.
        batch = Batch(job.input_ids, job.attention_mask, job.mask_positions)
        return self._model._backend.run(batch, ("logits",))["logits"]


@dataclass(frozen=True)
class Contestant:
    """One row of the result.

    Args:
        name: the name for people.
        precision: "fp32", "16-bit", "int8", "int8-weight" or "int4-weight"; only contestants of one precision compete.
        factory: a class of this file, or of `peers` for another environment.
        artefact: the name of its model, see `artefacts.Artefacts.path`.
        options: arguments of the factory.
        takes_texts: whether the input is texts, as in a user's call, or a padded batch of ids.
        environment: the environment of `environments` that a class of `peers` runs in.
    """

    name: str
    precision: str
    factory: type
    artefact: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_texts: bool = False
    environment: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the contestant is gte-deploy."""
        return self.factory is GteDeploy

    def method_for(self, workload: Workload) -> str | None:
        """Return the method to time; None if the workload is not for this contestant."""
        if workload.name == "mixed-padded":
            return "embed_padded" if self.is_ours else None
        return "embed_list" if workload.is_list and not self.takes_texts else "embed"

    def what_lacks(self, offered: Sequence[str]) -> str | None:
        """Say which kernels the CPU, which offers these, lacks for this contestant; None if it lacks none."""
        if not self.computes_bf16 or kernel_of("16-bit", offered):
            return None
        return f"this CPU has no bf16 kernels (AVX512-BF16, AMX-BF16 or ARM's bf16); it has {', '.join(offered)}"

    @property
    def computes_bf16(self) -> bool:
        """Whether any of its products are in bf16."""
        return self.precision == "16-bit" or self.options.get("precision") == "bf16"


def _peer(name: str, factory: type, environment: str, **options: Any) -> Contestant:
    precision = "16-bit" if options.get("precision") == "bf16" else "fp32"
    return Contestant(name, precision, factory, "exported", options, takes_texts=True, environment=environment)


def _ours(name: str, precision: str, bundle: str, backend: str, compute_precision: str | None = None) -> Contestant:
    options = {"backend": backend, "precision": compute_precision}
    return Contestant(f"gte-deploy {name}", precision, GteDeploy, bundle, options, takes_texts=True)


REFERENCE = "torch eager fp32"
TEXT_REFERENCE = "sentence-transformers"

CONTESTANTS = (
    Contestant(REFERENCE, "fp32", Torch, "checkpoint"),
    Contestant("torch.compile fp32", "fp32", Torch, "checkpoint", {"compile": True}),
    Contestant("ORT plain graph", "fp32", OnnxRuntime, "plain"),
    Contestant("ORT transformers.optimizer", "fp32", OnnxRuntime, "optimizer"),
    Contestant("OpenVINO direct fp32", "fp32", OpenVino, "plain"),
    Contestant(TEXT_REFERENCE, "fp32", SentenceTransformers, "checkpoint", takes_texts=True),
    # It sorts texts by length, too, so that a user who sets a small batch size computes little padding.
    Contestant(
        f"{TEXT_REFERENCE}, batches of 8",
        "fp32",
        SentenceTransformers,
        "checkpoint",
        {"batch_size": 8},
        takes_texts=True,
    ),
    Contestant("FastEmbed", "fp32", FastEmbed, "bundle-fp32", takes_texts=True),
    Contestant("light-embed", "fp32", LightEmbed, "bundle-fp32", takes_texts=True),
    _peer("sentence-transformers openvino", SentenceTransformersBackend, "openvino", backend="openvino"),
    _peer(
        "sentence-transformers openvino, batches of 8",
        SentenceTransformersBackend,
        "openvino",
        backend="openvino",
        batch_size=8,
    ),
    _peer("sentence-transformers onnx", SentenceTransformersBackend, "onnx", backend="onnx"),
    _peer("optimum-intel", OptimumIntel, "openvino"),
    _peer("infinity", Infinity, "infinity"),
    _ours("onnx fp32", "fp32", "bundle-fp32", "onnx"),
    _ours("openvino fp32", "fp32", "bundle-fp32", "openvino"),
    Contestant("torch bf16", "16-bit", Torch, "checkpoint", {"dtype": "bfloat16"}),
    Contestant("OpenVINO direct bf16", "16-bit", OpenVino, "plain", {"precision": "bf16"}),
    _peer(
        "sentence-transformers openvino bf16",
        SentenceTransformersBackend,
        "openvino",
        backend="openvino",
        precision="bf16",
    ),
    _peer(
        "sentence-transformers openvino bf16, batches of 8",
        SentenceTransformersBackend,
        "openvino",
        backend="openvino",
        precision="bf16",
        batch_size=8,
    ),
    _peer("optimum-intel bf16", OptimumIntel, "openvino", precision="bf16"),
    _ours("openvino bf16", "16-bit", "bundle-fp32", "openvino", "bf16"),
    Contestant("OpenVINO direct NNCF int8", "int8", OpenVino, "nncf"),
    Contestant("OpenVINO direct NNCF int8, rest bf16", "int8", OpenVino, "nncf", {"precision": "bf16"}),
    _ours("onnx int8", "int8", "bundle-int8", "onnx"),
    _ours("onnx int8 dynamic", "int8", "bundle-int8-dynamic", "onnx"),
    _ours("openvino int8", "int8", "bundle-int8", "openvino"),
    _ours("openvino int8, rest bf16", "int8", "bundle-int8", "openvino", "bf16"),
    _ours("onnx int8-weight", "int8-weight", "bundle-int8-weight", "onnx"),
    _ours("onnx int4-weight", "int4-weight", "bundle-int4-weight", "onnx"),
)


def reference_of(workload: str) -> str:
    """Return the contestant whose speed is 1: torch eager, or sentence-transformers for a list of texts."""
    return TEXT_REFERENCE if is_list(workload) else REFERENCE


def mean_pooled(hidden: Array, mask: NDArray[np.int64]) -> Array:
    """Return mean-pooled embeddings [B, H] of hidden states [B, S, H]."""
    weights = mask[:, :, None].astype(np.float32)
    return (hidden * weights).sum(1) / weights.sum(1)


def _feed(job: Job, inputs: set[str]) -> dict[str, NDArray[np.int64]]:
    positions = np.empty((0, 2), np.int64) if job.mask_positions is None else job.mask_positions
    offered = {"input_ids": job.input_ids, "attention_mask": job.attention_mask, "mask_positions": positions}
    return {name: offered[name] for name in inputs}
