"""Finds the layers that need more than 8 bits, by measuring every group of layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gte_deploy.exporters.verification.accuracy import Accuracy, AccuracyBounds


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Args:
        excluded: weights to keep in FP32; empty if all may be INT8.
        loss: group of weights -> 1 − mean token cosine with only that group in INT8, the worst first; empty if the
            bounds held without a sweep.
        accuracy: the accuracy with `excluded` in FP32, on the texts of the verdict.
    """

    excluded: frozenset[str]
    loss: Mapping[str, float]
    accuracy: Accuracy


def sweep_sensitivity(
    groups: Mapping[str, Sequence[str]],
    measure: Callable[[frozenset[str]], Accuracy],
    judge: Callable[[frozenset[str]], Accuracy],
    bounds: AccuracyBounds,
    *,
    progress: Callable[[str], None],
) -> Sweep:
    """Find the smallest number of most sensitive groups that must stay in FP32 to keep a graph within its bounds.

    Each group is measured as the only one in INT8. Then the worst groups stay in FP32; a bisection finds their number.
    The result must be within `bounds` by its estimate, not only by the favourable end of its interval.

    Args:
        groups: name -> weights that belong together, such as one layer's queries, keys and values.
        measure: returns the accuracy with the given weights in FP32, on little text, to order the groups.
        judge: the same on as much text as the verdict needs.
        bounds: the bounds of accuracy.
        progress: called with a line for every measurement.
    """
    accuracy = judge(frozenset())
    if not (missed := bounds.missed(accuracy, by_estimate=True)):
        return Sweep(frozenset(), {}, accuracy)
    progress(f"with all layers in 8 bits the graph misses its bounds ({'; '.join(missed)})")
    everything = frozenset(name for names in groups.values() for name in names)
    loss = {}
    for number, (group, names) in enumerate(groups.items(), 1):
        loss[group] = 1 - measure(everything - frozenset(names)).token_cosine_mean
        progress(f"sensitivity {number}/{len(groups)}: {group} in 8 bits loses {loss[group]:.1e}")
    order = sorted(groups, key=lambda group: -loss[group])
    low, high = 0, len(order)  # `low` groups in FP32 are too few; all groups are enough
    kept, accuracy = everything, judge(everything)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = frozenset(name for group in order[:middle] for name in groups[group])
        found = judge(candidate)
        if bounds.missed(found, by_estimate=True):
            low = middle
        else:
            high, kept, accuracy = middle, candidate, found
    progress(f"{high} of {len(order)} groups stay in a higher precision: {', '.join(order[:high])}")
    return Sweep(kept, {group: loss[group] for group in order}, accuracy)
