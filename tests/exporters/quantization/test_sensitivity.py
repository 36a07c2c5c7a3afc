import pytest

from gte_deploy.exporters.quantization.sensitivity import sweep_sensitivity
from gte_deploy.exporters.verification.accuracy import Accuracy, AccuracyBounds

GROUPS = {"a": ["a1", "a2"], "b": ["b1"], "c": ["c1"], "d": ["d1"]}
COST = {"a": 2e-4, "b": 5e-3, "c": 1e-3, "d": 1e-5}


def model(high):
    """Costs add up; a group in FP32 costs nothing."""
    cost = sum(COST[group] for group, names in GROUPS.items() if not set(names) <= high)
    return Accuracy(1 - cost, 1 - cost, 1.0, 1.0, 1.0, tokens=1)


@pytest.mark.parametrize(
    ("bound", "high"),
    [
        (0.99, set()),
        (0.998, {"b1"}),
        (0.9995, {"b1", "c1"}),
        (0.99995, {"b1", "c1", "a1", "a2"}),
        (0.999995, {"b1", "c1", "a1", "a2", "d1"}),
    ],
)
def test_the_fewest_of_the_worst_stay_high(bound, high):
    lines = []
    sweep = sweep_sensitivity(GROUPS, model, model, AccuracyBounds(bound, 0.0), progress=lines.append)
    assert sweep.excluded == high
    assert sweep.accuracy == model(high)
    assert list(sweep.loss) == ([] if not high else ["b", "c", "a", "d"])
    assert bool(lines) == bool(high)


def test_bounds_say_what_falls_short():
    found = Accuracy(0.9985, 0.9, 0.9999, 0.9, 1.0, 0.95, (0.93, 0.965), 0.9, (0.3, 0.3), (0.5, 0.5), 1000, 200)
    missed = AccuracyBounds(0.999, 0.97).missed(found)
    assert missed == [
        "token cosine 0.99850 on average, at least 0.999 wanted",
        "the best answer for a mask is PyTorch's in 95.0% of 200 (95 % interval 93.0% to 96.5%), at least 97% wanted",
    ]
    assert not AccuracyBounds(0.998, 0.96).missed(found), "what the data do not contradict"
    assert len(AccuracyBounds(0.998, 0.96).missed(found, by_estimate=True)) == 1
    assert [AccuracyBounds(0.9, bound).open(found) for bound in (0.92, 0.94, 0.96, 0.97)] == [False, True, True, False]


def test_nan_falls_short():
    nan = float("nan")
    found = Accuracy(nan, nan, nan, nan, nan, nan, (nan, nan), nan, None, None, tokens=1, masks=1)
    assert len(AccuracyBounds(0.1, 0.1).missed(found)) == 4
