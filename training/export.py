"""A training checkpoint as a Hugging Face folder, in either layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.errors import CheckpointError
from gte_deploy.models.checkpoint import copy_tokenizer, save_model
from gte_deploy.training.model import build_model
from gte_deploy.training.state import STATE_FILE, Checkpoint, CheckpointStore, read_checkpoint

CHECKPOINTS_FOLDER = "checkpoints"
TOKENIZER_FOLDER = "tokenizer"


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its folder, or the newest whole one of a run's output folder.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    if (path / STATE_FILE).is_file():
        return read_checkpoint(path)
    checkpoint = CheckpointStore(path / CHECKPOINTS_FOLDER).latest()
    if checkpoint is None:
        raise CheckpointError(f"{path} is neither a training checkpoint nor the output folder of a run that has one")
    return checkpoint


def checkpoint_model(checkpoint: Checkpoint) -> GteForMaskedLM:
    """The model of a checkpoint, float32 on the CPU, with the RoPE base of its stage.

    Raises:
        CheckpointError: the weights do not fit the recorded config.
    """
    facts = dict(checkpoint.state.model_config)
    model = build_model(GteConfig.from_dict(facts), rope_theta=facts["rope_parameters"]["rope_theta"])
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: GteForMaskedLM, checkpoint: Checkpoint) -> None:
    """Fill the model from a checkpoint, which holds tied weights once.

    Raises:
        CheckpointError: a parameter is missing, left over or misshapen.
    """
    tensors, parameters = checkpoint.model_tensors(), dict(model.named_parameters())
    odd = sorted(set(tensors) ^ set(parameters))
    odd += [name for name in set(tensors) & set(parameters) if tensors[name].shape != parameters[name].shape]
    if odd:
        raise CheckpointError(f"{checkpoint.path} does not fit the model; differing: {', '.join(odd[:5])}")
    model.load_state_dict(tensors, strict=False)


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    layout: str = "native",
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json, safetensors and tokenizer files, which `from_pretrained` and gte-export read.

    Args:
        checkpoint: see `find_checkpoint`.
        folder: made if missing.
        layout: "native" (transformers' own GTE) or "original" (the published checkpoints').
        tokenizer: folder with tokenizer.json; None takes the one that the run kept.
        dtype: of the stored weights.

    Raises:
        CheckpointError: the weights do not fit, or there is no tokenizer.
    """
    model = checkpoint_model(checkpoint)
    model.set_attn_implementation("sdpa")
    copy_tokenizer(tokenizer or checkpoint.path.parent.parent / TOKENIZER_FOLDER, folder)
    save_model(model, folder, layout=layout, dtype=dtype)
