"""Classifiers to fine-tune: the encoder of a checkpoint with a new head.

Checkpoints of the package's families load strictly, into the family's own class for classification. All others load
with transformers' AutoModelForSequenceClassification, without remote code.

Shapes: B rows, S tokens of the longest row, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.hub import HubModel
from gte_deploy.models import CHECKPOINT_PATTERNS, locate
from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention
from gte_deploy.models.checkpoint import load_described, load_model
from gte_deploy.models.config import task_of
from gte_deploy.models.description import Description, describe
from gte_deploy.models.families import FAMILIES
from gte_deploy.models.families.base import Family
from gte_deploy.models.heads import encode_packed
from gte_deploy.models.reading import read_required_json
from gte_deploy.models.tokenizer import ResolvedTokenizer, resolve_tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_PATTERNS = tuple(pattern for pattern in CHECKPOINT_PATTERNS if "safetensors" not in pattern)
# The two names that configs of transformers give to the dropout of attention.
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


@dataclass(frozen=True)
class PretrainedEncoder:
    """A checkpoint whose encoder is to be fine-tuned.

    Args:
        folder: the checkpoint.
        tokenizer: its tokenizer.
        token_types: whether the model gets the token types of the tokenizer.
        max_tokens: the longest text in tokens that model and tokenizer allow; None for no known limit.
        description: what the package knows of the checkpoint; None where no family has its model type.
    """

    folder: Path
    tokenizer: ResolvedTokenizer
    token_types: bool
    max_tokens: int | None
    description: Description | None

    def classifier(self, *, num_labels: int, seed: int) -> PreTrainedModel:
        """Load a sequence classifier, float32 on the CPU: the checkpoint's encoder with a new head.

        Every weight of the encoder comes from the checkpoint, and so do layers that its masked-LM head shares with the
        classifier. Only the other layers of the head, and a pooler if the checkpoint has none, are new; `seed` draws
        their weights.

        Raises:
            CheckpointError: the weights do not fit, or transformers does not support the architecture without remote
                code.
        """
        torch.manual_seed(seed)
        if self.description is None:
            return _other_classifier(self.folder, num_labels)
        return _family_classifier(self.description, num_labels)

    def keeps_padding_because(self) -> str | None:
        """Why the encoder cannot be fine-tuned without padding; None if it can."""
        if self.description is None:
            return "its model_type is of no family of this package"
        config = self.description.config
        if not self.description.family.runs_packed:
            return f"attention without padding does not compute {self.description.family.positions} positions"
        dropouts = {name: rate for name in _ATTENTION_DROPOUTS if (rate := getattr(config, name, 0.0))}
        if dropouts:
            shown = ", ".join(f"{name} is {rate}" for name, rate in dropouts.items())
            return f"{shown}, and attention without padding has no dropout"
        return None


def open_encoder(folder: Path, *, tokenizer: Path | None = None) -> PretrainedEncoder:
    """Read everything of a checkpoint but its weights.

    Args:
        folder: the checkpoint.
        tokenizer: folder of the tokenizer; None for the checkpoint's.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the config asks for something that this package does not support, or its family has no class for
            classification.
    """
    raw = read_required_json(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        resolved = resolve_tokenizer(tokenizer or folder)
        # As the families' own rule, from the file: transformers' config may not know the field.
        has_types = int(raw.get("type_vocab_size") or 0) > 1 and resolved.gives_token_types
        return PretrainedEncoder(folder, resolved, has_types, resolved.max_length, None)
    description = describe(folder, task="embed", tokenizer_folder=tokenizer)
    if "classify" not in description.family.classes:
        raise ConfigError(
            f"{folder}: models of model_type {raw['model_type']!r} have no class for classify; there are "
            f"{', '.join(description.family.classes)}"
        )
    spec = description.spec
    return PretrainedEncoder(folder, description.tokenizer, spec.token_types, spec.max_length, description)


def resolve_tokenizer_folder(name: str) -> Path:
    """Find a folder with a tokenizer: of a path, a preset's name or a hub id, of which only small files are downloaded.

    Raises:
        CheckpointError: the name is none of these, or the download failed.
    """
    found = locate(name)
    return found.download(_TOKENIZER_PATTERNS) if isinstance(found, HubModel) else found


def start_from(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the weights of a classifier with another number of labels into `model`, whose last layer stays new.

    Raises:
        CheckpointError: the models differ in more than the layer that has a row per label.
    """
    own = model.state_dict()
    odd = sorted(own.keys() ^ tensors.keys())
    new = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    odd += [name for name in new if own[name].shape != (model.num_labels, *tensors[name].shape[1:])]
    if odd:
        raise CheckpointError(f"the checkpoint to start from does not fit; differing: {', '.join(odd[:5])}")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in new}, strict=False)


