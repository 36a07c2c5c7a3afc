"""Waiting for other threads in tests: until something holds, and never for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 10
"""Seconds after which a test that waits has failed."""


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)
