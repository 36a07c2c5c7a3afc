"""A family with biased scores (ALiBi); `alibi_network.py` has its network, and `test_alibi_family.py` registers it.

Of the fusion passes only attention with biased scores and the sum before each LayerNorm have sites.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.fields import FileFields, fixed
from gte_deploy.models.reading import SIZES, Reader


def _read_config(raw: Mapping[str, Any], file: Path) -> Any:
    from transformers import AlibiConfig  # of alibi_network.py

    reader = Reader(raw, file, {})
    return AlibiConfig(
        **{name: reader.integer(name, at_least=1) for name in (*SIZES, "type_vocab_size")},
        layer_norm_eps=reader.number("layer_norm_eps"),
        id2label={int(index): str(label) for index, label in raw["id2label"].items()},
        architectures=raw.get("architectures"),
    )


def _native_config(config: Any, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
    return {**json.loads(config.to_json_string()), "architectures": [ALIBI.classes[task]], "dtype": dtype}


ALIBI = Family(
    model_types=("alibi",),
    fields=FileFields(
        name="config.json of ALiBi",
        reads='`model_type` "alibi".',
        fields={"hidden_act": fixed("Only the exact GELU is computed.", "gelu")},
        unknown="ignored",
    ),
    read_config=_read_config,
    native_config=_native_config,
    classes={"embed": "AlibiModel", "token-classify": "AlibiForTokenClassification"},
    architecture_prefixes=("Alibi",),
    heads={"token-classify": "scorer"},
    positions="alibi",
    sites=lambda config: {"alibi_attention": config.num_hidden_layers, "skip_layer_norm": 2 * config.num_hidden_layers},
    tensors=TensorNames(prefixes=("bert.",)),
)
