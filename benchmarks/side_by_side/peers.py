"""Peers that run in environments of their own, see `environments`; so this file imports nothing of gte-deploy but
`register`, which tells an older transformers that the model type "gte" exists.

`embed` takes texts and returns sentence embeddings [B, H] float32, mean pooled; `token_embeddings` the hidden states of
the real tokens [T, H], row after row. The folder holds the checkpoint with the traced graph without fusions, as
onnx/model.onnx and openvino/openvino_model.xml, where sentence-transformers keeps exported graphs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.integrations.transformers import register

Array = NDArray[np.float32]

_BATCH = 32  # sentence-transformers' default


def _openvino(threads: int, precision: str) -> dict[str, Any]:
    """OpenVINO's options. Without the hint it computes an FP32 graph in bf16 wherever the CPU can."""
    return {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}


class OptimumIntel:
    """optimum.intel.OVModelForFeatureExtraction with transformers' tokenizer and mean pooling, as its examples do."""

    def __init__(self, folder: Path, threads: int, precision: str = "f32") -> None:
        register()
        from optimum.intel import OVModelForFeatureExtraction
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = OVModelForFeatureExtraction.from_pretrained(
            folder, subfolder="openvino", export=False, ov_config=_openvino(threads, precision)
        )

    def embed(self, texts: list[str]) -> Array:
        return np.concatenate([self._pooled(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)])

    def token_embeddings(self, texts: list[str]) -> Array:
        hidden, mask = self._hidden(texts)
        return hidden[mask == 1]

    def _pooled(self, texts: list[str]) -> Array:
        hidden, mask = self._hidden(texts)
        weights = mask[:, :, None].astype(np.float32)
        return (hidden * weights).sum(1) / weights.sum(1)

    def _hidden(self, texts: list[str]) -> tuple[Array, NDArray[np.int64]]:
        batch = self._tokenizer(texts, padding=True, return_tensors="pt")
        hidden = self._model(**batch).last_hidden_state
        return np.asarray(hidden), np.asarray(batch["attention_mask"])


class SentenceTransformersBackend:
    """SentenceTransformer.encode on its OpenVINO or ONNX backend."""

    def __init__(
        self, folder: Path, threads: int, backend: str, precision: str = "f32", batch_size: int = _BATCH
    ) -> None:
        register()
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        if backend == "openvino":
            options: dict[str, Any] = {"ov_config": _openvino(threads, precision)}
        else:
            import onnxruntime

            session = onnxruntime.SessionOptions()
            session.intra_op_num_threads = threads
            options = {"session_options": session, "provider": "CPUExecutionProvider"}
        self._model = SentenceTransformer(
            str(folder), device="cpu", backend=backend, local_files_only=True, model_kwargs=options
        )
        self._batch_size = batch_size

    def embed(self, texts: list[str]) -> Array:
        return self._model.encode(texts, batch_size=self._batch_size, show_progress_bar=False)

    def token_embeddings(self, texts: list[str]) -> Array:
        rows = self._model.encode(texts, output_value="token_embeddings", show_progress_bar=False)
        return np.concatenate([row.numpy() for row in rows])


def infinity_options(folder: Path, linked: Path) -> dict[str, Any]:
    """Link a bundle's files into the empty folder `linked`, go there, and return infinity's arguments to serve them."""
    register()
    # Of a local folder, it finds a graph only beside the config, and only if the folder is ".".
    os.chdir(linked)
    for file in (*folder.glob("*.*"), *folder.glob("onnx/*")):
        if file.is_file():
            os.link(file, file.name)
    return {
        "model_name_or_path": ".",
        "engine": "optimum",
        "device": "cpu",
        "pooling_method": "mean",
        "model_warmup": False,
        "embedding_dtype": "float32",
    }


class Infinity:
    """infinity_emb.SyncEngineArray with its ONNX engine; the number of threads is that of the process's CPUs."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=folder)
        options = infinity_options(folder, Path(self._folder.name))
        from infinity_emb import EngineArgs, SyncEngineArray

        self._model = SyncEngineArray.from_args([EngineArgs(**options)])

    def embed(self, texts: list[str]) -> Array:
        embeddings, _ = self._model.embed(model=".", sentences=texts).result()
        return np.stack(embeddings).astype(np.float32, copy=False)
