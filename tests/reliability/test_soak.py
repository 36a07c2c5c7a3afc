"""Ten thousand calls of all lengths: the process does not grow."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

CALLS = 10_000
# Both engines stay within 0.2 %; 100 bytes lost at each call would be 1 %.
TOLERANCE = 0.01

SCRIPT = """
    import json, os, sys
    import numpy as np
    import gte_deploy
    from gte_deploy.tuning.measure import resident_bytes

    bundle, backend, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rng = np.random.default_rng(0)
    # Pareto: mostly short, sometimes up to the limit. Short texts come several at once.
    lengths = np.minimum(126, rng.pareto(1.2, calls) * 8 + 1).astype(int)
    rows = rng.integers(1, np.maximum(2, 256 // lengths).clip(max=9)) if backend == "onnx" else np.ones_like(lengths)

    def held():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    resident, handles = np.zeros(calls), None
    with gte_deploy.load(bundle, backend=backend, num_threads=1) as model:
        for length in range(1, 127):
            model.encode("the " * length)
        for call in range(calls):
            model.encode(["the " * int(lengths[call])] * int(rows[call]))
            resident[call] = resident_bytes() / 1e6
            if call == calls // 5:
                handles = held()
        print(json.dumps({"tenths": np.median(resident.reshape(10, -1), axis=1).tolist(), "held": [handles, held()]}))
"""


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_memory_descriptors_and_threads_stay(backend, bundle_of, word_checkpoints):
    pytest.importorskip("openvino" if backend == "openvino" else "onnxruntime")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), bundle_of(word_checkpoints["embed"]), backend, str(CALLS)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tenths"][9] < (1 + TOLERANCE) * found["tenths"][1], found
    assert found["held"][0] == found["held"][1]
