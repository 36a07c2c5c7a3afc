"""The figures that training and its evaluations draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gte_deploy.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches; no window opens.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "train") from error
    return Figure(figsize=(width, height), layout="constrained")
