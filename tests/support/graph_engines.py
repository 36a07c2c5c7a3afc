"""Opens ONNX files in an engine, in a process of its own: a file may crash it.

    python graph_engines.py ENGINE REPORT < NAMES

For each file name of a line on stdin, two lines of JSON go to the file REPORT: the name before the engine opens the
file, and then what the engine saw: the operators (ONNX Runtime, which writes the graph that it read), or null if it
refused. Engines themselves write to stdout.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Operators = frozenset[tuple[str, str]]


def opened_by(engine: str, files: Sequence[Path]) -> Iterator[tuple[Path, Operators | None | str]]:
    """Yield each file with the operators that the engine saw, None if it refused, or "crashed".

    OpenVINO does not say what operators it read; it gives an empty set.
    """
    left = list(files)
    while left:
        names = "".join(f"{file}\n" for file in left)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report"
            report.touch()
            command = [sys.executable, __file__, engine, str(report)]
            child = subprocess.run(command, input=names, capture_output=True, text=True, errors="replace", check=False)
            lines = [json.loads(line) for line in report.read_text().splitlines()]
        done = len(lines) // 2
        for file, (_, seen) in zip(left, zip(lines[::2], lines[1::2], strict=False), strict=False):
            yield file, None if seen is None else frozenset(map(tuple, seen))
        if done < len(left):
            if len(lines) == 2 * done:
                raise RuntimeError(f"{engine} did not start: {child.stderr[-2000:]}")
            yield left[done], "crashed"
            done += 1
        left = left[done:]


def operators_of(model: object) -> Operators:
    """Return the operators that a `ModelProto` contains anywhere, as the `onnx` package reads it."""
    return frozenset((node.domain, node.op_type) for node in _messages(model, "NodeProto"))


def locations_of(model: object) -> frozenset[str]:
    """Return the locations of external data anywhere in a `ModelProto`, as the `onnx` package reads it."""
    entries = (entry for tensor in _messages(model, "TensorProto") for entry in tensor.external_data)
    return frozenset(entry.value for entry in entries if entry.key == "location")


def _messages(message: Any, kind: str) -> Iterator[Any]:
    """Yield each message of a kind in a message, at any depth."""
    if message.DESCRIPTOR.name == kind:
        yield message
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for inner in value if not hasattr(value, "DESCRIPTOR") else [value]:
                yield from _messages(inner, kind)


def _with_onnxruntime() -> Callable[[Path], list[tuple[str, str]]]:
    import onnx
    import onnxruntime

    written = Path(tempfile.mkdtemp()) / "read.onnx"

    def seen(file: Path) -> list[tuple[str, str]]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(written)
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return sorted(operators_of(onnx.load(written, load_external_data=False)))

    return seen


def _with_openvino() -> Callable[[Path], list[tuple[str, str]]]:
    import openvino

    core = openvino.Core()

    def seen(file: Path) -> list[tuple[str, str]]:
        core.compile_model(core.read_model(file), "CPU", {"INFERENCE_NUM_THREADS": 1})
        return []

    return seen


if __name__ == "__main__":
    open_file = {"onnxruntime": _with_onnxruntime, "openvino": _with_openvino}[sys.argv[1]]()
    with open(sys.argv[2], "w") as report:
        for line in sys.stdin:
            print(json.dumps(line.rstrip("\n")), file=report, flush=True)
            try:
                answer = open_file(Path(line.rstrip("\n")))
            except Exception:  # whatever class the engine has for its refusal
                answer = None
            print(json.dumps(answer), file=report, flush=True)
