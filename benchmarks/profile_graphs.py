"""Profiles the graphs of a CPU bundle: time by kind of operator, and the share of this CPU's GEMM peak.

    python benchmarks/profile_graphs.py BUNDLE
    python benchmarks/profile_graphs.py BUNDLE --engines openvino --precision bf16 --shapes 1x512 --json profile.json

For each engine and shape, the table has the median milliseconds of each kind of operator in one run, its share of the
run, and for matrix products and attention the billions of operations in a second (GFLOP/s; GOP/s for 8-bit integers).
The peak is that of one product of 2,048 x 2,048 matrices, which the same engine computes in the same type; a profile
gives its time, too. So "% of peak" compares the products of the layers with the best that the engine does on this CPU.

Both engines run with the settings of this package's backends. Profiling itself takes time, so compare shares and not
totals with `inference.py`. Without a bundle of its own, `--random PRESET` profiles the FP32 graphs of a model with
random weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gte_deploy  # noqa: F401 - before ONNX Runtime, whose telemetry it turns off

# isort: split
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from gte_deploy.backends.base import Batch
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.quiet import import_openvino
from gte_deploy.exporters.graph.editing import CONTRIB, is_in_layer

PEAK_SIZE = 2048
SHAPES = ("1x16", "1x512", "8x128")
# The names of a graph's inputs -> their arrays.
InputsByName = Callable[[Sequence[str]], Mapping[str, np.ndarray]]
GRAPHS = {"onnx": "onnxruntime", "openvino": "openvino"}
PRODUCTS, INTEGER_PRODUCTS, ATTENTION = "matrix products", "8-bit matrix products", "attention"

# The type of a node in a profile -> kind. Other types are "others".
_KINDS = {
    **dict.fromkeys(("Gemm", "MatMul", "FullyConnected", "MatMulNBits"), PRODUCTS),
    **dict.fromkeys(("MatMulIntegerToFloat", "MatMulInteger"), INTEGER_PRODUCTS),
    **dict.fromkeys(("MultiHeadAttention", "Subgraph", "Softmax"), ATTENTION),
    **dict.fromkeys(("QuantizeLinear", "DynamicQuantizeLinear", "FakeQuantize"), "quantization"),
    **dict.fromkeys(("LayerNormalization", "MVN"), "LayerNorm"),
    **dict.fromkeys(("RotaryEmbedding", "RoPE"), "rotation"),
    **dict.fromkeys(("Concat", "Reshape", "Reorder", "Transpose", "Expand", "Slice", "StridedSlice"), "copies"),
    **dict.fromkeys(("Add", "Mul", "Eltwise", "Gelu"), "elementwise"),
}


@dataclass(frozen=True)
class Line:
    """One kind of operator in one run.

    Args:
        engine, shape: what ran.
        kind: the kind of operator.
        ms: median milliseconds of all its nodes together.
        share: of the sum of all kinds.
        gops: billions of operations a second; None for kinds without matrix products.
        of_peak: `gops` over the peak of the same engine and type; None without `gops`.
    """

    engine: str
    shape: str
    kind: str
    ms: float
    share: float
    gops: float | None
    of_peak: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile a bundle, print the table, and write the JSON file if one is asked for."""
    options = _parse(arguments)
    manifest = read_manifest(options.bundle)
    lines: list[Line] = []
    for engine in options.engines:
        entry = manifest.graphs.get(GRAPHS[engine])
        if entry is None:
            raise SystemExit(f"{options.bundle} has no graph for {engine}; it has {', '.join(manifest.graphs)}")
        graph = options.bundle / entry.path
        profile = Profiler(engine, options.threads, options.precision, options.repeats)
        peaks = profile.peaks()
        print(f"{engine}: peak " + ", ".join(f"{kind} {peak:,.0f} G/s" for kind, peak in peaks.items()), flush=True)
        work = Work.of(ir.load(graph))
        for shape in options.shapes:
            rows, tokens = map(int, shape.split("x"))
            lines += _lines(engine, shape, profile.kinds(graph, rows, tokens), work.operations(rows, tokens), peaks)
    print(f"\n{_setting(options)}\n\n{_table(lines)}")
    if options.json:
        document = {"setting": _setting(options), "lines": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engines", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="what openvino computes in")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxTOKENS")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--json", type=Path, help="also write the lines of the table to this file")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Work:
    """The multiplications of a graph's layers.

    Args:
        products: kind -> elements of the weight matrices in the layers, which a token multiplies once each.
        widths: the width of all heads together, for each attention.
    """

    products: Mapping[str, int]
    widths: Sequence[int]

    @classmethod
    def of(cls, model: ir.Model) -> Work:
        """Read a graph for ONNX Runtime or OpenVINO."""
        products: dict[str, int] = defaultdict(int)
        widths = []
        for node in model.graph:
            if node.op_type in ("Gemm", "MatMul", "MatMulIntegerToFloat"):
                weight, kind = node.inputs[1], PRODUCTS
                source = None if weight is None else weight.producer()
                if source is not None and source.op_type == "DequantizeLinear":
                    weight = source.inputs[0]
                if weight is None or not weight.is_initializer() or weight.const_value is None:
                    continue
                if weight.const_value.dtype == ir.DataType.INT8:
                    kind = INTEGER_PRODUCTS
                if not is_in_layer(str(weight.name)):
                    continue
                products[kind] += weight.const_value.size
                if "o_proj" in str(weight.name):  # its input is the output of attention
                    widths.append(int(weight.const_value.shape.numpy()[0]))
        return cls(products, widths)

    def operations(self, rows: int, tokens: int) -> dict[str, float]:
        """Kind -> operations of a run; a multiplication and its sum are two."""
        counts: dict[str, float] = {kind: 2.0 * size * rows * tokens for kind, size in self.products.items()}
        counts[ATTENTION] = sum(4.0 * rows * tokens * tokens * width for width in self.widths)
        return counts


