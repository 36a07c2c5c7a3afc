"""Finds the layers that need more than 8 bits, by measuring every group of layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gte_deploy.exporters.verification.accuracy import Accuracy, AccuracyBounds


@dataclass(frozen=True)
class Judgement:
    """The accuracy of a graph on calibration texts, and one sentence for each bound that it misses on any data."""

    accuracy: Accuracy
    missed: Sequence[str]


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Args:
        excluded: weights to keep in a higher precision; empty if all may have 8 bits.
        loss: group of weights -> 1 − mean token cosine with only that group in 8 bits, the most sensitive group first;
            empty if the bounds held without a sweep.
        accuracy: the accuracy with `excluded` in a higher precision, on the calibration texts.
        kept: the number of groups in a higher precision: the first ones of `loss`.
        failure: why no group may have 8 bits, and what to do; empty for a model where some group may. Then `excluded`
            has all groups.
    """

    excluded: frozenset[str]
    loss: Mapping[str, float]
    accuracy: Accuracy
    kept: int = 0
    failure: str = ""

    @property
    def kept_groups(self) -> tuple[str, ...]:
        """The names of the groups in a higher precision; empty if their losses were not measured."""
        return tuple(self.loss)[: self.kept]


class SweepError(Exception):
    """One group in 8 bits already misses the bounds `missed`.

    `loss` is as in `Sweep`, empty if it was not measured; `accuracy` is that of the graph that missed the bounds.
    """

    def __init__(self, missed: Sequence[str], loss: Mapping[str, float], accuracy: Accuracy) -> None:
        super().__init__("; ".join(missed))
        self.missed, self.loss, self.accuracy = missed, loss, accuracy


def sweep_sensitivity(
    groups: Mapping[str, Sequence[str]],
    measure: Callable[[frozenset[str]], Accuracy],
    judge: Callable[[frozenset[str]], Judgement],
    bounds: AccuracyBounds,
    *,
    previous: Sweep | None = None,
    progress: Callable[[str], None],
) -> Sweep:
    """Find how many of the most sensitive groups must stay in a higher precision to keep a graph within its bounds.

    Each group is measured as the only one in 8 bits, which gives the order of the groups. Then a bisection finds how
    many groups must stay, with at least one group in 8 bits.

    Args:
        groups: name -> weights that belong together, such as one layer's queries, keys and values.
        measure: returns the accuracy with the given weights in a higher precision, on little text, to order the groups.
        judge: judges the same graph on all the data that the result must hold on.
        bounds: the bounds of accuracy, which weigh the losses of a group.
        previous: the result of a sweep whose graph missed its bounds later. More groups stay than in that result, and
            its order of groups is used again.
        progress: called with a line for every measurement.

    Raises:
        SweepError: no group may have 8 bits.
    """
    loss = previous.loss if previous and previous.loss else _losses(groups, measure, bounds, progress)
    order = list(loss)
    found: dict[int, tuple[frozenset[str], Judgement]] = {}

    def holds(kept: int) -> bool:
        excluded = frozenset(name for group in order[:kept] for name in groups[group])
        found[kept] = excluded, judge(excluded)
        missed = found[kept][1].missed
        progress(f"{kept} of {len(order)} groups in a higher precision: {'; '.join(missed) or 'within all bounds'}")
        return not missed

    # `low` groups are too few. A result that missed its bounds later grows by half, because each check takes long.
    low, high = 0, len(order)
    if previous is not None:
        low = max(previous.kept, min(previous.kept + previous.kept // 2, high - 2))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    if high == len(order):
        if low not in found and previous is not None:  # nothing is left to try
            raise SweepError(["the comparison of the whole export misses them"], loss, previous.accuracy)
        _, judgement = found[low]
        raise SweepError(judgement.missed, loss, judgement.accuracy)
    excluded, judgement = found[high]
    progress(f"{high} of {len(order)} groups stay in a higher precision: {', '.join(order[:high])}")
    return Sweep(excluded, loss, judgement.accuracy, high)


def _losses(
    groups: Mapping[str, Sequence[str]],
    measure: Callable[[frozenset[str]], Accuracy],
    bounds: AccuracyBounds,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Group -> 1 − mean token cosine with only that group in 8 bits; the group that uses up most of a bound first.

    Raises:
        SweepError: the bounds are missed even without 8 bits, so that no group needs to be measured.
    """
    everything = frozenset(name for names in groups.values() for name in names)
    if missed := bounds.missed(accuracy := measure(everything)):
        raise SweepError([f"with no layer in 8 bits: {sentence}" for sentence in missed], {}, accuracy)
    found = {}
    for number, (group, names) in enumerate(groups.items(), 1):
        found[group] = measure(everything - frozenset(names))
        loss = 1 - found[group].token_cosine_mean
        progress(f"sensitivity {number}/{len(groups)}: {group} in 8 bits loses {loss:.1e}")
    order = sorted(groups, key=lambda group: -_used(found[group], bounds))
    return {group: 1 - found[group].token_cosine_mean for group in order}


def _used(found: Accuracy, bounds: AccuracyBounds) -> float:
    """The share of a bound's margin that a loss uses up, of the bound where it is largest. 1 just keeps the bound."""
    cosine = 1 - min(found.token_cosine_mean, found.sentence_cosine_mean)
    words = 0.0 if found.top1_agreement is None else 1 - found.top1_agreement
    used = max(cosine / (1 - bounds.cosine_mean), words / (1 - bounds.top1_agreement))
    return math.inf if math.isnan(used) else used
