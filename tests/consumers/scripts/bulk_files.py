"""Encode files on two nodes of a Ray cluster, and to Lance; run the page's recipes for indexes on the results.

bulk_files.py BUNDLE PAGE TEXTS.jsonl SPARSE_BUNDLE
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lance
import numpy as np
import polars
import pyarrow.parquet
import ray
from ray.cluster_utils import Cluster

from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.core.errors import GteDeployError

bundle, page, texts, sparse_bundle = sys.argv[1:]
found = {}
normalized = {"normalize_embeddings": True}
few_threads = {"num_threads": 1}


def encode(output, **options):
    """Encode the texts; the options are those of BulkOptions."""
    return encode_files(
        texts,
        output,
        model=bundle,
        options=BulkOptions(shard_rows=20, **options),
        load_options=few_threads,
        encode_options=normalized,
    )


def failures(output):
    return Path(f"{output}.failures.jsonl").read_text()


here = encode("vectors.parquet")
encode("vectors.npy")
encode("vectors.lance")
encode("vectors.lance")  # replaces the older one
local = pyarrow.parquet.read_table("vectors.parquet")
stored = lance.dataset("vectors.lance").to_table()
found["lance"] = stored.equals(local)
found["metadata"] = stored.schema.metadata.keys() == local.schema.metadata.keys() == {b"gte_deploy"}
for name in ("sparse.parquet", "sparse.lance"):
    given = {"model": sparse_bundle, "load_options": few_threads, "encode_options": {"max_active_dims": 8}}
    encode_files(texts, name, method="encode_sparse", **given)
entries = lance.dataset("sparse.lance").to_table()
found["sparse"] = [
    entries.equals(pyarrow.parquet.read_table("sparse.parquet")),
    str(polars.read_parquet("sparse.parquet").schema["embedding"]),
]
frame = polars.read_parquet("vectors.parquet")
found["polars"] = [str(frame.schema["embedding"]), frame["text"].to_list() == local.column("text").to_pylist()]

# Before Ray is used by this process: the command starts a cluster for itself.
options = ["-i", texts, "--engine", "ray", "--workers", "2", "--max-failures", "99", "--json", "--normalize"]
command = [sys.executable, "-m", "gte_deploy", "encode", "-m", bundle, *options, "--shard-rows", "20", "-o"]
ended = subprocess.run([*command, "command.parquet"], capture_output=True, text=True, check=False)
found["command"] = [ended.returncode, json.loads(ended.stdout)["rows"] if ended.stdout else ended.stderr[-2000:]]

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
ray.init(address=cluster.address, log_to_driver=False)
found["nodes"] = sum(node["Alive"] for node in ray.nodes())
states = []
there = encode_files(
    texts,
    "ray.parquet",
    model=bundle,
    options=BulkOptions(shard_rows=20, engine="ray"),
    encode_options=normalized,
    report=states.append,
)
found["ray"] = pyarrow.parquet.read_table("ray.parquet").equals(local)
found["failures"] = failures("ray.parquet") == failures("vectors.parquet")
found["summaries"] = [[each.rows, each.failures, each.tokens] for each in (here, there)]
found["share"] = states[-1].share

# A local run is killed, and the cluster goes on.
command = [
    *command[: command.index("--engine")],
    "--shard-rows",
    "20",
    "--normalize",
    "--threads",
    "1",
    "-o",
    "on.parquet",
]
process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
while process.poll() is None and len(list(Path().glob("on.parquet.parts/part-*"))) < 3:
    pass
process.send_signal(signal.SIGKILL)
process.wait()
summary = encode("on.parquet", engine="ray")
found["resumed"] = [summary.resumed_rows > 0, pyarrow.parquet.read_table("on.parquet").equals(local)]

# An actor is killed: Ray starts another one for its shard.


def kill_an_actor(state):
    """Kill one actor of this cluster, once."""
    session = ray._private.worker._global_node.get_session_dir_path()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (process / "cmdline").read_text()
            parent = re.search(r"^PPid:\s+(\d+)", (process / "status").read_text(), re.M)
            if "MapWorker" in title and parent and session in Path("/proc", parent[1], "cmdline").read_text():
                if "killed" not in found:
                    os.kill(int(process.name), signal.SIGKILL)
                    found["killed"] = True


encode_files(
    texts,
    "killed.parquet",
    model=bundle,
    options=BulkOptions(shard_rows=5, engine="ray"),
    encode_options=normalized,
    report=kill_an_actor,
)
vectors = pyarrow.parquet.read_table("killed.parquet")
found["killed"] = [found.get("killed"), vectors.drop(["embedding"]).equals(local.drop(["embedding"]))]
difference = np.array(vectors["embedding"].to_pylist()) - np.array(local["embedding"].to_pylist())
found["killed"].append(float(np.abs(difference).max()))

# Errors keep their types on the way from the actors.
for name, more in {"argument": {"truncate_dim": 0}, "prompt": {"prompt_name": "nothing"}}.items():
    try:
        encode_files(texts, f"{name}.npy", model=bundle, options=BulkOptions(engine="ray"), encode_options=more)
    except GteDeployError as error:
        found[name] = [type(error).__name__, str(error)]
ray.shutdown()
cluster.shutdown()

os.symlink(bundle, "my-bundle")
index = Path(page).read_text(encoding="utf-8").split("## An index")[1]
found["recipes"] = []
for block in re.findall(r"```python\n(.*?)```", index, re.S):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(block, page, "exec"), {"__name__": "block"})
    found["recipes"].append(shown.getvalue().strip())
Path("found.json").write_text(json.dumps(found))