@dataclass(frozen=True)
class Profiler:
    """Profiles graphs on one engine.

    Args:
        engine: "onnx" or "openvino".
        threads: the threads inside one operator.
        precision: the precision that openvino computes in.
        repeats: the measured runs; one more comes before them.
    """

    engine: str
    threads: int
    precision: str
    repeats: int

    def kinds(self, graph: Path, rows: int, tokens: int) -> dict[str, float]:
        """Kind of operator -> milliseconds of one run without padding."""
        ids = np.random.default_rng(0).integers(5, 100, (rows, tokens))
        batch = Batch(ids, np.ones_like(ids), np.zeros((1, 2), np.int64))
        found: dict[str, float] = defaultdict(float)
        for kind, seconds in self._nodes(graph, batch.graph_inputs):
            found[kind] += seconds * 1e3
        return dict(found)

    def peaks(self) -> dict[str, float]:
        """Kind of matrix product -> billions of operations a second of one large product."""
        x = np.random.default_rng(0).integers(-100, 100, (PEAK_SIZE, PEAK_SIZE)).astype(np.float32)
        found = {}
        for kind in (PRODUCTS, INTEGER_PRODUCTS):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "peak.onnx"
                ir.save(_large_product(self.engine, kind), file)
                nodes = self._nodes(file, lambda _: {"x": x})
            found[kind] = 2 * PEAK_SIZE**3 / sum(taken for each, taken in nodes if each in (PRODUCTS, kind)) / 1e9
        return found

    def _nodes(self, graph: Path, inputs: InputsByName) -> list[tuple[str, float]]:
        return (_onnx_nodes if self.engine == "onnx" else _openvino_nodes)(self, graph, inputs)


