"""Export of a training checkpoint as a Hugging Face folder, in the native or the original layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.core.errors import CheckpointError
from gte_deploy.models.checkpoint import copy_tokenizer, save_model
from gte_deploy.training.model import build_model
from gte_deploy.training.state import TOKENIZER_FOLDER, Checkpoint


def checkpoint_model(checkpoint: Checkpoint) -> GteForMaskedLM:
    """Load the model of a checkpoint, float32 on the CPU, with the RoPE of its stage.

    Raises:
        CheckpointError: the weights do not fit the recorded config.
    """
    facts = dict(checkpoint.state.model_config)
    model = build_model(GteConfig.from_dict(facts), rope_theta="keep")
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: GteForMaskedLM, checkpoint: Checkpoint) -> None:
    """Fill a model from a checkpoint, which holds tied weights once.

    Raises:
        CheckpointError: a parameter is missing, has another shape, or does not belong to the model.
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
    """Write a folder that `from_pretrained` and gte-export read: config.json, safetensors and tokenizer files.

    Args:
        checkpoint: the checkpoint to export; see `find_checkpoint`.
        folder: the folder to write.
        layout: "native" (the layout of transformers' own GTE) or "original" (that of the published checkpoints).
        tokenizer: folder with a tokenizer.json; None takes the tokenizer that the run kept.
        dtype: dtype of the stored weights.

    Raises:
        CheckpointError: the weights do not fit, or there is no tokenizer.
    """
    model = checkpoint_model(checkpoint)
    model.set_attn_implementation("sdpa")
    copy_tokenizer(tokenizer or checkpoint.path.parent.parent / TOKENIZER_FOLDER, folder)
    save_model(model, folder, layout=layout, dtype=dtype)
