"""CUDA graphs under simulated traffic: few runs prepare anything, and contexts are few, whatever the lengths of texts.

A hit is a run that creates no context and captures no graph. A replay is a run from a graph. The doubles count both;
they say nothing about time.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.graph_cache import GraphLimits
from gte_deploy.core.spec import ModelSpec, TensorSpec
from gte_deploy.exporters.targets.tensorrt.profiles import default_profiles, packed_profiles
from tensorrt_doubles import HostRuntime, backend_over, engine_of, packed_plan, plan_of

SPEC = ModelSpec(task="embed", max_length=8192, vocab_size=50, hidden_size=4, pad_token_id=0, pooling="mean")
OUTPUTS = (TensorSpec("sentence_embedding", "float32", ("batch", 4)),)
LIMITS = GraphLimits()
CALLS = 800


def lognormal(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Lengths of texts as in a search engine: half have up to 150 tokens, one in a hundred more than 960."""
    return np.clip(np.exp(rng.normal(np.log(150), 0.8, rows)).astype(int), 1, 8192)


TRAFFIC = {
    "single texts, lognormal": lambda rng: lognormal(rng, 1),
    "single texts, 1 to 512": lambda rng: rng.integers(1, 513, 1),
    "single texts, 1 to 8192": lambda rng: rng.integers(1, 8193, 1),
    "1 to 32 rows": lambda rng: lognormal(rng, rng.integers(1, 33)),
    "32 rows": lambda rng: lognormal(rng, 32),
}
# (padded, padding-free). Shapes repeat where rows are fixed; batches of 1 to 32 rows have many hundred shapes.
LEAST_REPLAYS = {
    "single texts, lognormal": (0.95, 0.85),
    "single texts, 1 to 512": (0.99, 0.85),
    "single texts, 1 to 8192": (0.85, 0.85),
    "1 to 32 rows": (0.6, 0.2),
    "32 rows": (0.95, 0.95),
}


def batch_of(lengths: np.ndarray) -> Batch:
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    return Batch(mask, mask)


def backend_for_traffic(padding_free: bool, runtime: HostRuntime):
    make = packed_plan if padding_free else plan_of
    plan = make(profiles=packed_profiles(8192) if padding_free else default_profiles(8192), outputs=OUTPUTS)
    inputs = tuple(tensor for tensor in plan.inputs if tensor.name != "mask_positions")
    backend = backend_over(runtime, dataclasses.replace(plan, inputs=inputs), SPEC)
    engine_of(backend).compute = lambda shapes, addresses: None
    return backend


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_nearly_every_run_in_steady_state_is_a_hit(traffic: str, padding_free: bool):
    runtime, rng = HostRuntime(), np.random.default_rng(0)
    backend = backend_for_traffic(padding_free, runtime)
    for _ in range(CALLS):
        backend.run(batch_of(TRAFFIC[traffic](rng)), ["sentence_embedding"])
    before = backend.counts()
    for _ in range(CALLS):
        backend.run(batch_of(TRAFFIC[traffic](rng)), ["sentence_embedding"])
    after = backend.counts()
    runs, prepared, replays = (after[name] - before[name] for name in ("runs", "preparations", "replays"))
    assert runs >= CALLS, "a batch may take several runs"
    assert 1 - prepared / CALLS >= 0.95
    assert replays / runs >= LEAST_REPLAYS[traffic][padding_free]
    num_profiles = len(engine_of(backend).plan.profiles)
    assert after["contexts"] == runtime.num_contexts <= after["contexts created"] <= LIMITS.max_graphs + num_profiles
