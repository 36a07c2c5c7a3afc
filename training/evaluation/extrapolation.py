"""Measures whether a checkpoint uses long contexts: the masked-token loss by position and by context length.

Only documents that fill a row of the longest length are read. For the loss by context length, the same rows are cut
into windows of each length. The same tokens are then predicted from more or fewer neighbours; only the context differs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import GteForMaskedLM

from gte_deploy.core.errors import ConfigError, InputError, NonFiniteError
from gte_deploy.core.files import write_with
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention
from gte_deploy.models.checkpoint import load_model
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.packing import MicroBatch, StepSettings, micro_batches
from gte_deploy.training.data.sampling import NUM_SPECIAL, ChunkIndex, Chunking, Resampling
from gte_deploy.training.distributed import choose_device
from gte_deploy.training.evaluation.held_out import ratio_of_sums
from gte_deploy.training.figures import new_figure
from gte_deploy.training.model import micro_batch_tensors
from gte_deploy.training.options import ExtrapolationOptions

_SHORTEST_CONTEXT = 128
_LOGITS_AT_ONCE = 1024  # masked tokens; bounds the memory of their logits over a vocabulary of 250,000


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Mean loss in nats per masked token of the positions [start, stop); `error` is its standard error over rows."""

    start: int
    stop: int
    loss: float
    error: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ContextLoss:
    """Mean loss in nats per masked token with windows of `length` tokens; `error` is its standard error over rows."""

    length: int
    loss: float
    error: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """The result of `extrapolate`, over `rows` rows of `max_length` tokens."""

    model: str
    rows: int
    max_length: int
    mask_probability: float
    seed: int
    by_position: tuple[Bucket, ...]
    by_context: tuple[ContextLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def extrapolate(
    model: str,
    *,
    data: Path,
    options: ExtrapolationOptions = ExtrapolationOptions(),  # noqa: B008 - frozen
    progress: bool = False,
) -> Extrapolation:
    """Measure a masked-LM checkpoint on the long documents of a corpus.

    Args:
        model: checkpoint folder, preset name or hub id.
        data: corpus that `gte-train prepare` wrote; use text that the model was not trained on.
        options: the rows to read, their masks, and the device.
        progress: show a progress bar on stderr.

    Raises:
        InputError: no document is long enough, or lengths do not divide one another as required.
        ConfigError: the model has fewer positions, or another vocabulary.
        NonFiniteError: a loss is NaN or infinite.
    """
    max_length, seed = options.max_length, options.seed
    contexts = sorted(_default_contexts(max_length) if options.contexts is None else {*options.contexts, max_length})
    _require_divisors(max_length, contexts, options.buckets)
    masking = Masking(probability=options.mask_probability, mask_share=1.0, random_share=0.0)
    corpus = TokenCorpus.open(data)
    index = _full_chunks(corpus, max_length, seed)
    place = choose_device(options.device)
    network: GteForMaskedLM = _load(model, corpus, max_length).to(place)

    count = min(options.rows, index.num_chunks)
    settings = StepSettings(batch_size=1, token_budget=max_length, seed=seed, masking=masking)
    losses = {context: _RowMeans(count, max_length) for context in contexts}
    numbers = tqdm(range(count), desc="rows", disable=not progress, file=sys.stderr)
    for number in numbers:
        (row,) = micro_batches(index, number, settings)
        for context in contexts:
            batch = _windows(row, context, cls_id=corpus.vocab.cls_id, sep_id=corpus.vocab.sep_id, shortest=contexts[0])
            losses[context].add(number, batch.masked_positions, token_losses(network, batch))
    longest = losses[max_length]
    size = max_length // options.buckets
    return Extrapolation(
        model=model,
        rows=count,
        max_length=max_length,
        mask_probability=masking.probability,
        seed=seed,
        by_position=tuple(
            Bucket(start=start, stop=start + size, **longest.mean(start, start + size))
            for start in range(0, max_length, size)
        ),
        by_context=tuple(ContextLoss(length=c, **losses[c].mean(0, max_length)) for c in contexts),
    )


@torch.inference_mode()
def token_losses(model: GteForMaskedLM, batch: MicroBatch) -> NDArray[np.float32]:
    """Compute the cross-entropy of each masked token in nats, [M], with training's packed forward pass.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    device = model.device
    tensors: dict[str, Any] = micro_batch_tensors(batch, device)
    labels, positions = tensors.pop("labels"), tensors.pop("masked_positions")
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.gte(
            input_ids=tensors.pop("input_ids")[None], position_ids=tensors.pop("position_ids")[None], **tensors
        ).last_hidden_state[0]
        parts: list[Tensor] = []
        for at, wanted in zip(positions.split(_LOGITS_AT_ONCE), labels.split(_LOGITS_AT_ONCE), strict=True):
            parts.append(F.cross_entropy(model.lm_head(hidden[at]).float(), wanted, reduction="none"))
    losses = torch.cat(parts).cpu().numpy()
    if not np.isfinite(losses).all():
        raise NonFiniteError("the model computes a loss of NaN or infinity; check the checkpoint")
    return losses


def table(result: Extrapolation) -> str:
    """Format the losses by position and by context length for a person."""
    lines = [f"{result.rows} rows of {result.max_length} tokens, {result.mask_probability:.0%} masked", ""]
    lines.append(f"{'position':>13} {'loss':>8} {'error':>7} {'tokens':>8}")
    for bucket in result.by_position:
        span = f"{bucket.start}-{bucket.stop - 1}"
        lines.append(f"{span:>13} {bucket.loss:>8.4f} {bucket.error:>7.4f} {bucket.tokens:>8,}")
    lines += ["", f"{'context':>13} {'loss':>8} {'error':>7} {'tokens':>8}   the same tokens in each line"]
    for context in result.by_context:
        lines.append(f"{context.length:>13} {context.loss:>8.4f} {context.error:>7.4f} {context.tokens:>8,}")
    return "\n".join(lines)


def plot(result: Extrapolation, path: Path) -> None:
    """Plot the losses by position and by context length, with their standard errors, into a .png or .svg.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    buckets, contexts = result.by_position, result.by_context
    middles = [(bucket.start + bucket.stop) / 2 for bucket in buckets]
    left.errorbar(middles, [b.loss for b in buckets], [b.error for b in buckets], marker="o", capsize=2)
    left.set(xlabel=f"position in a row of {result.max_length}", ylabel="loss, nats per masked token")
    right.errorbar([c.length for c in contexts], [c.loss for c in contexts], [c.error for c in contexts], marker="o")
    right.set_xscale("log", base=2)
    right.set_xlabel("context length, the same tokens")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    kind = path.suffix.removeprefix(".") or "png"
    write_with(path, partial(figure.savefig, format=kind, dpi=120))


class _RowMeans:
    """Losses by row and position. Standard errors are over rows: rows are independent, the tokens of a row are not."""

    def __init__(self, rows: int, length: int) -> None:
        self._losses = np.full((rows, length), np.nan, dtype=np.float32)

    def add(self, row: int, positions: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        self._losses[row, positions] = losses

    def mean(self, start: int, stop: int) -> dict[str, Any]:
        part = self._losses[:, start:stop].astype(np.float64)
        counts = (~np.isnan(part)).sum(axis=1)
        sums = np.nansum(part, axis=1)
        if not counts.sum():
            raise InputError(f"no token of the positions {start} to {stop - 1} is masked: read more rows")
        means, errors = ratio_of_sums(sums[:, None], counts)
        return {
            "loss": float(means[0]),
            "error": 0.0 if errors is None else float(errors[0]),
            "tokens": int(counts.sum()),
        }


def _windows(row: MicroBatch, context: int, *, cls_id: int, sep_id: int, shortest: int) -> MicroBatch:
    """Cut a row into windows of `context` tokens, each between [CLS] and [SEP], as the texts of the training are.

    These two replace tokens. A token that they replace at the shortest context is predicted at no context, so that all
    contexts predict the same tokens.
    """
    length = len(row.input_ids)
    input_ids = row.input_ids.copy()
    input_ids[::context], input_ids[context - 1 :: context] = cls_id, sep_id
    place = row.masked_positions % shortest
    kept = (place != 0) & (place != shortest - 1)
    return replace(
        row,
        input_ids=input_ids,
        position_ids=np.arange(length) % context,
        cu_seqlens=np.arange(0, length + 1, context, dtype=np.int32),
        max_seqlen=context,
        masked_positions=row.masked_positions[kept],
        labels=row.labels[kept],
        num_sequences=length // context,
    )


def _load(model: str, corpus: TokenCorpus, max_length: int) -> Any:
    register_packed_attention()
    network = load_model(resolve_checkpoint(model), task="fill-mask", attn_implementation=PACKED_ATTENTION)
    config = network.config
    if config.max_position_embeddings < max_length:
        raise ConfigError(f"{model} has {config.max_position_embeddings} positions, not {max_length}: use --max-length")
    if not corpus.vocab.size <= config.vocab_size or corpus.vocab.pad_id != config.pad_token_id:
        raise ConfigError(
            f"{corpus.folder} has a vocabulary of {corpus.vocab.size} and padding id {corpus.vocab.pad_id}; {model} "
            f"has {config.vocab_size} and {config.pad_token_id}: prepare the corpus with the model's tokenizer"
        )
    return network


def _full_chunks(corpus: TokenCorpus, max_length: int, seed: int) -> ChunkIndex:
    longest = int(corpus.lengths.max()) + NUM_SPECIAL
    if longest < max_length:
        raise InputError(f"the longest document of {corpus.folder} has {longest} tokens, not {max_length}")
    full_only = Resampling(short_threshold=max_length, keep_prob=0.0)
    return ChunkIndex(corpus, Chunking(max_length, full_only), seed=seed)


def _default_contexts(max_length: int) -> set[int]:
    halves = {max_length >> i for i in range(max_length.bit_length()) if max_length % (1 << i) == 0}
    return {length for length in halves if length >= _SHORTEST_CONTEXT} | {max_length}


def _require_divisors(max_length: int, contexts: Sequence[int], buckets: int) -> None:
    odd = [context for context in contexts if context < 3 or max_length % context or context % contexts[0]]
    if odd or buckets < 1 or max_length % buckets:
        raise InputError(
            f"max_length {max_length}, contexts {list(contexts)}, {buckets} buckets: expected contexts of 3 or more "
            "tokens that divide max_length, and are multiples of the shortest, and a number of buckets that divides it"
        )
