import pytest

from gte_deploy.exporters.quantization.sensitivity import Judgement, Sweep, SweepError, sweep_sensitivity
from gte_deploy.exporters.verification.accuracy import Accuracy, AccuracyBounds

GROUPS = {"a": ["a1", "a2"], "b": ["b1"], "c": ["c1"], "d": ["d1"]}
COST = {"a": 2e-4, "b": 5e-3, "c": 1e-3, "d": 1e-5}
ALL = {name for names in GROUPS.values() for name in names}


def model(high):
    """Costs add up; a group in FP32 costs nothing."""
    cost = sum(COST[group] for group, names in GROUPS.items() if not set(names) <= high)
    return Accuracy(1 - cost, 1 - cost, 1.0, 1.0, 1.0, tokens=1)


def judged_by(bounds, also=lambda high: []):
    """A judge by these bounds and by the further misses that `also` returns."""

    def judge(high):
        accuracy = model(high)
        return Judgement(accuracy, [*bounds.missed(accuracy, by_estimate=True), *also(high)])

    return judge


def run_sweep(bounds, *, measure=model, judge=None, previous=None):
    lines: list[str] = []
    judge = judge or judged_by(bounds)
    return sweep_sensitivity(GROUPS, measure, judge, bounds, previous=previous, progress=lines.append), lines


@pytest.mark.parametrize(
    ("bound", "high"), [(0.998, {"b1"}), (0.9995, {"b1", "c1"}), (0.99995, {"b1", "c1", "a1", "a2"})]
)
def test_the_fewest_of_the_worst_stay_high(bound, high):
    sweep, lines = run_sweep(AccuracyBounds(bound, 0.0))
    assert sweep.excluded == high and sweep.accuracy == model(high)
    assert list(sweep.loss) == ["b", "c", "a", "d"] and not sweep.failure
    assert sweep.kept == len(high & {"a1", "b1", "c1", "d1"})
    assert lines[-1].startswith(f"{sweep.kept} of 4 groups stay in a higher precision: b")


def test_one_group_that_is_too_much_ends_the_sweep():
    bounds = AccuracyBounds(0.999995, 0.0)
    with pytest.raises(SweepError, match="token cosine") as caught:
        run_sweep(bounds)
    assert list(caught.value.loss) == ["b", "c", "a", "d"] and caught.value.accuracy == model(ALL - {"d1"})


def test_a_graph_that_misses_its_bounds_without_8_bits_is_measured_once():
    calls = []

    def measure(high):
        calls.append(high)
        return Accuracy(0.9, 0.9, 1.0, 1.0, 1.0, tokens=1)

    with pytest.raises(SweepError, match="with no layer in 8 bits: token cosine 0.9"):
        run_sweep(AccuracyBounds(0.999, 0.0), measure=measure)
    assert calls == [ALL]


def test_other_data_keep_more_groups_than_the_calibration_texts():
    bounds = AccuracyBounds(0.998, 0.0)
    sweep, _ = run_sweep(bounds, judge=judged_by(bounds, lambda high: [] if "a1" in high else ["on held-out text: c"]))
    assert sweep.excluded == {"b1", "c1", "a1", "a2"}


def test_words_decide_the_order_where_cosines_do_not():
    """A vocabulary projection changes no hidden state."""

    def measure(high):
        return Accuracy(1.0, 1.0, 1.0, 1.0, 1.0, 0.9 if "d1" not in high else 1.0, (0.8, 1.0), masks=100, tokens=1)

    sweep, _ = run_sweep(AccuracyBounds(0.998, 0.97), measure=measure, judge=judged_by(AccuracyBounds(0.9, 0.0)))
    assert next(iter(sweep.loss)) == "d" and sweep.excluded == {"d1"}


def test_a_later_miss_keeps_more_groups_in_the_same_order():
    bounds = AccuracyBounds(0.99, 0.0)
    first = Sweep(frozenset(), {}, model(set()))
    second, _ = run_sweep(bounds, previous=first)
    assert second.excluded == {"b1"}, "all groups in 8 bits were too much"

    def forbidden(high):
        raise AssertionError("the order is known")

    third, _ = run_sweep(bounds, measure=forbidden, previous=second)
    assert third.excluded == {"b1", "c1"} and third.loss == second.loss
    fourth, _ = run_sweep(bounds, measure=forbidden, previous=third)
    assert fourth.excluded == {"b1", "c1", "a1", "a2"}
    with pytest.raises(SweepError, match="the comparison of the whole export"):
        run_sweep(bounds, measure=forbidden, previous=fourth)


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
