"""The RoBERTa and XLM-R families: BERT's layers, with positions that are counted after the padding's row of the table.

The first token has the position pad_token_id + 1, so a table of 514 rows is for texts of 512 tokens. The two families
differ in their tokenizers and in the names of their classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.families.bert import CONFIG_FIELDS, FIRST_NAMES, class_names, config_reader, plain_config, sites
from gte_deploy.models.fields import FileFields, honoured
from gte_deploy.models.reading import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FIELDS = {
    **CONFIG_FIELDS,
    "max_position_embeddings": honoured("No text may have more tokens than this minus pad_token_id minus 1."),
    "pad_token_id": honoured("Positions are counted from it; it must be the tokenizer's."),
}


def _family(model_type: str, title: str, prefix: str) -> Family:
    read_fields = config_reader(f"{prefix}Config")

    def read_config(raw: Mapping[str, Any], file: Path) -> PreTrainedConfig:
        config = read_fields(raw, file)
        reader = Reader({"pad_token_id": config.pad_token_id}, file, {})
        reader.integer("pad_token_id", at_least=0)  # null would give no position
        if (rows := config.max_position_embeddings) <= config.pad_token_id + 1:
            raise reader.refuse("max_position_embeddings", rows, f"more than pad_token_id ({config.pad_token_id}) + 1")
        return config

    return Family(
        model_types=(model_type,),
        fields=FileFields(
            name=f"config.json of {title}", reads=f'`model_type` "{model_type}".', fields=_FIELDS, unknown="ignored"
        ),
        read_config=read_config,
        native_config=plain_config,
        classes=class_names(prefix),
        architecture_prefixes=(prefix,),
        heads={"fill-mask": "lm_head", "classify": "classifier.out_proj", "token-classify": "classifier"},
        classifier_dense="classifier.dense",
        positions="absolute",
        counts_after_padding=True,
        sites=sites,
        # Published checkpoints, and classifiers of older versions of transformers, also hold a pooler.
        left_out=dict.fromkeys(("fill-mask", "classify", "token-classify"), ("pooler.",)),
        tensors=TensorNames(
            prefixes=("roberta.",),
            renames=FIRST_NAMES,
            tied={
                "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
                "lm_head.decoder.bias": "lm_head.bias",
            },
            derived=re.compile(r"(^|\.)position_ids$"),
        ),
    )


ROBERTA = _family("roberta", "RoBERTa", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLM-R", "XLMRoberta")
