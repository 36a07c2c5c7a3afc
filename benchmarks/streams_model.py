"""Predicts what streams do for lists of texts on machines that are not here: a model, not a measurement.

    python benchmarks/streams_model.py                 # the table of docs/decisions/streams-for-lists.md
    python benchmarks/streams_model.py --shared 0.03   # with another loss for each further thread of an operator

It cuts lists as `encode` does, plans streams as `load` does, and gives each batch to the first stream that is free. A
batch takes a fixed time, and the time to compute its tokens on its threads, of which each further one adds less
(Amdahl's law); without packed weights it takes as long as some more tokens. No batch is faster than its weights can be
read from memory, whose bandwidth all running streams share.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gte_deploy.backends.stream_plan import StreamPlan, plan_streams
from gte_deploy.text.batching import BatchLimits, plan_batches

# Measured on two cores of an AMD EPYC (Zen 3): see docs/decisions/streams-for-lists.md.
_PACKING_TOKENS = 20
_CALL_TOKENS = 13


@dataclass(frozen=True)
class Subject:
    """A model on one core.

    Args:
        name: the name for people.
        bundle_bytes: size of the bundle.
        read_bytes: weights that every batch reads, without the table of words.
        token_s: seconds to compute a token on one thread.
    """

    name: str
    bundle_bytes: float
    read_bytes: float
    token_s: float


@dataclass(frozen=True)
class Machine:
    """A machine: cores, NUMA nodes, and bytes per second that all cores together read."""

    cpus: int
    nodes: int
    bandwidth: float


SUBJECTS = (Subject("tiny fp32", 46e6, 14e6, 0.110e-3), Subject("base fp32", 549e6, 435e6, 1.35e-3))
MACHINES = (Machine(2, 1, 20e9), Machine(8, 1, 60e9), Machine(32, 1, 150e9), Machine(96, 2, 300e9))
LISTS = (16, 64, 512, 4096)


def seconds(subject: Subject, machine: Machine, plan: StreamPlan, lengths: Sequence[int], shared: float) -> float:
    """The time for a list: the end of the last stream."""
    limits = BatchLimits(32, 1024, 8192**2, plan.streams, plan.least_tokens, plan.fewest_batches)
    batches = list(plan_batches(lengths, limits))
    if plan.streams > 1 and len(batches) < plan.fewest_batches:
        return seconds(subject, machine, replace(plan, streams=1, threads=machine.cpus), lengths, shared)
    free = [0.0] * plan.streams
    for group in batches:
        tokens = len(group) * max(lengths[index] for index in group)
        cost = tokens + (0 if plan.packed or plan.streams == 1 else _PACKING_TOKENS)
        speed = plan.threads / (1 + shared * (plan.threads - 1))
        computing = subject.token_s * (_CALL_TOKENS + cost / speed)
        reading = subject.read_bytes * plan.streams / machine.bandwidth
        heapq.heappush(free, heapq.heappop(free) + max(computing, reading))
    return max(free)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shared", type=float, default=0.06, help="loss of each further thread of an operator (default: 0.06)"
    )
    shared = parser.parse_args().shared
    print("| model | cores | streams × threads | " + " | ".join(f"{count:,} texts" for count in LISTS) + " |")
    print("|---|---:|---:|" + "---:|" * len(LISTS))
    for subject in SUBJECTS:
        for machine in MACHINES:
            plan = plan_streams("onnx", cpus=machine.cpus, nodes=machine.nodes, bundle_bytes=int(subject.bundle_bytes))
            one = replace(plan, streams=1, threads=machine.cpus)
            gains = []
            for count in LISTS:
                drawn = np.exp(np.random.default_rng(0).normal(np.log(30), 0.8, count))
                lengths = np.clip(drawn, 4, 512).astype(int).tolist()
                gains.append(
                    seconds(subject, machine, one, lengths, shared) / seconds(subject, machine, plan, lengths, shared)
                )
            found = " | ".join(f"{gain:.2f}" for gain in gains)
            print(f"| {subject.name} | {machine.cpus} | {plan.streams} × {plan.threads} | {found} |")


if __name__ == "__main__":
    main()
