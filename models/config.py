"""config.json of a checkpoint, read and written by the family that its `model_type` names. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import Task
from gte_deploy.models.adapters import find_adapter
from gte_deploy.models.families import family_of, family_of_type
from gte_deploy.models.families.base import Family
from gte_deploy.models.fields import check_fields
from gte_deploy.models.module_list import read_modules
from gte_deploy.models.modules import model_folder
from gte_deploy.models.reading import read_json
from gte_deploy.models.sparse_modules import is_sparse_encoder
from gte_deploy.models.weight_files import tensor_names, weight_files

if TYPE_CHECKING:
    from transformers import GteConfig, PreTrainedConfig


def task_of(folder: str | Path) -> Task:
    """The task a checkpoint was made for, one of gte_deploy.core.spec.TASKS. Needs no torch.

    A SparseEncoder's modules make it "sparse", where they can be honoured. A sentence-transformers Pooling module
    (modules.json) makes it "embed" whatever head is stored beside the encoder (gte-multilingual-base stores a
    token-weight head); else `architectures` decides, and where that is missing the names of the tensors.

    Raises:
        CheckpointError: the folder holds no checkpoint.
        ConfigError: no family has the model type, or `architectures` names a head that its family does not have.
    """
    outer = Path(folder)
    folder = config_folder(outer)
    raw = read_json(folder / "config.json")
    if is_sparse_encoder(outer):
        return "sparse"
    if any(module.kind == "Pooling" for module in read_modules(outer) or ()):
        return "embed"
    names = raw.get("architectures")
    if not names:
        return task_of_tensors(folder)
    known = _family_in(folder, raw).architectures
    task = known.get(str(names[0])) if isinstance(names, list) else None
    if task is None:
        file = folder / "config.json"
        raise ConfigError(f"{file}: architectures is {names!r}; this package knows {', '.join(known)}")
    return task


def task_of_tensors(folder: Path) -> Task:
    """The task of the stored head, by the names of the stored tensors, whatever modules stand beside it."""
    folder = config_folder(folder)
    names = [name for file in weight_files(folder) for name in tensor_names(file)]
    family = _family_in(folder, read_json(folder / "config.json"))
    if family.has_head(names, "fill-mask"):
        return "fill-mask"
    if not family.has_head(names, "classify") and not family.has_head(names, "token-classify"):
        return "embed"
    return "classify" if any("pooler." in name for name in names) else "token-classify"


def config_folder(folder: Path) -> Path:
    """Where the config.json of a checkpoint is: in the folder, in its Transformer module's, or in an adapter's base.

    Raises:
        CheckpointError: the base of an adapter is not to be had.
    """
    inner = model_folder(folder)
    adapter = None if (inner / "config.json").is_file() else find_adapter(inner)
    return inner if adapter is None else model_folder(adapter.base)


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Read `folder`/config.json in any layout of any family; `overrides` replace fields of it.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: a field is missing, malformed or not supported by the model; the message names it.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file) | dict(overrides or {})
    family = _family_in(Path(folder), raw)
    check_fields(raw, file, family.fields)
    return family.read_config(raw, file)


def build_config(name: str) -> GteConfig:
    """The config of a preset, for a model to be trained from scratch. Every preset is of the GTE family."""
    from gte_deploy.models.families.gte import preset_config

    return preset_config(name)


def original_config(config: PreTrainedConfig, *, task: Task, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the family's original layout; `read_config` of them gives `config` again.

    Raises:
        ConfigError: the family has no original layout, or that cannot express the config.
    """
    write = family_of(config).original_config
    if write is None:
        raise ConfigError(f"models of model_type {config.model_type!r} have no original layout; write the native one")
    return write(config, task=task, dtype=dtype)


def native_config(config: PreTrainedConfig, *, task: Task, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the native layout, readable by transformers alone."""
    return family_of(config).native_config(config, task=task, dtype=dtype)


def _family_in(folder: Path, raw: Mapping[str, Any]) -> Family:
    return family_of_type(raw.get("model_type"), folder / "config.json")
