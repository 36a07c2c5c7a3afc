"""Engines of gte-en-mlm-base's size, with random weights: the builder's memory, and the kernels of a layer."""

import json
import subprocess
import sys

import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")

LAYERS, GEMMS = 12, 4 * 12
MAX_BYTES = 2 << 30
# In a process of its own, without torch. Its own peak is VmHWM: ru_maxrss also counts the process that started it.
BUILD = """
import json, sys
from pathlib import Path
import onnx_ir as ir
from gte_deploy.exporters.graph.build import graph_of
from gte_deploy.exporters.targets.tensorrt.profiles import default_profiles
from gte_deploy.exporters.targets.tensorrt.engine import build_plan
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.runtimes import choose_runtime
from gte_deploy.tuning.measure import peak_resident_bytes
file, counts = Path(sys.argv[1]), json.loads(sys.argv[2])
plan = build_plan(
    file, file.parent, choose_runtime("rtx"), TensorRTOptions(), graph=graph_of(ir.load(file), counts, 20),
    num_layers=12, compute_capabilities=("8.9", "12.0"), profiles=default_profiles(8192),
)
print(json.dumps({"layers": plan.layers, "bytes": peak_resident_bytes()}))
"""


@pytest.fixture(scope="module")
def base():
    """The FP32 graphs of a base-size encoder."""
    torch = pytest.importorskip("torch")
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.models.config import build_config
    from gte_deploy.models.families.gte import GTE

    torch.manual_seed(0)
    model = GTE.model_class("embed")(build_config("gte-en-mlm-base")).eval()
    return build_graphs(model, task="embed", max_length=8192, pooling="mean")


@pytest.fixture(scope="module")
def graph_in(base):
    """`graph_in(precision)`: what TensorRT compiles."""
    from transformers import GteConfig

    from gte_deploy.exporters.graph.linear_layers import find_linear_layers
    from gte_deploy.exporters.targets.tensorrt.graph import QdqScheme, tensorrt_graph
    from gte_deploy.models.families.gte import GTE

    # The engine's structure does not depend on the values of the scales.
    amax = {linear.name: 8.0 for linear in find_linear_layers(base["openvino"].model)}
    sites = GTE.sites(GteConfig(num_hidden_layers=LAYERS))

    def graph(precision):
        scheme = QdqScheme(precision, amax) if precision in ("int8", "fp8") else None
        return tensorrt_graph(base["openvino"], precision, sites=sites, scheme=scheme)

    return graph


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_the_builder_stays_within_two_gigabytes(graph_in, precision, tmp_path):
    from gte_deploy.exporters.graph.build import save_graph

    graph = graph_in(precision)
    save_graph(graph, tmp_path / "base.onnx")
    command = [sys.executable, "-c", BUILD, str(tmp_path / "base.onnx"), json.dumps(graph.fusions)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["layers"]["fused_attention"] == LAYERS and found["layers"][f"{precision}_gemm"] >= GEMMS
    assert 0 < found["bytes"] < MAX_BYTES
    size = (tmp_path / "tensorrt/model.plan").stat().st_size
    weights = sum(value.const_value.nbytes for value in graph.model.graph.initializers.values())
    assert 0.9 * weights < size < 1.5 * weights


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kernels", "scratch"), [("fp16", 9, 810), ("int8", 10, 660), ("fp8", 9, 690)])
def test_kernels_and_scratch_memory(graph_in, precision, kernels, scratch, tmp_path):
    """`kernels` of each layer, and the most `scratch` memory of a profile in MB."""
    from gte_deploy.exporters.graph.build import save_graph
    from gte_deploy.exporters.targets.tensorrt.profiles import default_profiles
    from tensorrt_listing import build_listing

    save_graph(graph_in(precision), tmp_path / "base.onnx")
    listing = build_listing(trt, tmp_path / "base.onnx", default_profiles(8192))
    for profile in range(3):
        assert listing.between_attentions(profile) == [kernels] * (LAYERS - 1), profile
    assert len(listing.scratch) == 3 and max(listing.scratch) <= scratch * 1e6
