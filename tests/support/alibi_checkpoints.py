"""Tiny JinaBERT and MosaicBERT checkpoints in their published layouts, and their answers in float64 from the papers.

Nothing here uses the package under test, torch or transformers (except for the tokenizer): the tensors have the names
and shapes of the published files, and the formulas are those of the papers: attention with linear biases
(arXiv 2108.12409, section 3, and its authors' slopes for other numbers of heads), symmetric for encoders (2310.19923,
section 3.1), GLU variants (2002.05202), BERT (1810.04805).

Shapes: B rows, S tokens, N heads, H hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from factories import SPELLING
from family_checkpoints import LIMIT, make_tokenizer

LAYERS, PADDED_VOCABULARY = 2, 128
JINA, MOSAIC = "jina_bert_v2", "mosaic_bert"
_SUFFIXES = {
    "fill-mask": "ForMaskedLM",
    "embed": "Model",
    "classify": "ForSequenceClassification",
    "token-classify": "ForTokenClassification",
}
Floats = NDArray[np.float64]


def published_config(kind: str, task: str = "fill-mask", **fields: Any) -> dict[str, Any]:
    """config.json with the fields of jina-embeddings-v2 or of mosaic-bert-base, in tiny sizes; None removes a field."""
    name = ("JinaBert" if kind == JINA else "Bert") + _SUFFIXES[task]
    common = {
        "architectures": [name],
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": LIMIT,
        "model_type": "bert",
        # Not a power of two, as in every base size.
        "num_attention_heads": 6,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": PADDED_VOCABULARY,
    }
    if kind == JINA:
        code = "jinaai/jina-bert-implementation--"
        own: dict[str, Any] = {
            "_name_or_path": "jinaai/jina-bert-implementation",
            "auto_map": {
                "AutoConfig": f"{code}configuration_bert.JinaBertConfig",
                "AutoModel": f"{code}modeling_bert.JinaBertModel",
                "AutoModelForMaskedLM": f"{code}modeling_bert.JinaBertForMaskedLM",
            },
            "position_embedding_type": "alibi",
            "feed_forward_type": "geglu",
            "model_max_length": LIMIT,
        }
    else:
        own = {
            "alibi_starting_size": LIMIT,
            "auto_map": {
                "AutoConfig": "configuration_bert.BertConfig",
                "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
            },
            "position_embedding_type": "absolute",
        }
    merged = {**common, **own, **fields}
    return {name: value for name, value in merged.items() if value is not None or name == "classifier_dropout"}


def make_alibi_checkpoint(
    folder: Path,
    kind: str,
    task: str = "fill-mask",
    *,
    labels: Sequence[str] = (),
    scale: float = 0.3,
    **fields: Any,
) -> Path:
    """Write a random checkpoint with its tokenizer.

    `scale` is the standard deviation of the matrices, far above that of a fresh model: a mixed-up half, slope or matrix
    then changes every answer. `fields` replaces fields of config.json.
    """
    names = {"id2label": {str(i): label for i, label in enumerate(labels)}} if labels else {}
    config = published_config(kind, task, **names, **fields)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(tensor_shapes(config, kind, task, max(1, len(labels))), scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer("bert").save_pretrained(folder)
    return folder


def tensor_shapes(config: Mapping[str, Any], kind: str, task: str, labels: int = 1) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of the published files."""
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (v, h),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], h),
        **_norm("embeddings.LayerNorm", h),
    }
    for layer in (f"encoder.layer.{n}." for n in range(config["num_hidden_layers"])):
        if kind == MOSAIC:
            shapes |= _linear(f"{layer}attention.self.Wqkv", 3 * h, h)
        else:
            for part in ("query", "key", "value"):
                shapes |= _linear(f"{layer}attention.self.{part}", h, h)
        shapes |= {**_linear(f"{layer}attention.output.dense", h, h), **_norm(f"{layer}attention.output.LayerNorm", h)}
        if kind == MOSAIC or config["feed_forward_type"] != "original":
            shapes |= {f"{layer}mlp.gated_layers.weight": (2 * i, h), **_linear(f"{layer}mlp.wo", h, i)}
            shapes |= _norm(f"{layer}mlp.layernorm", h)
        else:
            shapes |= {**_linear(f"{layer}intermediate.dense", i, h), **_linear(f"{layer}output.dense", h, i)}
            shapes |= _norm(f"{layer}output.LayerNorm", h)
    if task in ("embed", "classify"):
        shapes |= _linear("pooler.dense", h, h)
    if task != "embed":
        shapes = {f"bert.{name}": shape for name, shape in shapes.items()}
    if task == "fill-mask":
        head = "cls.predictions."
        shapes |= {**_linear(f"{head}transform.dense", h, h), **_norm(f"{head}transform.LayerNorm", h)}
        shapes[f"{head}decoder.bias" if kind == MOSAIC else f"{head}bias"] = (v,)
    elif task != "embed":
        shapes |= _linear("classifier", labels, h)
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]], scale: float) -> dict[str, NDArray[np.float32]]:
    """Tensors of these shapes; see `make_alibi_checkpoint`."""
    draw = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        deviation = 0.1 if is_norm or name.endswith("bias") else scale
        tensors[name] = (draw.normal(0, deviation, shape) + is_norm).astype(np.float32)
    return tensors


