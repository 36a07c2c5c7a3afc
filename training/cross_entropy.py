"""Cross-entropy of a linear layer's outputs, without all of its logits in memory.

The logits are the largest tensor of a masked-language model: 10,000 masked tokens over a vocabulary of 250,048 take
5 GB in bfloat16, and several times that in the copies that a loss in float32 needs. Here the rows go through in chunks,
and each chunk leaves only its loss and its part of the gradients, which are therefore computed in the forward pass. The
idea is Liger's (arXiv 2410.10989), whose kernels need Triton; this is plain PyTorch.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) chunks too, but it adds up a bfloat16 loss, and the weights'
gradient, in bfloat16; and older versions do not have it.

Legend: M rows, V classes, H features, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""A label that is not predicted, as in `torch.nn.functional.cross_entropy`."""

CHUNK_ROWS = 2048
"""Rows of a chunk. Each chunk reads and writes the whole gradient of the weights, `8 * V * H` bytes, beside its logits
with some 10 bytes in `R * V` elements: at 2,048 rows and 768 features the former is a third of the latter."""

Softmax = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    chunk_rows: int = CHUNK_ROWS,
    softmax: Softmax | None = None,
) -> Tensor:
    """Sum the cross-entropies of `rows @ weight.T + bias` in nats, as `F.cross_entropy(..., reduction="sum")` does.

    Under autocast the products have its dtype, as those of a linear layer. The softmax, the loss, and the sums of the
    gradients of weight and bias over the chunks are at least float32.

    Args:
        rows: `[M, H]`, a floating-point dtype.
        weight: `[V, H]`.
        bias: `[V]`.
        labels: `[M] int64`; rows with the label IGNORE_INDEX do not count.
        chunk_rows: rows that are computed at once; it changes the result by rounding alone.
        softmax: `softmax_of_labels`, or the same compiled.

    Returns:
        A scalar in float32, or in float64 for float64 rows. It can be differentiated once.
    """
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, weight, bias))
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    settings = _Settings(dtype, chunk_rows, needed, softmax or softmax_of_labels)
    return _Chunked.apply(rows, weight, bias, labels, settings)


def softmax_of_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy of each row, the softmax, and the gradient of the logit of each label.

    The softmax is the gradient of all other logits. That of the label is the softmax minus 1, which would lose its
    digits if the softmax were rounded first.

    Args:
        logits: `[R, V]`.
        labels: `[R] int64`, each in 0..V - 1, or IGNORE_INDEX: all results are 0 in such a row.

    Returns:
        `[R]` in at least float32; `[R, V]` in the dtype of the logits; `[R]` in at least float32.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    counts = (labels != IGNORE_INDEX)[:, None]
    shifted = logits - logits.amax(-1, keepdim=True).to(exact)  # one new tensor; the rest changes it in place
    at_labels = shifted.gather(-1, labels.clamp(min=0)[:, None])
    exponentials = shifted.exp_()
    total = exponentials.sum(-1, keepdim=True)
    nats = torch.where(counts, total.log() - at_labels, 0)
    of_labels = torch.where(counts, at_labels.exp() / total - 1, 0)
    return nats[:, 0], exponentials.div_(total.masked_fill(~counts, torch.inf)).to(logits.dtype), of_labels[:, 0]


@dataclass(frozen=True)
class _Settings:
    dtype: torch.dtype
    chunk_rows: int
    needs_gradients: bool
    softmax: Softmax


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        settings: _Settings,
    ) -> Tensor:
        dtype = settings.dtype
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            x, w, b = rows.to(dtype), weight.to(dtype), bias.to(dtype)
            nats = torch.zeros((), dtype=exact, device=rows.device)
            sums = _Gradients(x, w, exact) if settings.needs_gradients else None
            for chunk, target in zip(x.split(settings.chunk_rows), labels.split(settings.chunk_rows), strict=True):
                each, gradient, of_labels = settings.softmax(F.linear(chunk, w, b), target)
                nats += each.sum()
                if sums is not None:
                    gradient.scatter_(1, target.clamp(min=0)[:, None], of_labels[:, None].to(dtype))
                    sums.add(chunk, gradient, w)
                del gradient  # before the next chunk has one
        if sums is not None:
            ctx.save_for_backward(torch.cat(sums.rows).to(rows.dtype), sums.weight, sums.bias)
            ctx.dtypes = weight.dtype, bias.dtype
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return rows * factor.to(rows.dtype), (weight * factor).to(of_weight), (bias * factor).to(of_bias), None, None


class _Gradients:
    """Adds up the gradients of the chunks."""

    def __init__(self, rows: Tensor, weight: Tensor, exact: torch.dtype) -> None:
        self.rows: list[Tensor] = [rows[:0]]
        self.weight = torch.zeros_like(weight, dtype=exact)
        self.bias = weight.new_zeros(len(weight), dtype=exact)

    def add(self, rows: Tensor, gradient: Tensor, weight: Tensor) -> None:
        """Add the part of a chunk: `rows [R, H]`, and the gradient of its logits `[R, V]`."""
        self.rows.append(gradient @ weight)
        if self.weight.dtype == rows.dtype:
            self.weight.addmm_(gradient.T, rows)
        elif rows.is_cuda:
            # The kernel adds up in float32 anyway: take its sums before it rounds them.
            self.weight += torch.mm(gradient.T, rows, out_dtype=self.weight.dtype)
        else:
            self.weight += gradient.T @ rows
        self.bias += gradient.sum(0, dtype=self.bias.dtype)
