"""Compares variants of the graphs for CPUs in interleaved runs: the fused on ONNX Runtime, the plain on OpenVINO.

    python benchmarks/graph_variants.py                                  # base model, some ten minutes on two cores
    python benchmarks/graph_variants.py --layers 2 --cpu-time            # on a shared machine: CPU time of one thread
    python benchmarks/graph_variants.py --variants plain fused --shapes --memory 8192
    python benchmarks/graph_variants.py --engine openvino --precision bf16 --shapes 1x512 1x2048 1x8192 8x128
    python benchmarks/graph_variants.py --engine openvino --graph BUNDLE/onnx/model_openvino.onnx    # such as INT8

Variants on ONNX Runtime (those on OpenVINO are listed in `openvino_attention.py`):

    torch                PyTorch eager, SDPA
    plain                the traced graph, standard operators
    fused                the graph that `gte-export` writes
    skip-layer-norm      com.microsoft SkipLayerNormalization instead of Add and LayerNormalization on rows
    packed               one matrix for queries, keys and values and one for up and gate, each with a split after it
    packed-qkv           only the matrix for queries, keys and values
    no-rows              RoPE and attention fused only; the rest on [batch, sequence, hidden]
    fixed-columns        the mask's columns in every batch, not only in batches with padding
    no-mask              attention without the mask's columns: shows the cost of the folded mask (padding is not masked)
    key-padding-mask     the mask as an input of MultiHeadAttention, which then holds all scores

Weights are random; all graphs come from one trace. `--memory` runs one text of that length in a fresh process for
each graph and reports its time and the process's peak resident memory (VmHWM), the session's weights included.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import gte_deploy  # noqa: F401 - before ONNX Runtime, whose telemetry it turns off

# isort: split
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino_attention
import torch
import transformers
from onnx_ir.passes import common as ir_passes
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.exporters.graph.build import Graph, save_graph
from gte_deploy.exporters.graph.editing import CONTRIB, Builder, operand, producer, replace
from gte_deploy.exporters.graph.fusion import MERGED_PASSES, PASSES, FusionPass, fuse_graph
from gte_deploy.exporters.graph.fusion.attention import ATTENTION, require_mask_columns
from gte_deploy.exporters.graph.trace import trace
from gte_deploy.models.families.gte import GTE
from gte_deploy.models.presets import preset

_MEASURE_ONE = """
import sys, time
import numpy as np, onnxruntime as ort

def peak_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 / 1e6

file, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
loaded = peak_mb()
ids = np.random.default_rng(0).integers(1000, 30000, (1, tokens))
start = time.perf_counter()
session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids), "mask_positions": np.array([[0, 0]])})
print(f"{time.perf_counter() - start:.1f} | {peak_mb():.0f} | {loaded:.0f}")
"""

SHAPES = ("1x16", "1x128", "1x512", "8x128")


def main() -> None:
    arguments = _parse()
    if arguments.engine == "openvino":
        _openvino(arguments)
        return
    torch.set_num_threads(arguments.threads)
    model = _model(arguments)
    traced = trace(model, task="fill-mask", max_length=8192, pooling=None, logits="masked", opset=20)
    plain = ir.to_proto(traced).SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: _write(name, plain, model, Path(folder)) for name in arguments.variants if name != "torch"}
        _print_setting(arguments)
        if arguments.shapes:
            _latency(arguments, model, files)
        if arguments.memory:
            options = [str(arguments.memory), str(arguments.threads)]
            _memory(arguments, {name: ["-c", _MEASURE_ONE, str(file), *options] for name, file in files.items()})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("onnx", "openvino"), default="onnx")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="what openvino computes in")
    parser.add_argument("--graph", type=Path, help="a bundle's graph for openvino, in place of one with random weights")
    parser.add_argument("--preset", default="gte-en-mlm-base")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all of the engine")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="ROWSxTOKENS")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: other programs matter less")
    parser.add_argument("--memory", type=int, metavar="TOKENS")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        arguments.threads = 1
    names = ("torch", *VARIANTS) if arguments.engine == "onnx" else tuple(openvino_attention.VARIANTS)
    arguments.variants = arguments.variants or names
    if unknown := [name for name in arguments.variants if name not in names]:
        parser.error(f"{unknown[0]!r} is no variant on {arguments.engine}; there are {', '.join(names)}")
    return arguments


def _model(arguments: argparse.Namespace) -> GteForMaskedLM:
    torch.manual_seed(0)
    fields = dict(preset(arguments.preset))
    if arguments.layers:
        fields["num_hidden_layers"] = arguments.layers
    return GteForMaskedLM(GteConfig(**fields)).eval()


def _fused(model: ir.Model, layers: int, *without: str, passes: Sequence[FusionPass] = PASSES) -> None:
    sites = GTE.sites(GteConfig(num_hidden_layers=layers))
    fuse_graph(model, sites=sites, passes=[each for each in passes if each.name not in without])


def _skip_layer_norm(model: ir.Model, layers: int) -> None:
    _fused(model, layers)
    for norm in [node for node in model.graph if node.op_type == "LayerNormalization" and ".layers." in str(node.name)]:
        first, second = producer(norm.inputs[0], "Add").inputs
        build = Builder(model.graph, norm, str(norm.name))
        options = {"domain": CONTRIB, "epsilon": norm.attributes["epsilon"].value}
        replace(norm.outputs[0], build.op("SkipLayerNormalization", first, second, *norm.inputs[1:], **options))
    ir_passes.RemoveUnusedNodesPass()(model)


def _fixed_columns(model: ir.Model, layers: int) -> None:
    _fused(model, layers, passes=[ATTENTION if each.name == ATTENTION.name else each for each in PASSES])


def _no_mask(model: ir.Model, layers: int, *, as_input: bool = False) -> None:
    _fused(model, layers)
    graph = model.graph
    for node in [node for node in graph if node.op_type == "MultiHeadAttention"]:
        for i in (0, 1):
            with_mask = require_mask_columns(node.inputs[i])
            node.replace_input_with(i, operand(producer(with_mask.inputs[0], "Reshape"), 0))
        if as_input:
            build = Builder(graph, node, f"{node.name}/mask")
            mask = next(value for value in graph.inputs if value.name == "attention_mask")
            node.resize_inputs(5)
            node.replace_input_with(4, build.op("Cast", mask, to=ir.DataType.INT32, dtype=ir.DataType.INT32))
    ir_passes.RemoveUnusedNodesPass()(model)


VARIANTS: dict[str, Callable[[ir.Model, int], None]] = {
    "plain": lambda model, layers: None,
    "fused": _fused,
    "skip-layer-norm": _skip_layer_norm,
    "packed": lambda model, layers: _fused(model, layers, passes=MERGED_PASSES),
    "packed-qkv": lambda model, layers: _fused(model, layers, "up_gate", "glu", passes=MERGED_PASSES),
    "no-rows": lambda model, layers: _fused(model, layers, "projections", "skip_layer_norm"),
    "fixed-columns": _fixed_columns,
    "no-mask": _no_mask,
    "key-padding-mask": lambda model, layers: _no_mask(model, layers, as_input=True),
}


def _write(name: str, traced: bytes, model: GteForMaskedLM, folder: Path) -> Path:
    variant = ir.from_proto(onnx.load_from_string(traced))
    VARIANTS[name](variant, model.config.num_hidden_layers)
    file = folder / f"{name}.onnx"
    save_graph(Graph(variant, {}, 20, (), ()), file)
    return file


def _session(file: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _feeds(session: ort.InferenceSession, rows: int, tokens: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1000, 30000, (rows, tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mask_positions": np.array([[0, 0]])}
    return {value.name: feeds[value.name] for value in session.get_inputs()}


def _latency(arguments: argparse.Namespace, model: GteForMaskedLM, files: dict[str, Path]) -> None:
    sessions = {name: _session(file, arguments.threads) for name, file in files.items()}

    def calls_of(rows: int, tokens: int) -> dict[str, Callable[[], object]]:
        calls = {name: _call(session, rows, tokens) for name, session in sessions.items()}
        if "torch" in arguments.variants:
            calls["torch"] = _torch_call(model, rows, tokens)
        return calls

    _compare(arguments, calls_of)


def _compare(arguments: argparse.Namespace, calls_of: Callable[[int, int], dict[str, Callable[[], object]]]) -> None:
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows: dict[str, list[str]] = {name: [] for name in arguments.variants}
    for shape in arguments.shapes:
        batch, tokens = map(int, shape.split("x"))
        calls = calls_of(batch, tokens)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(arguments.repeats):
            for name, call in calls.items():
                start = clock()
                call()
                seconds[name].append(clock() - start)
        base = statistics.median(seconds.get("torch") or seconds[arguments.variants[0]])
        for name, values in seconds.items():
            median = statistics.median(values)
            rows[name].append(f"{median * 1000:.0f} ({min(values) * 1000:.0f}), {base / median:.2f}")
    print("Median (minimum) milliseconds, and speed relative to the first row:\n")
    print(f"| | {' | '.join(arguments.shapes)} |\n|---|{'---|' * len(arguments.shapes)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def _call(session: ort.InferenceSession, rows: int, tokens: int) -> Callable[[], object]:
    feeds = _feeds(session, rows, tokens)
    return lambda: session.run(None, feeds)


def _torch_call(model: GteForMaskedLM, rows: int, tokens: int) -> Callable[[], object]:
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 30000, (rows, tokens)))
    mask = torch.ones_like(ids)

    def call() -> object:
        with torch.inference_mode():  # as the graphs do: the head sees one masked row, not all
            hidden = model.gte(input_ids=ids, attention_mask=mask).last_hidden_state
            return model.lm_head(hidden[:1, 0])

    return call


def _openvino(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.graph
        if file is None:
            file = Path(folder) / "plain.onnx"
            traced = trace(
                _model(arguments), task="fill-mask", max_length=8192, pooling=None, logits="masked", opset=20
            )
            save_graph(Graph(traced, {}, 20, (), ()), file)
        _print_setting(arguments)
        if arguments.shapes:
            _openvino_latency(arguments, file)
        if arguments.memory:
            options = [str(arguments.memory), str(arguments.threads), arguments.precision]
            script = openvino_attention.__file__
            _memory(arguments, {name: [str(script), str(file), name, *options] for name in arguments.variants})


def _openvino_latency(arguments: argparse.Namespace, file: Path) -> None:
    requests = {
        name: openvino_attention.compiled_request(file, name, arguments.threads, arguments.precision)
        for name in arguments.variants
    }

    def calls_of(rows: int, tokens: int) -> dict[str, Callable[[], object]]:
        inputs = {name: openvino_attention.feeds(request, rows, tokens) for name, request in requests.items()}
        return {name: functools.partial(request.infer, inputs[name]) for name, request in requests.items()}

    _compare(arguments, calls_of)


def _memory(arguments: argparse.Namespace, commands: dict[str, list[str]]) -> None:
    """Run each command in a fresh process, without this module, whose import of torch would count."""
    print(f"One text of {arguments.memory} tokens, each graph in a fresh process:\n")
    print("| | seconds | peak resident MB | loaded MB |\n|---|---|---|---|")
    for name, arguments_of in commands.items():
        command = [sys.executable, *arguments_of]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {name} | {done.stdout.strip()} |", flush=True)


def _print_setting(arguments: argparse.Namespace) -> None:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    print(f"{datetime.date.today()}, {cpu}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    model = arguments.graph or f"{arguments.preset}, {arguments.layers or 'all'} layers"
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"onnxruntime {ort.__version__}, openvino {metadata.version('openvino')}; "
        f"{model}, {arguments.precision}"
        f"{', CPU time' if arguments.cpu_time else ''}\n"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main()
