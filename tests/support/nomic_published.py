"""Tiny Nomic BERT checkpoints in the published layout, and what they compute, in NumPy and float64.

Written from the paper (https://arxiv.org/abs/2402.01613) and from the behaviour of its code. No line of the package
under test takes part. Shapes: B rows, S tokens, N heads, D head size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[np.float64]

CLASSES = {
    "fill-mask": "NomicBertForPreTraining",
    "embed": "NomicBertModel",
    "classify": "NomicBertForSequenceClassification",
}
PUBLISHED_FIELDS: dict[str, Any] = {
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "causal": False,
    "dense_seq_output": True,
    "embd_pdrop": 0.1,
    "eos_token_id": None,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-12,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "model_type": "nomic_bert",
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 12,
    "n_positions": 2048,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.1,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torch_dtype": "float32",
    "transformers_version": "4.34.0",
    "type_vocab_size": 2,
    "use_cache": True,
    "use_flash_attn": True,
    "use_rms_norm": False,
    "use_xentropy": True,
    "vocab_size": 30528,
}
"""The fields of nomic-bert-2048's config.json, besides `architectures` and `auto_map`."""
TINY = {"n_embd": 32, "n_head": 4, "n_inner": 256, "n_layer": 2, "n_positions": 48, "max_trained_positions": 48}


def make_published(folder: Path, task: str, *, words: int, num_labels: int = 2, seed: int = 0, **fields: Any) -> Path:
    """Write config.json and model.safetensors with random weights; `words` is the number of words before rounding."""
    names = [f"LABEL_{i}" for i in range(num_labels)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = {**PUBLISHED_FIELDS, **TINY, "vocab_size": words, "architectures": [CLASSES[task]], **fields}
    config |= labels if task == "classify" else {}
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (0.3 * random.standard_normal(shape)).astype(np.float32)

    def norm(name: str) -> dict[str, NDArray[np.float32]]:
        width = config["n_embd"]
        return {f"{name}.weight": 1 + matrix(width), f"{name}.bias": matrix(width)}

    width, rows = config["n_embd"], -(-words // config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]
    inner = -(-config["n_inner"] // 256) * 256
    tensors = {
        "embeddings.word_embeddings.weight": matrix(rows, width),
        "embeddings.token_type_embeddings.weight": matrix(config["type_vocab_size"], width),
        **norm("emb_ln"),
    }
    for i in range(config["n_layer"]):
        layer = f"encoder.layers.{i}"
        tensors |= {
            f"{layer}.attn.Wqkv.weight": matrix(3 * width, width),
            f"{layer}.attn.out_proj.weight": matrix(width, width),
            f"{layer}.mlp.fc11.weight": matrix(inner, width),
            f"{layer}.mlp.fc12.weight": matrix(inner, width),
            f"{layer}.mlp.fc2.weight": matrix(width, inner),
            **norm(f"{layer}.norm1"),
            **norm(f"{layer}.norm2"),
        }
    if task == "classify":
        tensors |= {"pooler.dense.weight": matrix(width, width), "pooler.dense.bias": matrix(width)}
    if task != "embed":
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    if task == "classify":
        tensors |= {"classifier.weight": matrix(num_labels, width), "classifier.bias": matrix(num_labels)}
    if task == "fill-mask":
        head = "cls.predictions.transform"
        tensors |= {f"{head}.dense.weight": matrix(width, width), **norm(f"{head}.layer_norm")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class PublishedModel:
    """Computes one row of tokens without padding; every row of a batch is computed alone."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.tensors = {name.removeprefix("bert."): tensor.astype(np.float64) for name, tensor in stored.items()}

    def hidden(self, ids: list[int], types: list[int] | None = None) -> Array:
        """The hidden states [S, H] of token ids; without `types` every token has type 0."""
        tables = (self.tensors[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "token_type"))
        words, kinds = (table[index] for table, index in zip(tables, (ids, types or [0] * len(ids)), strict=True))
        x = self._norm("emb_ln", words + kinds)
        for i in range(self.config["n_layer"]):
            layer = f"encoder.layers.{i}"
            x = self._norm(f"{layer}.norm1", x + self._attention(f"{layer}.attn", x))
            up, gate = (self._linear(f"{layer}.mlp.{name}", x) for name in ("fc11", "fc12"))
            x = self._norm(f"{layer}.norm2", x + self._linear(f"{layer}.mlp.fc2", up * self._function(gate)))
        return x

    def logits(self, ids: list[int], types: list[int] | None = None) -> Array:
        """The logits [S, V] of every token in the vocabulary, by a head without biases."""
        head = "cls.predictions.transform"
        transformed = self._function(self._linear(f"{head}.dense", self.hidden(ids, types)))
        return self._norm(f"{head}.layer_norm", transformed) @ self.tensors["embeddings.word_embeddings.weight"].T

    def labels(self, ids: list[int], types: list[int] | None = None) -> Array:
        """The logits [L] of the labels."""
        pooled = np.tanh(self._linear("pooler.dense", self.hidden(ids, types)[0]))
        return self._linear("classifier", pooled)

    def _linear(self, name: str, x: Array) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.config["layer_norm_epsilon"])
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def _function(self, x: Array) -> Array:
        if self.config["activation_function"] == "swiglu":
            return x / (1 + np.exp(-x))
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def _attention(self, name: str, x: Array) -> Array:
        heads = self.config["n_head"]
        queries, keys, values = self._linear(f"{name}.Wqkv", x).reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        scores = self._rotated(queries) @ self._rotated(keys).transpose(0, 2, 1) / math.sqrt(queries.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = weights / weights.sum(axis=-1, keepdims=True) @ values
        return self._linear(f"{name}.out_proj", attended.transpose(1, 0, 2).reshape(len(x), -1))

    def _rotated(self, x: Array) -> Array:
        """Rotate [N, S, D]: entries j and j + D/2 are one complex number, turned by position * base^(-2j/D)."""
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(x.shape[1]), self.config["rotary_emb_base"] ** (-np.arange(half) / half))
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate((turned.real, turned.imag), axis=-1)