def _linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


class Float64Alibi:
    """The answers of a published checkpoint, computed in float64 with NumPy from its own files."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.tensors = {name.removeprefix("bert."): tensor.astype(np.float64) for name, tensor in stored.items()}

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64], types: NDArray[np.int64] | None = None) -> Floats:
        """Hidden states [B, S, H] of ids, mask (1 for a token) and token types [B, S]; at padding, any numbers."""
        types = np.zeros_like(ids) if types is None else types
        x = self.tensors["embeddings.word_embeddings.weight"][ids]
        x = self._normed(x + self.tensors["embeddings.token_type_embeddings.weight"][types], "embeddings.LayerNorm")
        far = np.abs(np.subtract.outer(np.arange(ids.shape[1]), np.arange(ids.shape[1])))
        bias = np.stack([-slope * far for slope in slopes(self.config["num_attention_heads"])])[None]
        bias = np.where(mask[:, None, None, :] == 1, bias, -np.inf)
        for n in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{n}."
            attended = self._linear(self._attended(x, bias, layer), f"{layer}attention.output.dense")
            x = self._normed(attended + x, f"{layer}attention.output.LayerNorm")
            x = self._feed_forward(x, layer)
        return x

    def masked_lm(self, hidden: Floats) -> Floats:
        """Logits [..., V]."""
        head = "cls.predictions."
        activation = {"gelu": gelu, "relu": relu, "tanh": np.tanh}[self.config["hidden_act"]]
        x = activation(self._linear(hidden, f"{head}transform.dense"))
        x = self._normed(x, f"{head}transform.LayerNorm", 1e-12 if "alibi_starting_size" in self.config else None)
        bias = next(self.tensors[head + name] for name in ("bias", "decoder.bias") if head + name in self.tensors)
        return x @ self.tensors["embeddings.word_embeddings.weight"].T + bias

    def classify(self, hidden: Floats) -> Floats:
        """Logits [B, labels] of the first token."""
        return self._linear(np.tanh(self._linear(hidden[:, 0], "pooler.dense")), "classifier")

    def classify_tokens(self, hidden: Floats) -> Floats:
        """Logits [B, S, labels]."""
        return self._linear(hidden, "classifier")

    def _attended(self, x: Floats, bias: Floats, layer: str) -> Floats:
        rows, tokens, width = x.shape
        heads = self.config["num_attention_heads"]
        joined = f"{layer}attention.self.Wqkv"
        if f"{joined}.weight" in self.tensors:
            parts = np.split(self._linear(x, joined), 3, axis=-1)
        else:
            parts = [self._linear(x, f"{layer}attention.self.{part}") for part in ("query", "key", "value")]
        q, k, v = (part.reshape(rows, tokens, heads, width // heads).transpose(0, 2, 1, 3) for part in parts)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // heads) + bias
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ v).transpose(0, 2, 1, 3).reshape(rows, tokens, width)

    def _feed_forward(self, x: Floats, layer: str) -> Floats:
        kind = self.config.get("feed_forward_type", "geglu")
        if kind == "original":
            activation = {"gelu": gelu, "relu": relu, "tanh": np.tanh}[self.config["hidden_act"]]
            inner = self._linear(activation(self._linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
            return self._normed(inner + x, f"{layer}output.LayerNorm")
        # The first half of the rows is the gate.
        both = self.tensors[f"{layer}mlp.gated_layers.weight"]
        gate, value = both[: len(both) // 2], both[len(both) // 2 :]
        inner = {"geglu": gelu, "reglu": relu}[kind](x @ gate.T) * (x @ value.T)
        return self._normed(self._linear(inner, f"{layer}mlp.wo") + x, f"{layer}mlp.layernorm")

    def _linear(self, x: Floats, name: str) -> Floats:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def _normed(self, x: Floats, name: str, eps: float | None = None) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True)
        eps = self.config["layer_norm_eps"] if eps is None else eps
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
        return centred / deviation * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]


def slopes(heads: int) -> list[float]:
    """The slopes that the authors of ALiBi publish: a geometric sequence, for a power of two from 2^(-8/N) to 2^-8."""
    exponent = math.log2(heads)
    if exponent.is_integer():
        first = 2 ** (-(2 ** (3 - exponent)))
        return [first ** (n + 1) for n in range(heads)]
    lower = 2 ** math.floor(exponent)
    return slopes(lower) + slopes(2 * lower)[::2][: heads - lower]


def gelu(x: Floats) -> Floats:
    """The exact GELU."""
    erf: Floats = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
    return x * (1 + erf) / 2


def relu(x: Floats) -> Floats:
    """The larger of x and 0."""
    return np.maximum(x, 0)


def ragged_ids(rows: int = 2, tokens: int = 11) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids, mask and token types [B, S]: a full row, and rows with half of their tokens."""
    ids = np.random.default_rng(1).integers(5, len(SPELLING), (rows, tokens))
    ids[1:, tokens // 2 :] = 0
    return ids, (ids != 0).astype(np.int64), (np.arange(tokens) > 3).astype(np.int64)[None].repeat(rows, 0)
