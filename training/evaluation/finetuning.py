"""Fine-tuning of encoders for evaluations: examples as tokens, one training loop for all kinds of heads, predictions.

The loop takes any data that gives batches of tensors, and any model whose output has `logits`; the loss belongs to the
kind of head. See `classifiers.py` and `heads.py` for the models.

Shapes: B rows, S tokens of the longest row, N examples, T tokens of all examples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from gte_deploy.training.evaluation.classifiers import PretrainedEncoder
from gte_deploy.training.evaluation.glue_tasks import Examples
from gte_deploy.training.options import Protocol

EVALUATION_BATCH = 128
_TOKENIZED_AT_ONCE = 10_000

BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""The loss of a batch: a function of the logits, float32, and the labels."""


class TrainingRows(Interface):
    """Data that `fine_tune` reads: a number of examples, of which any subset can become a batch."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, members: NDArray[np.int64], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's inputs and the labels of some examples."""
        ...


# --- examples as tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """N examples as token ids, laid end to end, because a list of small arrays would take ten times the memory.

    `type_ids` is None if the model has only one token type, or if the checkpoint's tokenizer returns no types.
    `labels` has one row for each example.
    """

    input_ids: NDArray[np.int32]  # [T]
    type_ids: NDArray[np.int8] | None  # [T]
    ends: NDArray[np.int64]  # [N + 1]
    labels: NDArray  # [N, ...] int64 or float32
    pad_id: int

    @classmethod
    def of(cls, examples: Examples, *, encoder: PretrainedEncoder, max_length: int) -> Encoded:
        """Tokenize as the checkpoint's tokenizer says. Of two texts the longer one is truncated first."""
        texts = [text[0] if len(text) == 1 else text for text in examples.texts]
        encodings = tokenize(texts, tokenizer=cutting_tokenizer(encoder, max_length))
        return cls.of_encodings(encodings, examples.labels, encoder=encoder)

    @classmethod
    def of_encodings(cls, encodings: Iterator[Encoding], labels: NDArray, *, encoder: PretrainedEncoder) -> Encoded:
        """Lay the tokens of encodings end to end."""
        ids, types, lengths = [], [], []
        for encoding in encodings:
            ids.append(np.array(encoding.ids, dtype=np.int32))
            types.append(np.array(encoding.type_ids, dtype=np.int8))
            lengths.append(len(encoding.ids))
        return cls(
            input_ids=np.concatenate(ids),
            # The runtime and transformers' own tokenizer will feed the fine-tuned model in the same way.
            type_ids=np.concatenate(types) if encoder.token_types else None,
            ends=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            labels=labels,
            pad_id=encoder.tokenizer.pad_token_id,
        )

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return np.diff(self.ends)

    def batch(self, members: NDArray[np.int64], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's inputs [B, S], padded to the longest example of the batch, and the labels [B, ...]."""
        return self.inputs(members, device), torch.from_numpy(self.labels[members]).to(device)

    def inputs(self, members: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """Return the model's inputs [B, S], padded to the longest example of the batch."""
        source, mask = self.places(members)
        inputs = {
            "input_ids": np.where(mask, self.input_ids[source], self.pad_id).astype(np.int64),
            "attention_mask": mask.astype(np.int64),
        }
        if self.type_ids is not None:
            inputs["token_type_ids"] = np.where(mask, self.type_ids[source], 0).astype(np.int64)
        return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}

    def places(self, members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return where in T the tokens of a padded batch lie, [B, S] (0 at padding), and which are no padding."""
        starts, lengths = self.ends[members], self.lengths[members]
        places = np.arange(int(lengths.max()))
        mask = places < lengths[:, None]
        return np.where(mask, starts[:, None] + places, 0), mask


def cutting_tokenizer(
    encoder: PretrainedEncoder, max_length: int, *, strategy: str = "longest_first", stride: int = 0
) -> Tokenizer:
    """Return a copy of the checkpoint's tokenizer that truncates and does not pad.

    Args:
        encoder: the checkpoint.
        max_length: the longest example in tokens.
        strategy: which of two texts is truncated: "longest_first" or "only_second".
        stride: tokens that a truncated text's overflowing parts share with the part before.
    """
    tokenizer = Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    tokenizer.no_padding()
    side = encoder.tokenizer.theirs.truncation_side
    tokenizer.enable_truncation(max_length, stride=stride, strategy=strategy, direction=side)
    return tokenizer


def tokenize(texts: Sequence[Any], *, tokenizer: Tokenizer, in_words: bool = False) -> Iterator[Encoding]:
    """Tokenize texts, or pairs of texts; with `in_words` each text is a list of words."""
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        yield from tokenizer.encode_batch(texts[start : start + _TOKENIZED_AT_ONCE], is_pretokenized=in_words)


# --- training ---------------------------------------------------------------------------------------------------------


def fine_tune(
    model: Any,
    train: TrainingRows,
    *,
    protocol: Protocol,
    seed: int,
    loss_of: BatchLoss | None = None,
    bfloat16: bool = False,
    progress: str | None = None,
) -> list[float]:
    """Fine-tune a model in place, on its device: AdamW, linear warm-up and decay, and a new order in each epoch.

    Args:
        model: a module with a `device`, whose output has `logits`.
        train: the training examples.
        protocol: hyper-parameters. Its weight decay is for matrices alone, as in transformers' Trainer.
        seed: seed of the dropout and of the order of the examples.
        loss_of: the loss; None for that of classes or numbers, see `classification_loss`.
        bfloat16: compute in bfloat16 autocast.
        progress: title of a progress bar on stderr; None for none.

    Returns:
        The loss of each step.
    """
    loss_of = loss_of or classification_loss
    device = model.device
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, protocol.weight_decay), lr=protocol.learning_rate, fused=device.type == "cuda"
    )
    steps = protocol.epochs * math.ceil(len(train) / protocol.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(protocol.warmup_ratio * steps), steps)
    torch.manual_seed(seed)
    model.train()
    losses = []
    with tqdm(total=steps, desc=progress, disable=progress is None, file=sys.stderr, unit="step") as bar:
        for members in _order(len(train), protocol, seed):
            inputs, labels = train.batch(members, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(**inputs).logits.float()
            loss = loss_of(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
            bar.update()
            if bar.n % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return torch.stack(losses).tolist()  # one transfer, so that no step waits for the device


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of classes, or the mean squared error for the float labels of a regression."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _order(size: int, protocol: Protocol, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    for _ in range(protocol.epochs):
        order = generator.permutation(size)
        yield from np.split(order, range(protocol.batch_size, size, protocol.batch_size))


# --- predictions ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model: Any, data: Encoded, *, bfloat16: bool = False) -> NDArray[np.float32]:
    """Compute a classifier's outputs, [N, labels]. Examples of similar length share a batch."""
    return np.stack([rows for rows in _outputs(model, data, bfloat16=bfloat16)])


@torch.inference_mode()
def predict_tokens(model: Any, data: Encoded, *, bfloat16: bool = False) -> list[NDArray[np.float32]]:
    """Compute the outputs of a head on each token: for each example [its tokens, labels]."""
    rows = _outputs(model, data, bfloat16=bfloat16)
    return [row[:length] for row, length in zip(rows, data.lengths, strict=True)]


def _outputs(model: Any, data: Encoded, *, bfloat16: bool) -> list[NDArray[np.float32]]:
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    outputs: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), EVALUATION_BATCH):
        members = order[start : start + EVALUATION_BATCH]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(**data.inputs(members, model.device)).logits.float().cpu().numpy()
        outputs |= {int(member): row for member, row in zip(members, logits, strict=True)}
    return [outputs[number] for number in range(len(order))]
