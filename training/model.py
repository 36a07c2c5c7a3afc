"""The model for training: packed attention, the vocabulary projection at masked positions only, and the loss."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GteConfig, GteForMaskedLM
from transformers.activations import gelu

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.hub import HubModel
from gte_deploy.models import CHECKPOINT_PATTERNS, locate
from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.config import build_config, read_config
from gte_deploy.models.presets import PRESETS
from gte_deploy.training.cross_entropy import Softmax, linear_cross_entropy, softmax_of_labels
from gte_deploy.training.last_layer import choose_rows_in_last_layer, rows_before

if TYPE_CHECKING:
    from gte_deploy.training.data.packing import MicroBatch
    from gte_deploy.training.recipe import Recipe

logger = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 1024  # masked tokens; bounds the memory of their logits over a vocabulary of 250,000


class PackedMaskedLM(nn.Module):
    """Computes the loss of one packed micro-batch. T tokens, N sequences, M masked tokens.

    The last layer runs for the masked tokens only (see `training/last_layer.py`), and no tensor holds all logits (see
    `training/cross_entropy.py`). It takes over the model, whose own forward does not run after that.
    """

    def __init__(self, model: GteForMaskedLM) -> None:
        super().__init__()
        choose_rows_in_last_layer(model)
        self.model = model
        self._transform: Callable[[Any, Tensor], Tensor] = _transform
        self._softmax: Softmax = softmax_of_labels

    def compile_parts(self) -> None:
        """Compile each layer, the head and the softmax of the loss with torch.compile, in place.

        Each layer by itself: one small graph is compiled once and serves all layers, however they are wrapped. The
        number of masked tokens varies; the first other number compiles once more, for any number.
        """
        for layer in self.model.gte.layers:
            layer.compile()
        self._transform, self._softmax = torch.compile(_transform), torch.compile(softmax_of_labels)

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
            masked_positions: `[M] int64`, positions in the row, ascending. Only they go through the last layer and the
                vocabulary projection, whereas GteForMaskedLM would take all T tokens.
            labels: `[M] int64`, the ids to predict; -100 is not counted.
        """
        rows = self._rows(input_ids, position_ids, cu_seqlens, max_seqlen, masked_positions)
        head = self.model.lm_head
        features, decoder = self._transform(head, rows), head.decoder
        return linear_cross_entropy(features, decoder.weight, decoder.bias, labels, softmax=self._softmax)

    def predictions(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_positions: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss `[M] float32` and the rank `[M] int64` of each masked token; arguments as of `forward`."""
        rows = self._rows(input_ids, position_ids, cu_seqlens, max_seqlen, masked_positions)
        return token_scores(self.model.lm_head, rows, labels)

    def _rows(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, masked_positions: Tensor
    ) -> Tensor:
        """Return the hidden states of the masked tokens, `[M, H]`."""
        gte = self.model.gte
        # Kernels refuse tensors without rows, and all ranks need the same collective operations.
        chosen = masked_positions if len(masked_positions) else masked_positions.new_zeros(1)
        hidden_states = gte.embeddings(input_ids=input_ids[None])  # [1, T, H]
        shared = {
            "position_embeddings": gte.rotary_emb(hidden_states, position_ids[None]),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
        }
        *layers, last = gte.layers
        for layer in layers:
            hidden_states = layer(hidden_states, **shared)
        rows = last(hidden_states, rows=chosen, cu_seqlens_q=rows_before(chosen, cu_seqlens), **shared)[0]
        return rows[: len(masked_positions)]


def _transform(head: Any, rows: Tensor) -> Tensor:
    """Everything of GteLMHead before the projection onto the vocabulary, `[M, H]`."""
    return head.layer_norm(gelu(head.dense(rows)))


def token_scores(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss `[M] float32` and the rank `[M] int64` of each label, a block of rows at a time.

    A rank is the number of words with a higher logit: 0 for the best answer.

    Args:
        head: from hidden states `[m, H]` to logits over the vocabulary `[m, V]`.
        hidden: `[M, H]`.
        labels: `[M] int64`.
    """
    losses, ranks = [], []
    for rows, wanted in zip(hidden.split(_LOGITS_AT_ONCE), labels.split(_LOGITS_AT_ONCE), strict=True):
        if len(wanted):
            logits = head(rows).float()
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            ranks.append((logits > logits.gather(1, wanted[:, None])).sum(dim=1))
    if not losses:
        return labels.new_empty(0, dtype=torch.float32), labels.new_empty(0)
    return torch.cat(losses), torch.cat(ranks)


def micro_batch_tensors(batch: MicroBatch, device: torch.device) -> dict[str, Tensor | int]:
    """Copy a micro-batch to `device`, as the arguments of `PackedMaskedLM.forward`. A GPU copies asynchronously."""
    arrays = {
        name: torch.from_numpy(getattr(batch, name))
        for name in ("input_ids", "position_ids", "cu_seqlens", "masked_positions", "labels")
    }
    if device.type == "cuda":
        arrays = {name: array.pin_memory().to(device, non_blocking=True) for name, array in arrays.items()}
    return {**arrays, "max_seqlen": int(batch.max_seqlen)}


def model_source(recipe: Recipe, *, weights: bool = True) -> Path | None:
    """Return the folder of the model that a recipe names, or None for a preset that starts from random weights.

    A hub id is downloaded once into the Hugging Face cache; without `weights` only its config.json.

    Raises:
        CheckpointError: the model is neither a preset, a folder nor a hub id, or the download failed.
        ConfigError: the folder has no config.json.
    """
    if recipe.model in PRESETS and not recipe.pretrained:
        return None
    found = locate(recipe.model)
    patterns = CHECKPOINT_PATTERNS if weights else ("config.json",)
    folder = found.download(patterns) if isinstance(found, HubModel) else found
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model {str(folder)!r} has no config.json; training starts from a checkpoint's folder")
    return folder


def model_config(recipe: Recipe, source: Path | None) -> GteConfig:
    """Return the config of a recipe's model. Arguments as of `initial_model`.

    Raises:
        ConfigError: the model is of another family than GTE.
    """
    if source is None:
        return build_config(recipe.model)
    config = read_config(source)
    if not isinstance(config, GteConfig):
        raise ConfigError(f"model {recipe.model!r} has model_type {config.model_type!r}; training knows GTE alone")
    return config


def initial_model(recipe: Recipe, source: Path | None) -> GteForMaskedLM:
    """Make the model from which a run starts.

    A preset, or a folder without weights, gives random weights from the seed of the recipe. A folder with weights gives
    these, in either layout; a warning tells if they were trained with another RoPE than that of the first stage.

    Args:
        recipe: its model, seed, first stage, and `pretrained` count.
        source: the folder of its model, or None (see `model_source`).

    Raises:
        ConfigError: the recipe asks for pretrained weights, and there are none.
        CheckpointError: the weights do not fit the config.
    """
    config = model_config(recipe, source)
    model = build_model(config, rope_theta=recipe.stages[0].rope_theta, seed=recipe.seed)
    if source is None or not any(source.glob("*.safetensors*")):
        if recipe.pretrained:
            raise ConfigError(f"pretrained is true, but model {recipe.model!r} has no weights (*.safetensors)")
        return model
    logger.info("starting from the weights of %s", source)
    trained, first = config.rope_parameters or {}, model.config.rope_parameters
    if trained != first:
        logger.warning(
            "the first stage has the RoPE %s, and the weights were trained with %s; stages.0.rope_theta=keep goes on "
            "with theirs",
            first,
            trained,
        )
    model.load_state_dict(load_model(source, task="fill-mask", dtype=torch.float32).state_dict())
    return model


def build_model(config: GteConfig, *, rope_theta: float | Literal["keep"], seed: int = 0) -> GteForMaskedLM:
    """Build a float32 model with random weights and packed attention.

    A number as `rope_theta` gives a plain RoPE with this base; "keep" leaves that of the config, with its scaling.

    A stage with another RoPE base needs a new model: transformers computes the frequencies when it builds the model,
    does not store them in the state dict, and does not read the config again.

    Raises:
        ConfigError: the config asks for dropout in the attention.
    """
    register_packed_attention()
    config = copy.deepcopy(config)
    if rope_theta != "keep":
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
