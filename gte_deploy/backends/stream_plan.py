"""Plans the streams of lists: how many batches of a list are computed at once, and with how many CPU threads each.

The model behind the plan, and what it predicts for machines of 2 to 96 cores: docs/decisions/streams-for-lists.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gte_deploy.core.errors import InputError

MAX_STREAMS = 32
"""The most streams of a plan: each has activations of its own, some 50 MB for a batch of the base size."""
PACKED_BYTES = 64 << 20
"""Size of a bundle up to which the streams get a packed copy of the weights."""
FEWEST_TOKENS = 128
"""A list is not cut into batches of fewer tokens: below that, the cost of a call outweighs the second stream."""

# A further thread of an operator adds so much less than a thread of its own stream: 3 to 6 % from 1 to 2 threads.
_SHARED = 0.06
# Without packed weights, every call packs them. That takes as long as computing about so many tokens.
_PACKING_TOKENS = 20
# Batches that are shorter than that win less than they risk. A plan that needs longer ones is not worth its session.
_LONGEST_LEAST = 512


@dataclass(frozen=True)
class StreamPlan:
    """The streams of lists.

    Args:
        streams: the number of batches that are computed at once; 1 for one after the other, on all threads.
        threads: CPU threads of each stream.
        least_tokens: a list is cut into a batch for each stream, as long as a batch keeps so many tokens.
        fewest_batches: a list of fewer batches keeps too many streams idle: it runs on all threads.
        packed: whether the streams have a packed copy of the weights. Without one they read the mapped file.
        reason: why, in a sentence.
        batch_tokens: the most tokens of a batch, padding included; None for the default.
    """

    streams: int
    threads: int
    least_tokens: int
    fewest_batches: int
    packed: bool
    reason: str
    batch_tokens: int | None = None


@dataclass(frozen=True)
class ListPick:
    """What `gte-deploy bench --pick` found to be the fastest for lists.

    Args:
        streams: see `StreamPlan`.
        batch_tokens: see `StreamPlan`.
    """

    streams: int
    batch_tokens: int

    @classmethod
    def from_json(cls, fields: Mapping[str, int]) -> "ListPick":
        """Read the fields of a file.

        Raises:
            ValueError: a field is no positive integer.
        """
        if any(type(value) is not int or value < 1 for value in fields.values()):
            raise ValueError(f"the streams of lists are {dict(fields)}, and not positive integers")
        return cls(**fields)


def efficiency(threads: int) -> float:
    """What a thread does in an operator of so many threads, as a share of what it does alone."""
    return 1 / (1 + _SHARED * (threads - 1))


def usual_streams(cpus: int, nodes: int) -> int:
    """The number of streams that suits the CPUs: one for each, at most MAX_STREAMS, none over two NUMA nodes."""
    node = max(1, cpus // nodes)
    threads = min(math.ceil(cpus / MAX_STREAMS), node)
    return min(nodes, cpus) * (node // threads)


def plan_streams(
    backend: str,
    *,
    cpus: int,
    nodes: int,
    bundle_bytes: int,
    streams: int | None = None,
    picked: ListPick | None = None,
) -> StreamPlan:
    """Plan the streams of a bundle on the CPU.

    Args:
        backend: "onnx" or "openvino".
        cpus: CPU threads of the whole model.
        nodes: NUMA nodes that the CPUs are on. No stream of the plan needs CPUs of two nodes.
        bundle_bytes: size of the bundle, nearly all of it weights.
        streams: the number that the caller wants; None for the best.
        picked: the recorded measurement on this machine, for this number of CPUs.
    """
    packed = backend == "openvino" or bundle_bytes <= PACKED_BYTES
    batch_tokens = picked.batch_tokens if picked is not None else None
    if streams is not None:
        reason = "it was asked for"
    elif picked is not None:
        streams, reason = picked.streams, "gte-deploy bench --pick found it the fastest for lists here"
    elif cpus == 1:
        streams, reason = 1, "the model has one CPU thread"
    elif backend == "openvino":
        streams, reason = 1, "OpenVINO needs a second copy of the weights for streams: load(…, streams=N) allows it"
    else:
        streams = usual_streams(cpus, nodes)
        reason = f"{cpus} CPU threads compute {streams} batches of a list faster at once than one after the other"
        if _least_tokens(streams, cpus, packed) > _LONGEST_LEAST:
            streams = 1
            reason = f"with {cpus} CPU threads, streams that read the weights from the mapped file are no faster"
    threads, least = max(1, cpus // streams), min(_least_tokens(streams, cpus, packed), _LONGEST_LEAST)
    fewest = math.ceil(cpus * efficiency(cpus) / (threads * efficiency(threads)))
    return StreamPlan(streams, threads, least, max(2, min(streams, fewest)), packed, reason, batch_tokens)


def stream_count(streams: object) -> int | None:
    """Check the argument `streams` of `load`; None for "auto".

    Raises:
        InputError: it is neither "auto" nor a positive integer.
    """
    if streams == "auto":
        return None
    if type(streams) is int and 1 <= streams <= MAX_STREAMS * 8:
        return streams
    raise InputError(f"streams is {streams!r}; expected 'auto' or an integer from 1 to {MAX_STREAMS * 8}")


def _least_tokens(streams: int, cpus: int, packed: bool) -> int:
    """Tokens of a batch from which streams are faster than one batch on all threads, with a margin of two."""
    threads = max(1, cpus // streams)
    gain = streams * threads * efficiency(threads) / (cpus * efficiency(cpus)) - 1
    if packed:
        return FEWEST_TOKENS
    return _LONGEST_LEAST + 1 if gain <= 0 else max(FEWEST_TOKENS, math.ceil(2 * _PACKING_TOKENS / gain))
