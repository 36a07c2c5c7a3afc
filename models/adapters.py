"""Finds PEFT adapters (such as LoRA), beside a checkpoint's weights or in place of them, and merges them with peft."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import read_json_object
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import model_folder
from gte_deploy.models.sparse_modules import SparseModules, read_sparse_modules
from gte_deploy.models.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    has_weights,
    refuse_pickle,
    tensor_names,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


@dataclass(frozen=True)
class Adapter:
    """An adapter and its base model.

    Args:
        folder: the folder of adapter_config.json and adapter_model.safetensors.
        base: the folder of the checkpoint whose weights the adapter changes.
    """

    folder: Path
    base: Path


@dataclass(frozen=True)
class Places:
    """The folders of a checkpoint's parts.

    Args:
        model: the folder of the model: the checkpoint itself, or its Transformer module.
        config: the folder of config.json.
        weights: the folder of the weights.
        adapter: the adapter that changes the weights, or None.
        sparse: the modules of a SparseEncoder, or None.
    """

    model: Path
    config: Path
    weights: Path
    adapter: Adapter | None
    sparse: SparseModules | None

    @cached_property
    def weight_files(self) -> Mapping[Path, set[str] | None]:
        """The safetensors files in `weights`, found once; see `weight_files.weight_files`."""
        return weight_files(self.weights)


def places_of(files: CheckpointFiles) -> Places:
    """Find the parts of a checkpoint; an adapter may take them from its base model.

    Raises:
        CheckpointError: the base model of an adapter is not available.
        ConfigError: modules.json has a setting that is not supported.
    """
    model = model_folder(files)
    adapter = find_adapter(model)
    weights = model if adapter is None else model_folder(CheckpointFiles(adapter.base))
    config = model if (model / "config.json").is_file() else weights
    return Places(model, config, weights, adapter, read_sparse_modules(files))


def find_adapter(folder: Path) -> Adapter | None:
    """Find the adapter in a checkpoint folder; return None if there is none.

    As in transformers, adapter_config.json names the base model: a folder, or a name on the Hugging Face Hub. If that
    is not available, the folder's own weights are the base.

    Raises:
        CheckpointError: neither base is available.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    name = read_json_object(file).get("base_model_name_or_path")
    try:
        return Adapter(folder, _named_base(folder, name))
    except CheckpointError as error:
        if has_weights(folder):
            logger.warning("%s adapts %r, which is not available; the folder's own weights are used", file, name)
            return Adapter(folder, folder)
        raise CheckpointError(
            f"{folder} holds an adapter and no weights of its own. {file.name} names the base model {name!r}, which "
            f"is not available: {error}"
        ) from error


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Return the model with the adapter's changes merged into its weights.

    Raises:
        CheckpointError: peft is not installed; the adapter is a pickle, does not fit the model, or has tensors that the
            model does not use.
    """
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"{adapter.folder} has the adapter {ADAPTER_CONFIG}, and without it the model would give other answers. "
            "Install peft, which merges it (pip install peft), or remove the adapter to load the weights alone."
        )
    refuse_pickle(adapter.folder, ADAPTER_WEIGHTS)
    from peft import PeftModel, get_peft_model_state_dict

    try:
        # With autocast, the adapter would stay float32 beside 16-bit weights.
        adapted: Any = PeftModel.from_pretrained(
            model, str(adapter.folder), local_files_only=True, autocast_adapter_dtype=False
        )
        taken = set(get_peft_model_state_dict(adapted))
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft and torch raise many types
        raise CheckpointError(
            f"the adapter in {adapter.folder} does not fit {type(model).__name__} ({type(error).__name__}: {error}). "
            "An adapter trained on remote code names modules that transformers' classes lack; merge it in that code."
        ) from error
    stored = {_plain(name) for name in tensor_names(adapter.folder / ADAPTER_WEIGHTS)}
    if odd := sorted(stored ^ {_plain(name) for name in taken}):
        named = ", ".join(odd[:_MAX_NAMED])
        raise CheckpointError(f"{adapter.folder / ADAPTER_WEIGHTS} does not hold what {ADAPTER_CONFIG} says: {named}")
    return merged


def _named_base(folder: Path, name: Any) -> Path:
    from gte_deploy.models import resolve_checkpoint

    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {json.dumps(name)}")
    if (beside := folder / name).is_dir():
        return beside
    base = resolve_checkpoint(name)
    if base.resolve() == folder.resolve() and not has_weights(folder):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names its own folder as the base model, which has no weights")
    return base


def _plain(name: str) -> str:
    return name.replace(".default.", ".")
