"""Which layers stay higher where 8 bits miss their bounds: measured one by one, not guessed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gte_deploy.exporters.verification.accuracy import Accuracy, AccuracyBounds


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Args:
        excluded: weights to keep in FP32; empty where all may be INT8.
        loss: group of weights -> 1 − mean token cosine with that group alone in INT8, the worst first; empty where the
            bounds held at once.
        accuracy: with `excluded` in FP32, on the texts that it was judged by.
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
    """Keep the fewest of the most sensitive groups in FP32 that bring a graph within its bounds.

    Each group is measured alone in INT8; then the worst are added to what stays high, by bisection over how many. What
    is kept must be within `bounds` by its estimate, not by the end of an interval that favours it.

    Args:
        groups: name -> weights that belong together, such as one layer's queries, keys and values.
        measure: accuracy of the graph in which these weights stay FP32, on little text: for the order of the groups.
        judge: the same on as much text as the verdict needs.
        bounds: what is wanted.
        progress: called with a line for every measurement.
    """
    accuracy = judge(frozenset())
    if not (missed := bounds.missed(accuracy, by_estimate=True)):
        return Sweep(frozenset(), {}, accuracy)
    progress(f"8 bits everywhere miss the bounds ({'; '.join(missed)})")
    everything = frozenset(name for names in groups.values() for name in names)
    loss = {}
    for number, (group, names) in enumerate(groups.items(), 1):
        loss[group] = 1 - measure(everything - frozenset(names)).token_cosine_mean
        progress(f"sensitivity {number}/{len(groups)}: {group} alone costs {loss[group]:.1e}")
    order = sorted(groups, key=lambda group: -loss[group])
    low, high = 0, len(order)  # `low` groups are too few; all of them in FP32 are enough
    kept, accuracy = everything, judge(everything)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = frozenset(name for group in order[:middle] for name in groups[group])
        found = judge(candidate)
        if bounds.missed(found, by_estimate=True):
            low = middle
        else:
            high, kept, accuracy = middle, candidate, found
    progress(f"{high} of {len(order)} groups stay higher: {', '.join(order[:high])}")
    return Sweep(kept, {group: loss[group] for group in order}, accuracy)