def _onnx_nodes(profiler: Profiler, graph: Path, inputs: InputsByName) -> list[tuple[str, float]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = profiler.threads
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_mem_pattern = False
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        feed = inputs([value.name for value in session.get_inputs()])
        for _ in range(profiler.repeats + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: dict[str, list[float]] = defaultdict(list)
    types = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[event["name"]].append(event["dur"] / 1e6)
            types[event["name"]] = event["args"]["op_name"]
    return [(_KINDS.get(types[name], "others"), statistics.median(taken[1:])) for name, taken in runs.items()]


def _openvino_nodes(profiler: Profiler, graph: Path, inputs: InputsByName) -> list[tuple[str, float]]:
    openvino = import_openvino()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": profiler.threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[profiler.precision],
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": True,
    }
    model = openvino.Core().compile_model(str(graph), "CPU", config)
    request = model.create_infer_request()
    feed = inputs([value.any_name for value in model.inputs])
    runs: dict[str, list[float]] = defaultdict(list)
    kinds = {}
    for _ in range(profiler.repeats + 1):
        request.infer(feed)
        for node in request.profiling_info:
            if node.real_time.total_seconds() > 0:
                runs[node.node_name].append(node.real_time.total_seconds())
                kinds[node.node_name] = _openvino_kind(node)
    return [(kinds[name], statistics.median(taken[1:] or taken)) for name, taken in runs.items()]


def _openvino_kind(node: Any) -> str:
    kind = _KINDS.get(node.node_type, "others")
    return INTEGER_PRODUCTS if kind == PRODUCTS and node.exec_type.endswith(("I8", "U8")) else kind


def _large_product(engine: str, kind: str) -> ir.Model:
    """A graph of one product with a constant square matrix, in the form that the engine's graphs have."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("rows", PEAK_SIZE)))
    weight = rng.integers(-100, 100, (PEAK_SIZE, PEAK_SIZE))
    constants = {
        "weight": weight.astype(np.float32) if kind == PRODUCTS else weight.astype(np.int8),
        "scale": np.array(1, np.float32),
        "zero": np.array(128, np.uint8),
        "scales": np.ones(PEAK_SIZE, np.float32),
    }
    used = {name: _initializer(name, array) for name, array in constants.items()}
    if kind == PRODUCTS:
        nodes = [ir.node("MatMul", [x, used.pop("weight")])]
        used = {"weight": nodes[0].inputs[1]}
    else:
        quantized = ir.node("QuantizeLinear", [x, used["scale"], used["zero"]])
        nodes = [quantized]
        if engine == "onnx":
            inputs = [quantized.outputs[0], used["weight"], used["scale"], used["scales"], used["zero"]]
            nodes.append(ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB))
        else:
            back = ir.node("DequantizeLinear", [quantized.outputs[0], used["scale"], used["zero"]])
            floats = ir.node("DequantizeLinear", [used["weight"], used["scales"]], {"axis": 1})
            nodes += [back, floats, ir.node("MatMul", [back.outputs[0], floats.outputs[0]])]
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(("rows", PEAK_SIZE))
    imports = {"": 20, CONTRIB: 1}
    graph = ir.Graph([x], [y], nodes=nodes, initializers=list(used.values()), opset_imports=imports, name="peak")
    return ir.Model(graph, ir_version=10)


def _initializer(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))


def _lines(
    engine: str, shape: str, kinds: Mapping[str, float], work: Mapping[str, float], peaks: Mapping[str, float]
) -> Iterable[Line]:
    total = sum(kinds.values())
    for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        gops = work[kind] / ms / 1e6 if work.get(kind) else None
        peak = peaks.get(PRODUCTS if kind == ATTENTION else kind)
        yield Line(engine, shape, kind, ms, ms / total, gops, gops / peak if gops and peak else None)


def _table(lines: Sequence[Line]) -> str:
    rows = ["| engine | shape | kind | ms | share | G/s | % of peak |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        gops = "" if line.gops is None else f"{line.gops:,.0f}"
        of_peak = "" if line.of_peak is None else f"{line.of_peak:.0%}"
        cells = (line.engine, line.shape, line.kind, f"{line.ms:.2f}", f"{line.share:.1%}", gops, of_peak)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _setting(options: argparse.Namespace) -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "an unknown CPU")
    return (
        f"{datetime.date.today()}, {cpu}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, "
        f"onnxruntime {ort.__version__}, python {platform.python_version()}, openvino in {options.precision}"
    )


if __name__ == "__main__":
    sys.exit(main())
