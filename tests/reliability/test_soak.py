"""Ten thousand calls of all lengths: the process does not grow."""

import os
from pathlib import Path

import numpy as np
import pytest

CALLS = 10_000


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_memory_descriptors_and_threads_stay(load_on, word_checkpoints, engine):
    rng = np.random.default_rng(0)
    # Pareto: mostly short, sometimes up to the limit.
    lengths = np.minimum(126, rng.pareto(1.2, CALLS) * 8 + 1).astype(int).tolist()
    with load_on(engine, word_checkpoints["embed"], num_threads=1) as model:

        def call(length):
            model.encode("the " * length)

        # Every length at first: OpenVINO keeps kernels for each, up to a limit that tests/runtime holds it to.
        for length in [*range(126, 0, -1), *lengths[:1000]]:
            call(length)
        before, handles = resident_bytes(), held()
        for length in lengths:
            call(length)
        assert held() == handles
        assert resident_bytes() < 1.01 * before
