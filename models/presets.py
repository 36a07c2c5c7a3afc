"""Published models of the family: hyper-parameters under the names of transformers' `GteConfig`, and their use.

A checkpoint's own config.json always has priority; presets serve training from scratch, size estimates and tests. The
field `inferred` lists values that the model card does not state; they were inferred from the sibling models.
`models/published.py` lists these and all other published checkpoints, with their revisions.
"""

from types import MappingProxyType
from typing import Any

from gte_deploy.core.errors import ConfigError

_COMMON = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_BASE = {
    **_COMMON,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_LARGE = {
    **_COMMON,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# bert-base-uncased's 30,522 word pieces padded to a multiple of 64; ids from 30,522 on belong to no word.
_ENGLISH = {"vocab_size": 30528, "pad_token_id": 0}
_MULTILINGUAL = {"vocab_size": 250048, "pad_token_id": 1, "type_vocab_size": 1}

_MLM: dict[str, Any] = {"task": "fill-mask", "pooling": None, "prompts": {}}
_CLS: dict[str, Any] = {"task": "embed", "pooling": "cls", "prompts": {}}

_HEAD_DIM = 64  # of base and large alike


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": float(theta)}}


def _ntk(theta: float, factor: float) -> dict[str, Any]:
    # Fixed NTK scaling is a linear RoPE with another base: see `gte_deploy.models.rope.ntk_rope`.
    return {
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": float(theta * factor),
            "factor": factor ** (2 / _HEAD_DIM),
        }
    }


# `parameters_millions` is the published count (tied matrices once), None if none is known.
PRESETS: dict[str, dict[str, Any]] = {
    "gte-en-mlm-tiny": {
        **_COMMON,
        **_ENGLISH,
        **_rope(160_000),
        **_MLM,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "type_vocab_size": 0,
        "hub_id": None,
        "parameters_millions": None,
        "inferred": (),
    },
    "gte-en-mlm-base": {
        **_BASE,
        **_ENGLISH,
        **_rope(500_000),
        **_MLM,
        "type_vocab_size": 0,
        "hub_id": "Alibaba-NLP/gte-en-mlm-base",
        "parameters_millions": 137,
        "inferred": ("type_vocab_size", "rope_parameters.rope_type"),
    },
    "gte-en-mlm-large": {
        **_LARGE,
        **_ENGLISH,
        **_rope(160_000),
        **_MLM,
        "type_vocab_size": 2,
        "hub_id": "Alibaba-NLP/gte-en-mlm-large",
        "parameters_millions": 435,
        "inferred": ("type_vocab_size", "rope_parameters.rope_type"),
    },
    "gte-multilingual-mlm-base": {
        **_BASE,
        **_MULTILINGUAL,
        **_rope(160_000),
        **_MLM,
        "hub_id": "Alibaba-NLP/gte-multilingual-mlm-base",
        "parameters_millions": 306,
        "inferred": (),
    },
    "gte-base-en-v1.5": {
        **_BASE,
        **_ENGLISH,
        **_ntk(500_000, 2.0),
        **_CLS,
        "type_vocab_size": 0,
        "hub_id": "Alibaba-NLP/gte-base-en-v1.5",
        "parameters_millions": 137,
        "inferred": (),
    },
    "gte-large-en-v1.5": {
        **_LARGE,
        **_ENGLISH,
        **_ntk(160_000, 2.0),
        **_CLS,
        "type_vocab_size": 2,
        "hub_id": "Alibaba-NLP/gte-large-en-v1.5",
        "parameters_millions": 434,
        "inferred": (),
    },
    # Its checkpoint also holds a token-weight head (sparse), which the task "token-classify" loads.
    "gte-multilingual-base": {
        **_BASE,
        **_MULTILINGUAL,
        **_ntk(20_000, 8.0),
        **_CLS,
        "num_labels": 1,
        "hub_id": "Alibaba-NLP/gte-multilingual-base",
        "parameters_millions": 305,
        "inferred": (),
    },
    "gte-multilingual-reranker-base": {
        **_BASE,
        **_MULTILINGUAL,
        **_ntk(20_000, 8.0),
        "task": "classify",
        "pooling": None,
        "prompts": {},
        "num_labels": 1,
        "hub_id": "Alibaba-NLP/gte-multilingual-reranker-base",
        "parameters_millions": 306,
        "inferred": (),
    },
    "snowflake-arctic-embed-m-v2.0": {
        **_BASE,
        **_MULTILINGUAL,
        **_rope(160_000),
        **_CLS,
        "prompts": {"query": "query: "},
        "hub_id": "Snowflake/snowflake-arctic-embed-m-v2.0",
        "parameters_millions": 305,
        "inferred": (),
    },
    # Sparse: the vectors are the maximum over tokens of log1p(log1p(relu(logits))).
    "opensearch-neural-sparse-encoding-doc-v3-gte": {
        **_BASE,
        **_ENGLISH,
        **_rope(500_000),
        **_MLM,
        "type_vocab_size": 0,
        "hub_id": "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte",
        "parameters_millions": None,
        "inferred": ("type_vocab_size", "rope_parameters.rope_type"),
    },
}

# The fields of a preset that are not part of the config.
USAGE_FIELDS = frozenset({"task", "pooling", "prompts", "hub_id", "parameters_millions", "inferred"})


def preset(name: str) -> MappingProxyType[str, Any]:
    """Return the read-only entry `name` of `PRESETS`.

    Raises:
        ConfigError: there is no such preset; the message lists the presets.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return MappingProxyType(PRESETS[name])
