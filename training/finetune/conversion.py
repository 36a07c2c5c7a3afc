"""Conversion of checkpoints: to the native layout and float32 for training, or between layouts and dtypes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from gte_deploy.core.errors import ConfigError
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.checkpoint import copy_tokenizer, load_described, save_model
from gte_deploy.models.description import Description, describe

_LIBRARY_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def convert_checkpoint(name: str, folder: Path, *, layout: str = "native", dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint in another layout or dtype, with its tokenizer and sentence-transformers' files.

    Args:
        name: a folder or hub id in either layout, or the built-in model.
        folder: the folder to write.
        layout: "native" or "original".
        dtype: dtype of the stored weights.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its family lacks the layout.
        ConfigError: its transformer lies in an inner folder, or it has Dense modules.
    """
    description = describe(resolve_checkpoint(name))
    source = description.folder
    if description.places.model != source or description.dense:
        raise ConfigError(
            f"{source} has its transformer in {description.places.model}, or Dense modules; only checkpoints without "
            "them are converted"
        )
    model = load_described(description)
    copy_tokenizer(source, folder)
    for module in description.files.modules or ():
        if module.path and (source / module.path / "config.json").is_file():
            (folder / module.path).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / module.path / "config.json", folder / module.path / "config.json")
    for file in _LIBRARY_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    save_model(model, folder, layout=layout, dtype=dtype)


def write_native(description: Description, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights, config and tokenizer of a checkpoint in the native layout.

    Raises:
        CheckpointError: a tensor is missing or does not fit.
    """
    model = load_described(description, dtype=dtype)
    save_model(model, folder, layout="native", dtype=dtype)
    copy_tokenizer(description.places.model, folder)