def run_without_padding(model: PreTrainedModel) -> None:
    """Let the encoder of a classifier compute no padding, in place. Inputs, outputs and the head stay as they are.

    The encoder gets padded rows [B, S], runs on their tokens as one row, and returns hidden states [B, S, H] that are
    0 at padding. The family's `runs_packed` must be true, and its attention must have no dropout; see
    `PretrainedEncoder.keeps_padding_because`.
    """
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    encoder: Any = model.base_model
    packed_forward = encoder.forward

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        if "cu_seqlens" in kwargs:  # the call of encode_packed below
            return packed_forward(input_ids=input_ids, **kwargs)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch = Batch(
            input_ids=input_ids.cpu().numpy(),
            attention_mask=mask.cpu().numpy(),
            token_type_ids=None if token_type_ids is None else token_type_ids.cpu().numpy(),
        )
        states = encode_packed(encoder, batch, input_ids.device)
        pooled = None if states.pooler is None else states.pooled()
        return BaseModelOutputWithPooling(last_hidden_state=states.padded(states.hidden), pooler_output=pooled)

    encoder.forward = forward


def _family_classifier(description: Description, num_labels: int) -> PreTrainedModel:
    encoder, family = load_described(description), description.family
    config = encoder.config
    config.num_labels = num_labels
    model = family.model_class("classify")._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    # An embedding model's Dense modules after the pooling are no part of the encoder.
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("sentence_proj")}
    missing, unexpected = model.base_model.load_state_dict(state, strict=False)
    left = [name for name in (*missing, *unexpected) if not name.startswith("pooler.")]
    if left:
        raise CheckpointError(
            f"{description.folder} does not fit {type(model).__name__}; differing: {', '.join(left[:5])}"
        )
    _load_shared_head(model, family, description.folder)
    return model


def _load_shared_head(model: PreTrainedModel, family: Family, folder: Path) -> None:
    """Load the layers of the head that have the names and shapes of layers in the checkpoint's masked-LM head.

    transformers loads them too, by their names: some families classify on the layers that stand before the decoder.
    """
    encoder, last = f"{model.base_model_prefix}.", f"{family.heads['classify']}."
    head = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith((encoder, last))}
    if not head or "fill-mask" not in family.classes or task_of(folder) != "fill-mask":
        return
    with torch.device("meta"):
        names = family.model_class("fill-mask")(model.config).state_dict()
    if not any(name in names and names[name].shape == tensor.shape for name, tensor in head.items()):
        return
    stored = load_model(folder, task="fill-mask").state_dict()
    shared = {
        name: stored[name] for name, tensor in head.items() if name in names and stored[name].shape == tensor.shape
    }
    model.load_state_dict(shared, strict=False)
    logger.info("%s: the classifier starts with the masked-LM head's %s", folder, ", ".join(sorted(shared)))


def _other_classifier(folder: Path, num_labels: int) -> PreTrainedModel:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=num_labels,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:  # transformers raises these for files, configs and unknown architectures
        raise CheckpointError(
            f"transformers cannot load {folder} by itself as a sequence classifier ({error}). It needs a known "
            "model_type and safetensors weights; remote code is never run"
        ) from error
    # transformers only warns of weights that it initialized itself: the score of a half-loaded encoder would mislead.
    prefix = f"{model.base_model_prefix}."
    invented = [name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in f".{name}"]
    invented += [str(item) for item in info["mismatched_keys"]]
    if invented:
        raise CheckpointError(f"{folder} does not fill the encoder; missing: {', '.join(sorted(invented)[:5])}")
    return model
