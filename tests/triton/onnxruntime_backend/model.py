"""A stand-in for Triton's ONNX Runtime backend: answers `backend: "onnxruntime"` with the onnxruntime wheel on the CPU.

Triton's core loads it from BACKENDS/onnxruntime/model.py as a Python-based backend. It refuses what the backend in C++
refuses (a missing file; names, dtypes, ranks and fixed sizes that the graph does not have; ragged batches) and runs
the requests that the scheduler hands over together as one batch, where their shapes are equal.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int8)": "TYPE_INT8",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(bool)": "TYPE_BOOL",
    "tensor(string)": "TYPE_STRING",
}
# optimization.graph.level, as https://github.com/triton-inference-server/onnxruntime_backend reads it.
_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class TritonPythonModel:
    """One instance of one model."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Leave the configuration as it is: what it lacks shall be refused."""
        return auto_complete_model_config

    def initialize(self, args):
        """Open the graph and compare the configuration with it."""
        config = json.loads(args["model_config"])
        self._batched = config.get("max_batch_size", 0) > 0
        self._session = _open(Path(args["model_repository"]) / args["model_version"], config)
        _check(config, "input", self._session.get_inputs())
        _check(config, "output", self._session.get_outputs())
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        missing = set(self._inputs) - {tensor["name"] for tensor in config["input"]}
        if missing:
            raise pb_utils.TritonModelException(f"config.pbtxt lacks the graph's inputs {', '.join(sorted(missing))}")

    def execute(self, requests):
        """Answer every request; those of equal shapes and outputs run as one batch."""
        responses = [None] * len(requests)
        groups = {}
        for number, request in enumerate(requests):
            feed = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs]
            outputs = tuple(request.requested_output_names())
            key = (outputs, *(array.shape[1:] for array in feed)) if self._batched else number
            groups.setdefault(key, []).append((number, feed, outputs))
        for group in groups.values():
            for (number, _, _), response in zip(group, self._run(group), strict=True):
                responses[number] = response
        return responses

    def _run(self, group):
        feeds, outputs = [feed for _, feed, _ in group], group[0][2]
        whole = [np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for arrays in zip(*feeds, strict=True)]
        try:
            results = self._session.run(list(outputs), dict(zip(self._inputs, whole, strict=True)))
        except Exception as error:  # whatever the engine raises is the answer to these requests
            failed = pb_utils.TritonError(f"onnx runtime error: {error}")
            return [pb_utils.InferenceResponse(error=failed) for _ in group]
        ends = np.cumsum([len(feed[0]) for feed in feeds])[:-1] if self._batched else []
        parts = [np.split(result, ends) for result in results]
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, np.ascontiguousarray(part[i]))
                    for name, part in zip(outputs, parts, strict=True)
                ]
            )
            for i in range(len(group))
        ]


def _open(folder, config):
    path = folder / (config.get("default_model_filename") or "model.onnx")
    if not path.is_file():
        raise pb_utils.TritonModelException(f"unable to find {path}")
    options = onnxruntime.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = _LEVELS.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.intra_op_num_threads = _integer(config, "intra_op_thread_count", 0)
    options.inter_op_num_threads = _integer(config, "inter_op_thread_count", 0)
    options.enable_cpu_mem_arena = bool(_integer(config, "enable_mem_arena", 1))
    options.enable_mem_pattern = bool(_integer(config, "enable_mem_pattern", 1))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _integer(config, name, default):
    return int(config.get("parameters", {}).get(name, {}).get("string_value", default))


def _check(config, kind, tensors):
    by_name = {tensor.name: tensor for tensor in tensors}
    for wanted in config[kind]:
        name, where = wanted["name"], f"model {config['name']}, {kind} {wanted['name']}"
        if name not in by_name:
            raise pb_utils.TritonModelException(f"{where}: the graph has only {', '.join(by_name)}")
        tensor = by_name[name]
        if wanted.get("allow_ragged_batch"):
            raise pb_utils.TritonModelException(f"{where}: a ragged batch needs a graph with a 1-D input")
        if wanted["data_type"] != _TYPES.get(tensor.type):
            raise pb_utils.TritonModelException(
                f"{where}: config.pbtxt has {wanted['data_type']}, the graph {tensor.type}"
            )
        dims = [-1] * (config.get("max_batch_size", 0) > 0) + [int(size) for size in wanted["dims"]]
        shape = [size if isinstance(size, int) else -1 for size in tensor.shape]
        fits = len(dims) == len(shape) and all(a == b or -1 in (a, b) for a, b in zip(dims, shape, strict=True))
        if not fits:
            raise pb_utils.TritonModelException(f"{where}: config.pbtxt has {dims} with its batch, the graph {shape}")
