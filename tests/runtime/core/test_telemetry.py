"""Nothing is told to anyone: ONNX Runtime's own telemetry is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx


def test_onnxruntime_keeps_no_device_id(tmp_path: Path) -> None:
    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "identity", [tensor], [output])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]),
        tmp_path / "m.onnx",
    )
    script = "import sys, gte_deploy, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"
    # Where it is on, it begins with a device id in the cache folder; a variable CI would turn it off, too.
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    for name in ("CI", "ORT_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", script, tmp_path / "m.onnx"], env=environment, check=True, timeout=120)
    assert list(home.rglob("*")) == []
