"""The families JinaBERT v2 and MosaicBERT: BERT's layers with biased scores (ALiBi) and gated linear units.

Both publish config.json with BERT's `model_type` and the network as remote code, which never runs here: the network is
that of `networks/alibi_bert.py`. In the layout that this package writes as "native", `model_type` is the family's own,
so that no library takes the weights for those of a plain BERT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family, TensorNames, WriteConfig
from gte_deploy.models.families.bert import BERT, CONFIG_FIELDS, class_names, config_reader, plain_config
from gte_deploy.models.fields import FileFields, fixed, honoured, ignored
from gte_deploy.models.reading import Reader

_NETWORKS = "gte_deploy.models.networks"
_FEED_FORWARD_TYPES = ("geglu", "reglu", "original")
_MAX_TOKENS = (
    "The longest text. Nothing has this size: longer texts are possible, and their embeddings beyond training."
)

JINA_BERT_FIELDS = FileFields(
    name="config.json of JinaBERT v2",
    reads=(
        '`model_type` "bert" with `feed_forward_type`, or with classes of JinaBERT in `architectures` or `auto_map`; '
        '"jina_bert_v2" in the native layout.'
    ),
    fields={
        **CONFIG_FIELDS,
        "position_embedding_type": fixed(
            "Scores are biased by the distance of tokens; it may not be missing.", "alibi"
        ),
        "feed_forward_type": honoured(
            f"One of {', '.join(_FEED_FORWARD_TYPES)}; the last, or none, has BERT's two layers."
        ),
        "hidden_act": honoured("Of the masked-LM head, and of the feed-forward layers that are original."),
        "emb_pooler": honoured('"mean" makes an embedding model with this pooling; other values are refused.'),
        "attn_implementation": ignored("It chooses a kernel for attention."),
        "model_max_length": ignored("The tokenizer has its own."),
        "max_position_embeddings": honoured(_MAX_TOKENS),
        "auto_map": honoured("It names remote code, which is never run; another code than JinaBERT v2's is refused."),
    },
    unknown="ignored",
)

MOSAIC_BERT_FIELDS = FileFields(
    name="config.json of MosaicBERT",
    reads='`model_type` "bert" with `alibi_starting_size`, or with `auto_map`; "mosaic_bert" in the native layout.',
    fields={
        **CONFIG_FIELDS,
        "position_embedding_type": ignored("Scores are always biased by the distance of tokens."),
        "alibi_starting_size": honoured("The longest text, if it is more than max_position_embeddings."),
        "hidden_act": honoured("Of the masked-LM head; the gated units have GELU."),
        "layer_norm_eps": honoured("Epsilon of every LayerNorm but that of the masked-LM head, which has 1e-12."),
        "max_position_embeddings": honoured(_MAX_TOKENS),
    },
    unknown="ignored",
)


def _sites(config: Any) -> dict[str, int]:
    """How often each fusion pass must fire; see `Family.sites`. The passes for gated units know no ReLU."""
    layers = config.num_hidden_layers
    gated = layers if config.feed_forward_type == "geglu" else 0
    return {"alibi_attention": layers, **dict.fromkeys(("up_gate", "glu"), gated), "skip_layer_norm": 2 * layers}


def _remote_classes(raw: Mapping[str, Any]) -> list[str]:
    """What `architectures` and `auto_map` name: classes, and the repositories and files of their code."""
    named = raw.get("auto_map")
    architectures = raw.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else ())]
    names += named.values() if isinstance(named, dict) else ()
    return [name for name in names if isinstance(name, str)]


def _is_jina(raw: Mapping[str, Any]) -> bool:
    return "feed_forward_type" in raw or any("JinaBert" in name for name in _remote_classes(raw))


def _is_mosaic(raw: Mapping[str, Any]) -> bool:
    # The file of the remote code is bert_layers.py, in the published checkpoints and those that are based on them.
    return "alibi_starting_size" in raw or any("bert_layers." in name for name in _remote_classes(raw))


def _jina_fields(reader: Reader) -> dict[str, Any]:
    other = [name for name in _remote_classes(reader.raw) if "qk-post-norm" in name]
    if other:
        raise ConfigError(
            f"{reader.file}: auto_map names {other[0]!r}, a network that also normalises queries and keys; expected "
            "jinaai/jina-bert-implementation. Models such as jina-embeddings-v2-base-code are not supported."
        )
    if (kind := reader.raw.get("position_embedding_type", "absolute")) != "alibi":
        raise reader.refuse("position_embedding_type", kind, "'alibi'")
    if (kind := reader.get("feed_forward_type")) not in _FEED_FORWARD_TYPES:
        raise reader.refuse("feed_forward_type", kind, f"one of {', '.join(_FEED_FORWARD_TYPES)}")
    if (pooling := reader.get("emb_pooler")) not in (None, "mean"):
        raise reader.refuse("emb_pooler", pooling, "'mean' or null")
    return {"feed_forward_type": kind, "emb_pooler": pooling, **_remote_code(reader)}


def _mosaic_fields(reader: Reader) -> dict[str, Any]:
    start = reader.integer("alibi_starting_size", at_least=1)
    longest = max(start, reader.integer("max_position_embeddings", at_least=1))
    return {"alibi_starting_size": start, "max_position_embeddings": longest, **_remote_code(reader)}


def _remote_code(reader: Reader) -> dict[str, Any]:
    """Keep the names of the remote code for the original layout, which transformers cannot read without it."""
    return {"auto_map": reader.raw["auto_map"]} if reader.raw.get("auto_map") else {}


def _published_config(prefix: str) -> WriteConfig:
    """A writer of config.json as the published checkpoints have it; see `Family.original_config`."""

    def original_config(config: Any, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
        fields = plain_config(config, task=task, dtype=dtype)
        return {**fields, "model_type": "bert", "architectures": [class_names(prefix)[task]]}

    return original_config


def _family(
    model_type: str,
    fields: FileFields,
    prefix: str,
    *,
    own_fields: Callable[[Reader], Mapping[str, Any]],
    claims: Callable[[Mapping[str, Any]], bool],
    published_prefix: str,
    tensors: TensorNames,
    pooling_field: str | None = None,
) -> Family:
    return Family(
        model_types=(model_type,),
        fields=fields,
        claims=claims,
        pooling_field=pooling_field,
        read_config=config_reader(f"{prefix}Config", f"{_NETWORKS}.alibi_bert_config", own_fields),
        native_config=plain_config,
        original_config=_published_config(published_prefix),
        module=f"{_NETWORKS}.alibi_bert",
        classes=class_names(prefix),
        architecture_prefixes=tuple({prefix: None, published_prefix: None}),
        heads=BERT.heads,
        positions="alibi",
        sites=_sites,
        left_out=BERT.left_out,
        tensors=tensors,
    )


_DERIVED = re.compile(r"(^|\.)(position_ids|token_type_ids|alibi)$")
_TIED = BERT.tensors.tied

JINA_BERT = _family(
    "jina_bert_v2",
    JINA_BERT_FIELDS,
    "JinaBert",
    own_fields=_jina_fields,
    claims=_is_jina,
    published_prefix="JinaBert",
    tensors=TensorNames(prefixes=("bert.",), original_prefix="bert.", tied=_TIED, derived=_DERIVED),
    pooling_field="emb_pooler",
)

MOSAIC_BERT = _family(
    "mosaic_bert",
    MOSAIC_BERT_FIELDS,
    "MosaicBert",
    own_fields=_mosaic_fields,
    claims=_is_mosaic,
    published_prefix="Bert",
    tensors=TensorNames(
        prefixes=("bert.",),
        original_prefix="bert.",
        # transformers' head has its bias twice; the remote code has it in the decoder alone.
        renames=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
        merged={
            ".attention.self.Wqkv.": tuple(f".attention.self.{name}." for name in ("query", "key", "value")),
        },
        tied=_TIED,
        derived=_DERIVED,
    ),
)
