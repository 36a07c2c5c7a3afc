"""The model for training: packed attention, the vocabulary projection at masked positions only, and the loss."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.core.errors import ConfigError
from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.config import build_config, read_config
from gte_deploy.models.presets import PRESETS

if TYPE_CHECKING:
    from gte_deploy.training.data.packing import MicroBatch

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # a label that is not predicted: static padding


class PackedMaskedLM(nn.Module):
    """Computes the loss of one packed micro-batch. T tokens, N sequences, M masked tokens."""

    def __init__(self, model: GteForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_positions: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """Return the sum of the masked tokens' cross-entropies in nats, a scalar.

        It is not averaged, because only the caller knows the number of masked tokens of the whole step.

        Args:
            input_ids: `[T] int64`.
            position_ids: `[T] int64`, from 0 in each sequence.
            cu_seqlens: `[N + 1] int32`, the offset of each sequence, and T.
            max_seqlen: upper bound of the sequences' lengths.
            masked_positions: `[M] int64`, positions in the row. Only they are projected onto the vocabulary, whereas
                GteForMaskedLM would project all T tokens.
            labels: `[M] int64`, the ids to predict; -100 is not counted.
        """
        hidden_states = self.model.gte(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        ).last_hidden_state[0]
        logits = self.model.lm_head(hidden_states[masked_positions])
        return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORE_INDEX)


def micro_batch_tensors(batch: MicroBatch, device: torch.device) -> dict[str, Tensor | int]:
    """Copy a micro-batch to `device`, as the arguments of `PackedMaskedLM.forward`. A GPU copies asynchronously."""
    arrays = {
        name: torch.from_numpy(getattr(batch, name))
        for name in ("input_ids", "position_ids", "cu_seqlens", "masked_positions", "labels")
    }
    if device.type == "cuda":
        arrays = {name: array.pin_memory().to(device, non_blocking=True) for name, array in arrays.items()}
    return {**arrays, "max_seqlen": int(batch.max_seqlen)}


def model_config(source: str) -> GteConfig:
    """Return the config of a preset, by its name, or of a folder with a config.json.

    Raises:
        ConfigError: `source` is neither, or is of another family than GTE.
    """
    if source in PRESETS:
        return build_config(source)
    if (Path(source) / "config.json").is_file():
        config = read_config(source)
        if not isinstance(config, GteConfig):
            raise ConfigError(f"model {source!r} has model_type {config.model_type!r}; training knows GTE alone")
        return config
    raise ConfigError(f"model {source!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json")


def initial_model(source: str, *, rope_theta: float, seed: int) -> GteForMaskedLM:
    """Make the model from which a run starts.

    A preset, or a folder without weights, gives random weights from `seed`. A folder with weights gives these; a
    warning tells if they were trained with another RoPE base.

    Raises:
        ConfigError: `source` is neither a preset nor a folder with a config.json.
        CheckpointError: the weights do not fit the config.
    """
    config = model_config(source)
    model = build_model(config, rope_theta=rope_theta, seed=seed)
    if any(Path(source).glob("*.safetensors*")):
        logger.info("starting from the weights of %s", source)
        trained = (config.rope_parameters or {}).get("rope_theta", rope_theta)
        if trained != rope_theta:
            logger.warning(
                "the first stage has rope_theta %g, and the weights were trained with %g; stages.0.rope_theta=%g "
                "goes on with theirs",
                rope_theta,
                trained,
                trained,
            )
        model.load_state_dict(load_model(source, task="fill-mask", dtype=torch.float32).state_dict())
    return model


def build_model(config: GteConfig, *, rope_theta: float, seed: int = 0) -> GteForMaskedLM:
    """Build a float32 model with random weights, packed attention, and a plain RoPE with the base `rope_theta`.

    A stage with another RoPE base needs a new model: transformers computes the frequencies when it builds the model,
    does not store them in the state dict, and does not read the config again.

    Raises:
        ConfigError: the config asks for dropout in the attention.
    """
    register_packed_attention()
    config = copy.deepcopy(config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta)}
    config.architectures = [GteForMaskedLM.__name__]
    if config.attention_probs_dropout_prob:
        raise ConfigError(
            f"attention_probs_dropout_prob is {config.attention_probs_dropout_prob}; packed attention has no dropout: "
            "set it to 0, as all published models do"
        )
    torch.manual_seed(seed)
    model = GteForMaskedLM._from_config(config, attn_implementation=PACKED_ATTENTION, dtype=torch.float32)
    return model.train()
