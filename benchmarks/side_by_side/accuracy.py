"""Compares a contestant's answers with those of PyTorch in fp32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gte_deploy.tuning.measure import WorkerError
from side_by_side.workloads import Job

Array = NDArray[np.float32]


def cosines(expected: Array, found: Array) -> dict[str, float]:
    """Return the mean and smallest cosine of corresponding rows, and the largest absolute difference.

    Raises:
        WorkerError: the shapes differ, or a number is not finite.
    """
    if expected.shape != found.shape:
        raise WorkerError(f"the reference gives shape {expected.shape}, and the contestant {found.shape}")
    if not np.isfinite(found).all():
        raise WorkerError("a number is not finite")
    a, b = expected.astype(np.float64), found.astype(np.float64)
    values = np.einsum("ij,ij->i", a, b) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"mean": float(values.mean()), "min": float(values.min()), "max_abs": float(np.abs(a - b).max())}


def agreement(expected: Array, found: Array, job: Job) -> dict[str, float]:
    """Return top-1 agreement and top-5 overlap of predictions [M, V] with the reference, and the correct share."""
    difference = cosines(expected, found)
    assert job.labels is not None  # a masked job has them
    best = [np.argsort(-logits, axis=1, kind="stable")[:, :5] for logits in (expected, found)]
    shared = [len(np.intersect1d(a, b)) / 5 for a, b in zip(*best, strict=True)]
    return {
        "top1_agreement": float((best[0][:, 0] == best[1][:, 0]).mean()),
        "top5_overlap": float(np.mean(shared)),
        "right": float((best[1][:, 0] == job.labels).mean()),
        "reference_right": float((best[0][:, 0] == job.labels).mean()),
        "masks": len(job.labels),
        "max_abs": difference["max_abs"],
    }
