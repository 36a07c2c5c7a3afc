"""The plan of streams: what machines of every size get, and what a caller or a measurement asks for."""

from __future__ import annotations

import pytest

from gte_deploy.backends.stream_plan import MAX_STREAMS, PACKED_BYTES, ListPick, efficiency, plan_streams, stream_count
from gte_deploy.core.errors import InputError

SMALL, LARGE = PACKED_BYTES, 500 << 20


def plan(backend="onnx", *, cpus, nodes=1, size=LARGE, **options):
    return plan_streams(backend, cpus=cpus, nodes=nodes, bundle_bytes=size, **options)


@pytest.mark.parametrize(
    ("cpus", "nodes", "size", "expected"),
    [
        (1, 1, SMALL, (1, 1)),
        (2, 1, SMALL, (2, 1)),
        (2, 1, LARGE, (1, 2)),  # two cores: packing at every call costs what the second stream wins
        (4, 1, LARGE, (4, 1)),
        (8, 1, LARGE, (8, 1)),
        (32, 1, LARGE, (32, 1)),
        (48, 1, SMALL, (24, 2)),
        (96, 2, LARGE, (32, 3)),
        (100, 4, LARGE, (24, 4)),  # 25 cores a node hold six streams of four, and one core is left
        (2, 4, SMALL, (2, 1)),  # a container's quota is less than the nodes that it may use
        (1024, 8, LARGE, (32, 32)),
    ],
)
def test_machines(cpus, nodes, size, expected):
    found = plan(cpus=cpus, nodes=nodes, size=size)
    assert (found.streams, found.threads) == expected
    assert found.packed == (size <= PACKED_BYTES) and found.reason and found.batch_tokens is None


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_no_plan_takes_more_cpus_than_there_are_or_those_of_two_nodes(nodes):
    for cpus in range(1, 257):
        for size in (SMALL, LARGE):
            found = plan(cpus=cpus, nodes=nodes, size=size)
            assert 1 <= found.streams <= MAX_STREAMS and found.streams * found.threads <= cpus
            assert found.streams == 1 or found.threads <= max(1, cpus // nodes)
            assert 128 <= found.least_tokens <= 512 and 2 <= found.fewest_batches <= max(2, found.streams)


def test_more_threads_of_an_operator_are_less_efficient_and_large_machines_cut_lists_finer():
    assert efficiency(1) == 1 and efficiency(2) == pytest.approx(1 / 1.06)
    assert sorted(map(efficiency, range(1, 97)), reverse=True) == [efficiency(threads) for threads in range(1, 97)]
    least = [plan(cpus=cpus).least_tokens for cpus in (3, 4, 8, 32)]
    assert least == sorted(least, reverse=True) and least[0] > least[-1]


def test_the_fewest_batches_are_as_fast_on_streams_as_on_all_threads():
    assert [plan(cpus=cpus, size=SMALL).fewest_batches for cpus in (2, 8, 32, 96)] == [2, 6, 12, 6]


def test_openvino_copies_weights_only_where_asked():
    assert plan("openvino", cpus=8).streams == 1 and "second copy" in plan("openvino", cpus=8).reason
    asked = plan("openvino", cpus=8, streams=4)
    assert (asked.streams, asked.threads, asked.packed) == (4, 2, True)
    measured = plan("openvino", cpus=8, picked=ListPick(streams=2, batch_tokens=512))
    assert (measured.streams, measured.threads, measured.batch_tokens) == (2, 4, 512)


def test_the_caller_comes_before_the_measurement_and_the_measurement_before_the_rule():
    picked = ListPick(streams=1, batch_tokens=2048)
    assert plan(cpus=8, picked=picked).streams == 1 and "bench --pick" in plan(cpus=8, picked=picked).reason
    asked = plan(cpus=8, streams=3, picked=picked)
    assert (asked.streams, asked.threads, asked.batch_tokens, asked.reason) == (3, 2, 2048, "it was asked for")
    assert plan(cpus=2, streams=2).streams == 2
    assert plan(cpus=2, streams=5).threads == 1


def test_the_argument():
    assert stream_count("auto") is None and stream_count(3) == 3
    for wrong in (0, -1, 257, True, 1.0, "2", None):
        with pytest.raises(InputError, match=r"streams is .*; expected 'auto' or an integer from 1 to 256"):
            stream_count(wrong)


@pytest.mark.parametrize("fields", [{"streams": 0, "batch_tokens": 1}, {"streams": True, "batch_tokens": 1}])
def test_damaged_measurements(fields):
    with pytest.raises(ValueError, match="not positive integers"):
        ListPick.from_json(fields)
