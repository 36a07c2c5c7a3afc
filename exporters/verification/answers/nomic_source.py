"""The second reading of a published Nomic BERT: see `source_view`.

transformers reads the published tensors under their own names, but for the prefix "bert.", and config.json only under
its own names of fields. Source: https://github.com/nomic-ai/contrastors, src/contrastors/models/huggingface.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
_GATES = {"swiglu": "silu", "geglu": "gelu"}
_CLASSES = {"NomicBertForPreTraining": "NomicBertForMaskedLM"}


def is_published_nomic(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json has GPT-2's names of fields."""
    return raw.get("model_type") == "nomic_bert" and "n_embd" in raw


def nomic_fields(raw: Mapping[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """Return config.json with the names of transformers; the file's own fields under these names have priority."""
    width, inner, multiple = int(raw["n_embd"]), raw.get("n_inner"), int(raw.get("pad_vocab_size_multiple", 1))
    converted = {
        **{native: raw[name] for name, native in _RENAMED.items() if name in raw},
        "intermediate_size": 256 * math.ceil((8 * width // 3 if inner is None else inner) / 256),
        "hidden_act": _GATES[raw["activation_function"]],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", 10_000))},
        "pad_token_id": pad_token_id,
    }
    names = [str(name) for name in raw.get("architectures") or []]
    own = {name: value for name, value in raw.items() if name not in (*_RENAMED, "auto_map") and value is not None}
    rounded = {"vocab_size": multiple * math.ceil(raw["vocab_size"] / multiple)}
    return {**converted, **own, **rounded, "architectures": [_CLASSES.get(name, name) for name in names] or None}


def loadable_tensors(key: str, tensor: Any) -> dict[str, Any]:
    """Return a published tensor under a name that transformers knows."""
    return {key.removeprefix("bert."): tensor}


def nomic_frequencies(raw: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return inv_freq [D/2], theta^(-2i/D) with the head's size D (https://arxiv.org/abs/2104.09864, section 3.2.2)."""
    size = int(raw["n_embd"]) // int(raw["n_head"])
    return float(raw.get("rotary_emb_base", 10_000)) ** (-2 * np.arange(size // 2, dtype=np.float64) / size)
