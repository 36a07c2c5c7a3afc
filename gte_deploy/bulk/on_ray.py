"""Encodes the shards of a run in actors of a Ray cluster.

The driver reads the input once, to cut it into shards. Ray Data gives each actor the place of a shard; the actor reads
it from the input, encodes it, and writes its part. So neither texts nor vectors pass through the driver, and all nodes
must see the input, the output and a model in a folder under the same paths.
"""

import functools
import importlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gte_deploy.bulk.job import BulkJob
from gte_deploy.bulk.progress import BulkProgress
from gte_deploy.bulk.rows import Start
from gte_deploy.bulk.shards import Cursor, Position, read_shards
from gte_deploy.bulk.vectors import ShardEncoder
from gte_deploy.core import errors
from gte_deploy.core.calls import Call
from gte_deploy.core.errors import BackendError, GteDeployError, InputError, MissingDependencyError
from gte_deploy.model import Model


def encode_on_ray(job: BulkJob, cursor: Cursor, progress: BulkProgress) -> None:
    """Encode all shards from a place on, each in one of the actors of a cluster.

    The cluster is the one that this process is connected to, that RAY_ADDRESS names, or that runs on this machine;
    without any, a local one runs for the time of the call.

    Raises:
        InputError, MissingDependencyError: see `encode_files`.
        BackendError: an actor failed.
    """
    # Ray would send statistics about its use over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
        data: Any = importlib.import_module("ray.data")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("ray", "ray") from error
    shards = read_shards(job.files, cursor, shard_rows=job.options.shard_rows, most_bytes=0)
    cursors = [shard.cursor for shard in shards]
    places = [_as_row(place) for place in cursors if not job.parts.has(place.number)]
    connected = ray.is_initialized()
    if not connected:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
    try:
        workers, resources = _resources(job, ray.nodes())
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        found = data.from_items(places, override_num_blocks=len(places)).map_batches(
            _Worker,
            fn_constructor_args=(_with_threads(job, resources),),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(workers, len(places))),
            **resources,
        )
        for done, row in enumerate(found.iter_rows(), len(cursors) - len(places) + 1):
            if row["error"]:
                kind = getattr(errors, str(row["kind"]), BackendError)
                raise kind(f"on {row['host']}: {row['error']}")
            for part in job.parts.read([int(row["number"])]):
                progress.finished(part, share=done / len(cursors))
    except ray.exceptions.RayError as error:
        raise BackendError(f"an actor of the Ray cluster failed: {error}") from error
    finally:
        if not connected:
            ray.shutdown()


class _Worker:
    """An actor: loads the model at its first shard, and encodes one shard after the other."""

    def __init__(self, job: BulkJob) -> None:
        self._job = job
        self._encoder: ShardEncoder | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        row = {name: int(values[0]) for name, values in batch.items()}
        answer = {"number": row["number"], "host": socket.gethostname(), "kind": "", "error": ""}
        try:
            self._encode(_as_cursor(row))
        # As data, since an exception would lose its type on the way to the driver.
        except (GteDeployError, OSError) as error:
            kind = type(error).__name__ if isinstance(error, BackendError | InputError) else "BackendError"
            answer |= {"kind": kind, "error": str(error)}
        return {name: [value] for name, value in answer.items()}

    def _encode(self, cursor: Cursor) -> None:
        job = self._job
        if job.parts.has(cursor.number):
            return
        if not job.parts.folder.is_dir():
            raise InputError(f"{job.parts.folder} is not here: all nodes need the folders of input and output")
        if self._encoder is None:
            self._encoder = job.encoder(job.source if isinstance(job.source, Model) else job.source())
        job.computed(self._encoder, next(job.shards(self._encoder, cursor)), Call())()


def _as_row(cursor: Cursor) -> dict[str, int]:
    position = cursor.position
    start = position.start
    return {
        "number": cursor.number,
        "first": cursor.first,
        "file": position.file,
        "row": start.row,
        "offset": start.offset,
    }


def _as_cursor(row: Mapping[str, int]) -> Cursor:
    return Cursor(row["number"], row["first"], Position(row["file"], Start(row["row"], row["offset"])))


def _resources(job: BulkJob, nodes: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """The number of actors, and the resources of each.

    Raises:
        InputError: the cluster has no GPU, and the model runs on one.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    if job.on_gpu:
        gpus = int(sum(node.get("GPU", 0) for node in found))
        if gpus == 0:
            raise InputError("the model runs on GPUs, and the Ray cluster has none")
        return job.options.workers or gpus, {"num_gpus": 1, "num_cpus": 1}
    cpus = [int(node["CPU"]) for node in found if node.get("CPU", 0) >= 1]
    if not cpus:
        raise InputError("no node of the Ray cluster has a CPU to spare")
    workers = job.options.workers or len(cpus)
    # Ray places an actor on one node, which must have all of its CPUs.
    fit = (share for share in range(max(cpus), 0, -1) if sum(count // share for count in cpus) >= workers)
    return workers, {"num_cpus": next(fit, 1)}


def _with_threads(job: BulkJob, resources: Mapping[str, int]) -> BulkJob:
    """The job with a model that has as many threads as its actor has CPUs, unless the caller has chosen."""
    source = job.source
    if job.on_gpu or not isinstance(source, functools.partial) or "num_threads" in source.keywords:
        return job
    return replace(job, source=functools.partial(source, num_threads=resources["num_cpus"]))
