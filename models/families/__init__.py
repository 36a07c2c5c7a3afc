"""The families of models by the `model_type` of their config.json.

To add a family, write its module here and its line in `FAMILIES`. If its published config.json has the `model_type` of
another family, `SHARED_TYPES` has another line for it.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family

FAMILIES: Mapping[str, str] = {
    "gte": "gte:GTE",
    "new": "gte:GTE",
    "bert": "bert:BERT",
    "roberta": "roberta:ROBERTA",
    "xlm-roberta": "roberta:XLM_ROBERTA",
    "jina_bert_v2": "alibi_bert:JINA_BERT",
    "mosaic_bert": "alibi_bert:MOSAIC_BERT",
    "nomic_bert": "nomic_bert:NOMIC_BERT",
    "modernbert": "modernbert:MODERNBERT",
}
"""`model_type` -> module and object, imported when they are asked for. "new" is the original layout of "gte"."""

SHARED_TYPES: Mapping[str, tuple[str, ...]] = {"bert": ("jina_bert_v2", "mosaic_bert")}
"""`model_type` -> further families whose published config.json has it; see `Family.claims`."""


def family_of_fields(raw: Mapping[str, Any], file: object = "config.json") -> Family:
    """The family of a checkpoint.

    Args:
        raw: the contents of config.json.
        file: the path of config.json, for the error.

    Raises:
        ConfigError: no family has this model type.
    """
    model_type = raw.get("model_type")
    others = SHARED_TYPES.get(model_type, ()) if isinstance(model_type, str) else ()
    candidates = (family_of_type(name, file) for name in others)
    claiming = (family for family in candidates if family.claims is not None and family.claims(raw))
    return next(claiming, None) or family_of_type(model_type, file)


def family_of_type(model_type: object, file: object = "config.json") -> Family:
    """The family of a `model_type`.

    Args:
        model_type: the value in config.json.
        file: the file that has it, for the error.

    Raises:
        ConfigError: no family has this model type.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(f'"{name}"' for name in FAMILIES)
        raise ConfigError(
            f"{file}: model_type is {model_type!r}; expected one of {known}.",
            advice="Only these encoders of text are read; docs/families.md describes them. For another model, "
            "`optimum-cli export onnx --model CHECKPOINT OUTPUT` writes a graph, without the comparisons of "
            "gte-export.",
        )
    module, _, name = FAMILIES[model_type].partition(":")
    found: Family = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def family_of(config: Any) -> Family:
    """The family of a model with this config of transformers.

    Raises:
        ConfigError: no family has its model type.
    """
    return family_of_type(config.model_type, type(config).__name__)


def head_of(model: Any, task: TaskName) -> Any:
    """The module of `model` that turns hidden states into the logits of `task`; see `Family.heads`.

    Raises:
        ConfigError: the family has no head for the task.
    """
    heads, kind = family_of(model.config).heads, model.config.model_type
    if task not in heads:
        raise ConfigError(f"models of model_type {kind!r} have no head for {task}; expected one of {', '.join(heads)}")
    return model.get_submodule(heads[task])


def head_transform_of(model: Any) -> Any:
    """The module of `model` that stands before the head of every task, or None; see `Family.head_transform`."""
    path = family_of(model.config).head_transform
    return None if path is None else model.get_submodule(path)


def fusion_sites(model: Any) -> Mapping[str, int]:
    """How often each fusion pass must fire on a graph of `model`; see `Family.sites`."""
    return family_of(model.config).sites(model.config)
