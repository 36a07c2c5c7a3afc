"""Several items at once: that they overlap, and that order, errors and threads are as with one."""

from __future__ import annotations

import _thread
import threading
import time

import pytest

from gte_deploy.core.lanes import in_a_lane, in_lanes


def lanes_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gte-lane")]


def wait_for(condition: threading.Event) -> None:
    assert condition.wait(10), "nobody else is at work"


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 20])
def test_results_are_in_the_order_of_the_items(lanes: int, count: int):
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item * item

    assert list(in_lanes(work, range(count), lanes)) == [item * item for item in range(count)]
    assert lanes_alive() == []


def test_two_items_are_worked_on_at_once_and_not_three():
    both, inside, most = threading.Barrier(2, timeout=10), [], []

    def work(item: int) -> int:
        inside.append(item)
        most.append(len(inside))
        both.wait()  # raises in place of passing, if an item is alone
        inside.remove(item)
        return item

    assert list(in_lanes(work, range(8), 2)) == list(range(8))
    assert max(most) == 2


def test_one_lane_and_one_item_are_done_in_the_callers_thread():
    me = threading.get_ident()
    assert list(in_lanes(lambda _: threading.get_ident(), range(3), 1)) == [me] * 3
    assert list(in_lanes(lambda _: threading.get_ident(), range(1), 2)) == [me]
    assert me not in list(in_lanes(lambda _: threading.get_ident(), range(2), 2))


def test_fewer_items_than_asked_for_are_done_in_the_callers_thread():
    me = threading.get_ident()
    assert list(in_lanes(lambda _: threading.get_ident(), range(4), 2, fewest=5)) == [me] * 4
    assert me not in list(in_lanes(lambda _: threading.get_ident(), range(5), 2, fewest=5))
    assert list(in_lanes(lambda item: item, range(9), 2, fewest=5)) == list(range(9))


@pytest.mark.parametrize("count", [0, 2, 3, 9])
def test_the_first_items_are_done_alone_as_long_as_they_ask_for_it(count: int):
    me, inside = threading.get_ident(), []

    def work(item: int) -> tuple[int, bool, bool]:
        inside.append(item)
        return item, threading.get_ident() == me, in_a_lane()

    found = in_lanes(work, range(count), 2, alone=lambda item: item < 2 or item == 5)
    for number in range(min(2, count)):
        assert next(found) == (number, True, False) and inside == list(range(number + 1))
    rest = list(found)
    assert [item for item, _, _ in rest] == list(range(2, count))
    assert {(callers, lane) for _, callers, lane in rest} <= ({(True, False)} if count == 3 else {(False, True)})


def test_items_are_read_no_further_ahead_than_lanes():
    read: list[int] = []

    def items():
        for item in range(50):
            read.append(item)
            yield item

    for item in in_lanes(lambda item: item, items(), 2):
        assert len(read) <= item + 3


@pytest.mark.parametrize("bad", [0, 1, 7, 19])
def test_an_error_in_the_middle_ends_it(bad: int):
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == bad:
            raise ValueError(f"item {item}")
        return item

    found = []
    with pytest.raises(ValueError, match=f"item {bad}"):
        for result in in_lanes(work, range(20), 2):
            found.append(result)
    assert found == list(range(bad)) and max(started) <= bad + 3
    assert lanes_alive() == []


def test_the_first_error_in_the_order_of_the_items_is_raised():
    second = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            second.set()
        else:
            wait_for(second)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(in_lanes(work, range(5), 2))


def test_an_error_of_the_items_ends_it():
    def items():
        yield from range(4)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(in_lanes(lambda item: item, items(), 2))
    assert lanes_alive() == []


def test_a_caller_that_stops_early_leaves_no_thread():
    started: list[int] = []
    results = in_lanes(lambda item: started.append(item), range(100), 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert lanes_alive() == [] and len(started) <= 4


def test_an_interrupt_ends_it_cleanly():
    def work(item: int) -> int:
        if item == 2:
            _thread.interrupt_main()
        time.sleep(0.02)
        return item

    with pytest.raises(KeyboardInterrupt):
        list(in_lanes(work, range(1000), 2))
    assert lanes_alive() == []
