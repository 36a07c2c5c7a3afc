"""Ten thousand calls of all lengths, and models that are loaded again and again: the process does not grow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from battery import Attempts
from http_server import ServerProcess, serve_command

CALLS = 10_000
# Both engines stay within 0.2 %; 100 bytes lost at each call would be 1 %.
TOLERANCE = 0.01
# Several threads allocate, in another order each time.
TOLERANCE_WITH_THREADS = 0.03
# By default glibc gives threads heaps of their own, in which by chance much or little stays: up to a sixth of all.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}

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
# Each round loads, computes with streams and shared batches, and closes.
LOADS = """
    import ctypes, gc, json, os, sys
    import gte_deploy
    from gte_deploy.tuning.measure import resident_bytes

    path, backend, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    held = []
    for number in range(rounds):
        with gte_deploy.load(path, backend=backend, num_threads=2, join_calls=number % 2 == 1) as model:
            model.encode(["the king " * (1 + n % 50) for n in range(40)])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps differs by chance
        held.append((resident_bytes() / 1e6, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    print(json.dumps(held))
"""


def printed(script: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, **ONE_HEAP, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def path_for(bundle_of: Callable[..., Path], word_checkpoints: dict[str, Path]) -> Callable[[str], Path]:
    def path(backend: str) -> Path:
        return word_checkpoints["embed"] if backend == "torch" else bundle_of(word_checkpoints["embed"])

    return path


@pytest.mark.parametrize("backend", ["onnx", "openvino", pytest.param("torch", marks=pytest.mark.slow)])
def test_memory_descriptors_and_threads_stay(backend: str, path_for: Callable[[str], Path], attempts: Attempts) -> None:
    found = printed(SCRIPT, path_for(backend), backend, CALLS)
    assert found["tenths"][9] < (1 + TOLERANCE) * found["tenths"][1], found
    assert found["held"][0] == found["held"][1]
    attempts(f"calls of one process, whose memory, descriptors and threads stay: {backend}", CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_a_model_that_is_loaded_and_closed_leaves_nothing(
    backend: str, path_for: Callable[[str], Path], attempts: Attempts
) -> None:
    rounds = 40
    memory, descriptors, threads = np.array(printed(LOADS, path_for(backend), backend, rounds)).T
    assert np.median(memory[-10:]) < (1 + TOLERANCE_WITH_THREADS) * np.median(memory[10:20]), memory
    # The first rounds start what an engine keeps for the process.
    assert descriptors[-1] <= descriptors[10] and threads[-1] <= threads[10], (descriptors, threads)
    attempts(f"models loaded, used and closed in one process, which does not grow: {backend}", rounds)


def held_by(pid: int) -> tuple[float, int, int]:
    """Resident megabytes, descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return resident / 1e3, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_server_does_not_grow(
    backend: str, path_for: Callable[[str], Path], tmp_path: Path, attempts: Attempts
) -> None:
    """Requests of 8 clients: right ones, refused ones, new connections, and clients that do not wait for the answer."""
    command = serve_command(path_for(backend), "--backend", backend, "--access-log", "off", "--threads", 1)
    server = ServerProcess(command, cwd=tmp_path, **ONE_HEAP)
    rng, clients, tenth = np.random.default_rng(0), 8, CALLS // 10
    bodies = [{"inputs": ["the king " * int(n)]} for n in np.minimum(62, rng.pareto(1.2, tenth) * 4 + 1)]
    bodies[::50] = [{"inputs": 3}] * len(bodies[::50])

    def ask(first: int) -> None:
        with httpx.Client(timeout=60) as http:
            for number, body in enumerate(bodies[first::clients]):
                if number % 40 == 39:
                    with httpx.Client(timeout=0.001) as hasty, contextlib.suppress(httpx.TimeoutException):
                        hasty.post(f"{server.url}/embed", json=body)
                response = http.post(f"{server.url}/embed", json=body)
                assert response.status_code == (422 if body["inputs"] == 3 else 200), response.text

    found = []
    try:
        server.wait_until_ready()
        with ThreadPoolExecutor(clients) as pool:
            for _ in range(10):
                list(pool.map(ask, range(clients)))
                found.append(held_by(server.pid))
        assert server.end() == 0 and "Traceback" not in server.log
    finally:
        server.kill()
    memory, descriptors, threads = np.array(found).T
    # Requests that share batches make hundreds of shapes. OpenVINO keeps kernels for them, up to a bound.
    assert np.median(memory[-3:]) < (1 + TOLERANCE_WITH_THREADS) * np.median(memory[4:7]), found
    assert descriptors[-1] <= descriptors[1] + clients and threads[-1] <= threads[1] + clients, found
    attempts(f"requests to one server, whose memory, descriptors and threads stay: {backend}", CALLS)
