"""Alarms: a loss or a gradient norm that is far above those of the steps before it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gte_deploy.training.recipe import Alarms

_ENOUGH = 20  # steps before a median says something
_NORMAL = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation
# A deviation is at least this share of the median, or a run whose steps hardly differ would raise alarms at trifles.
# Gradient norms are no narrow distribution: the floor of their deviation is higher.
_FLOORS = {"loss": 0.01, "gradient_norm": 0.1}


@dataclass(frozen=True)
class Alarm:
    """A value that is far above those of the steps before.

    Args:
        quantity: "loss" or "gradient_norm".
        value: the value.
        median: the median of the steps before.
        score: how many deviations the value is above the median.
    """

    quantity: str
    value: float
    median: float
    score: float

    def __str__(self) -> str:
        name = self.quantity.replace("_", " ")
        return f"{name} {self.value:.4g} against a median of {self.median:.4g} ({self.score:.0f} deviations above)"


class SpikeDetector:
    """Compares each step with the steps before it.

    The deviation is that of a normal distribution with the same median absolute deviation (Rousseeuw and Croux, 1993),
    so a spike does not hide the next one.

    Args:
        settings: the thresholds, and the number of steps to compare with.
        recent: values to begin with, as `recent` returned them.
    """

    def __init__(self, settings: Alarms, recent: Mapping[str, Sequence[float]] | None = None) -> None:
        self._limits = {"loss": settings.loss, "gradient_norm": settings.gradient_norm}
        self._recent = {name: deque((recent or {}).get(name, ()), maxlen=settings.window) for name in self._limits}

    def recent(self) -> dict[str, list[float]]:
        """The values that the next step is compared with."""
        return {name: list(values) for name, values in self._recent.items()}

    def restart(self) -> None:
        """Forget all values, as a new stage does."""
        for values in self._recent.values():
            values.clear()

    def judge(self, *, loss: float, gradient_norm: float) -> list[Alarm]:
        """Return the alarms that a step raises, and remember the step."""
        alarms = []
        for name, value in (("loss", loss), ("gradient_norm", gradient_norm)):
            limit, values = self._limits[name], self._recent[name]
            if limit is not None and len(values) >= _ENOUGH:
                median = statistics.median(values)
                deviation = _NORMAL * statistics.median(abs(x - median) for x in values)
                score = (value - median) / max(deviation, _FLOORS[name] * abs(median), math.ulp(1.0))
                if score > limit:
                    alarms.append(Alarm(name, value, median, score))
            values.append(value)
        return alarms
