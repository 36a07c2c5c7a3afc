"""Marks for tests that need instructions which not every CPU has."""

import pytest

from gte_deploy.backends.choice import int8_unit

needs_vnni = pytest.mark.skipif(
    int8_unit() is None, reason="this CPU has no VNNI: sums of 8-bit products overflow 16 bits, unless weights have 7"
)
