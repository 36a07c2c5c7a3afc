"""The policy of CUDA graphs: what is captured, what gives way, and when it stops. Shapes are letters and numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from gte_deploy.backends.tensorrt.graph_cache import GraphCache, GraphLimits

LIMITS = GraphLimits(max_graphs=2, window=1000, pause=10, longest_pause=80, least_replays=4)


def run(cache: GraphCache[str], shape: object, size: int = 1) -> str:
    """One run of a shape, as a slot does it: "replay", "capture" or "plain"."""
    if cache.find(shape) is not None:
        return "replay"
    if not cache.wants(shape):
        return "plain"
    cache.make_room()
    cache.add(shape, f"graph of {shape}", size)
    return "capture"


def runs(cache: GraphCache[str], shapes: object) -> list[str]:
    return [run(cache, shape) for shape in shapes]  # type: ignore[attr-defined]


def test_a_shape_is_captured_at_its_third_run():
    assert runs(GraphCache(LIMITS), "aaaaa") == ["plain", "plain", "capture", "replay", "replay"]
    assert runs(GraphCache(LIMITS), "abcde" * 2) == ["plain"] * 10


def test_a_full_cache_keeps_what_comes_most():
    cache = GraphCache(LIMITS)
    runs(cache, "aaabbb" + "ab" * 10)
    assert set(runs(cache, "c" * 26)) == {"plain"}, "13 runs of a and b, and no more than twice as many of c"
    assert run(cache, "c") == "capture"
    assert len(cache) == 2 and run(cache, "c") == "replay"


def test_old_traffic_is_forgotten():
    cache = GraphCache(GraphLimits(max_graphs=2, window=50, pause=1))
    runs(cache, "ab" * 200)
    assert runs(cache, "cd" * 200)[-50:] == ["replay"] * 50


def test_replacements_have_pauses_that_grow_while_graphs_are_not_used():
    cache = GraphCache(GraphLimits(max_graphs=1, window=8, pause=10, longest_pause=80, least_replays=4))
    new_shapes = itertools.chain.from_iterable([number] * 6 for number in range(500))
    captures = [index for index, what in enumerate(runs(cache, new_shapes)) if what == "capture"]
    pauses = np.diff(captures)
    assert len(captures) > 10 and pauses[0] < 40 and pauses[3:].min() >= 80, "captures of little use come seldom"
    runs(cache, ["a"] * 200)
    start = cache.find("a")
    assert start == "graph of a", "a shape that comes often still gets in"
    found = runs(cache, ["b"] * 200)
    assert found.index("capture") < 30 and set(found[30:]) == {"replay"}, "and the pause is short again"


def test_many_shapes_of_one_frequency_do_not_drive_each_other_out():
    rng, cache = np.random.default_rng(0), GraphCache(GraphLimits())
    found = runs(cache, rng.integers(0, 200, 20_000).tolist())
    assert found[5000:].count("capture") < 0.005 * 15_000
    assert found[5000:].count("replay") > 0.9 * 15_000 * 64 / 200


def test_the_memory_of_graphs_is_bounded():
    cache = GraphCache(GraphLimits(max_bytes=100))
    for shape in "abcdef":
        for _ in range(4):
            run(cache, shape, size=30)
    assert len(cache) == 4 and cache.size == 120, "the graph that passes the bound is the last"


def test_a_shape_whose_capture_fails_has_growing_pauses():
    cache, pauses = GraphCache(replace(LIMITS, max_failures=100)), []
    for _ in range(400):
        cache.find("a")
        if cache.wants("a"):
            pauses.append(cache.fail("a"))
        run(cache, "b")
    assert pauses[:4] == [20, 40, 80, 80], "runs"
    assert len(pauses) == 12, "of 800 runs, 5 before the first, then 20 + 40 + 9 x 80"
    assert run(cache, "b") == "replay"


def test_after_failures_in_a_row_nothing_is_captured_any_more():
    cache = GraphCache(GraphLimits(max_failures=3))
    for shape in "abc":
        assert not cache.is_off
        runs_before = [cache.find(shape) for _ in range(3)]
        assert runs_before == [None] * 3 and cache.wants(shape)
        cache.fail(shape)
    assert cache.is_off and runs(cache, "ddddd") == ["plain"] * 5


def test_a_success_ends_the_row_of_failures():
    cache = GraphCache(GraphLimits(max_failures=3))
    for shape in "abcdef":
        for _ in range(3):
            cache.find(shape)
        assert cache.wants(shape)
        if shape in "abde":
            cache.fail(shape)
        else:
            cache.add(shape, "graph", 1)
    assert not cache.is_off


def test_what_is_cleared_comes_back_at_once():
    cache = GraphCache(LIMITS)
    runs(cache, "aaaabbb")
    assert sorted(cache.clear()) == ["graph of a", "graph of b"] and len(cache) == 0
    assert runs(cache, "aab") == ["capture", "replay", "capture"]


def test_the_counts_are_bounded():
    cache = GraphCache(GraphLimits(window=100))
    runs(cache, range(10_000))
    assert len(cache._sights) <= 200
