"""PEFT adapters (LoRA and its kin) beside a checkpoint's weights or in their place: found, and merged with peft."""

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
    """An adapter and what it adapts.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        base: the checkpoint whose weights it changes.
    """

    folder: Path
    base: Path


@dataclass(frozen=True)
class Places:
    """Where the parts of a checkpoint are.

    Args:
        model: the folder of the model: the checkpoint's, or that of its Transformer module.
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
        """The safetensors files in `weights`, found once; see `weight_files`."""
        return weight_files(self.weights)


def places_of(files: CheckpointFiles) -> Places:
    """Where the parts of a checkpoint are: an adapter may have them from its base.

    Raises:
        CheckpointError: the base of an adapter is not to be had.
        ConfigError: modules.json is not honoured.
    """
    model = model_folder(files)
    adapter = find_adapter(model)
    weights = model if adapter is None else model_folder(CheckpointFiles(adapter.base))
    config = model if (model / "config.json").is_file() else weights
    return Places(model, config, weights, adapter, read_sparse_modules(files))


def find_adapter(folder: Path) -> Adapter | None:
    """The adapter in a checkpoint folder, or None.

    Its base is what adapter_config.json names, as transformers takes it: a folder, or a name on the Hugging Face Hub.
    Where that is not to be had, it is the folder's own weights.

    Raises:
        CheckpointError: neither is there.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    name = read_json_object(file).get("base_model_name_or_path")
    try:
        return Adapter(folder, _named_base(folder, name))
    except CheckpointError as error:
        if has_weights(folder):
            logger.warning("%s adapts %r, which is not to be had; the folder's own weights are taken", file, name)
            return Adapter(folder, folder)
        raise CheckpointError(
            f"{folder} holds an adapter and no weights of its own. {file.name} names the base model {name!r}, which "
            f"is not to be had: {error}"
        ) from error


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model with the adapter's changes in its own weights.

    Raises:
        CheckpointError: peft is not installed; the adapter is a pickle, does not fit the model, or has tensors that
            nothing takes.
    """
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"{adapter.folder} has the adapter {ADAPTER_CONFIG}, and without it the answers would be another model's. "
            "Install peft, which merges it (pip install peft), or take the adapter away to load the weights alone."
        )
    refuse_pickle(adapter.folder, ADAPTER_WEIGHTS)
    from peft import PeftModel, get_peft_model_state_dict

    try:
        # autocast would keep the adapter in float32 beside weights in 16 bits.
        adapted: Any = PeftModel.from_pretrained(
            model, str(adapter.folder), local_files_only=True, autocast_adapter_dtype=False
        )
        taken = set(get_peft_model_state_dict(adapted))
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft and torch raise many kinds
        raise CheckpointError(
            f"the adapter in {adapter.folder} does not fit {type(model).__name__} ({type(error).__name__}: {error}). "
            "One that was trained on remote code names modules that transformers' classes do not have; merge it there."
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
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names its own folder, which has no weights")
    return base


def _plain(name: str) -> str:
    return name.replace(".default.", ".")
