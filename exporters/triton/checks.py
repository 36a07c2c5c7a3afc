"""Checks a model repository for mistakes that Triton refuses or silently ignores, before anybody deploys it.

Every configuration is parsed against Triton's own protobuf, which finds wrong syntax, unknown fields and wrong enums.
The checks here compare the rest with the files in the folders: graphs, data, and the other models of an ensemble.
"""

import ast
import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.bundle.inspection import inspect_onnx
from gte_deploy.core.errors import BundleError, InputError, MissingDependencyError

_NUMPY_TYPES = {
    "TYPE_BOOL": "bool",
    "TYPE_INT32": "int32",
    "TYPE_INT64": "int64",
    "TYPE_FP16": "float16",
    "TYPE_FP32": "float32",
}
_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
_OURS = frozenset(("gte_deploy", "gte_deploy_spec"))
# Triton passes all parameters on, and a backend reads only those that it knows: a misspelt parameter has no effect.
_PARAMETERS = {
    "ensemble": _OURS,
    "tensorrt": frozenset(("execution_context_allocation_strategy",)),
    "python": _OURS
    | {"length_buckets", "spare_tokens", "max_rows", "max_masks", "threads"}
    | {"profiles", "plan_inputs", "plan_outputs"}
    | {"flat_positions"}  # in repositories of earlier versions
    | {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"},
    "onnxruntime": frozenset(
        (
            *("intra_op_thread_count", "inter_op_thread_count", "execution_mode"),
            *("enable_mem_arena", "enable_mem_pattern", "memory.enable_memory_arena_shrinkage"),
            *("session.use_device_allocator_for_initializers", "do_copy_in_default_stream"),
            *("cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy"),
        )
    ),
}


def check_repository(folder: Path) -> list[str]:
    """Find the problems of a model repository: one line for each, or an empty list.

    Each set of configurations is checked by itself: first config.pbtxt of all models, then each name under `configs`.
    As in Triton, a model without a configuration of that name uses its config.pbtxt.

    Raises:
        InputError: `folder` holds no model.
        MissingDependencyError: onnx or tritonclient, which contains the protobuf, is not installed.
    """
    for module, extra in (("tritonclient", "triton"), ("google.protobuf", "triton"), ("onnx", "export")):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, extra)
    models = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not any((model / "config.pbtxt").is_file() for model in models):
        raise InputError(
            f"{folder} is no model repository: no folder in it has a config.pbtxt.",
            advice="Write one with: gte-export triton MODEL",
        )
    variants = sorted({path.stem for model in models for path in (model / "configs").glob("*.pbtxt")})
    problems: list[str] = []
    for variant in (None, *variants):
        problems += _variant_problems(models, variant)
    return list(dict.fromkeys(problems))


def _variant_problems(models: Sequence[Path], variant: str | None) -> Iterator[str]:
    parsed: dict[str, tuple[str, Path, Any]] = {}
    for model in models:
        file = model / "configs" / f"{variant}.pbtxt"
        file = file if variant is not None and file.is_file() else model / "config.pbtxt"
        where = f"{model.name}/{file.relative_to(model).as_posix()}"
        if not file.is_file():
            yield f"{where} is missing"
            continue
        try:
            config = _parse(file)
        except (_parse_error(), UnicodeDecodeError) as error:
            yield f"{where}: {error}"
            continue
        parsed[model.name] = where, model, config
    for where, model, config in parsed.values():
        found = [*_general(model, config, variant), *_tensors(config), *_scheduling(config)]
        found += [*_by_backend(model, config), *_warmup(model, config)]
        if config.platform == "ensemble":
            found += _ensemble(config, {name: item[2] for name, item in parsed.items()})
        yield from (f"{where}: {problem}" for problem in found)


def _parse(file: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2  # created at import, so type checkers cannot see it

    messages: Any = model_config_pb2
    return text_format.Parse(file.read_text(encoding="utf-8"), messages.ModelConfig())


def _parse_error() -> type[Exception]:
    from google.protobuf import text_format

    return text_format.ParseError


def _kind(config: Any) -> str:
    return config.platform if config.platform == "ensemble" else config.backend


def _general(model: Path, config: Any, variant: str | None) -> Iterator[str]:
    if config.name != model.name:
        yield f"the name {config.name!r} is not that of the folder"
    if not (versions := _versions(model)):
        yield "there is no version folder, such as 1"
    kind = _kind(config)
    if kind not in _PARAMETERS:
        yield f"backend is {config.backend!r}, platform {config.platform!r}; expected one of {', '.join(_PARAMETERS)}"
        return
    if unknown := sorted(set(config.parameters) - _PARAMETERS[kind]):
        yield f"{kind} reads no parameter {', '.join(unknown)}"
    if kind == "ensemble":
        return
    name = config.default_model_filename or _FILES[kind]
    yield from (f"{version.name}/{name} is missing" for version in versions if not (version / name).is_file())
    for group in config.instance_group:
        if group.count < 1:
            yield f"instance_group has a count of {group.count}; at least one instance is needed"
        if variant == "cpu" and group.kind != group.KIND_CPU:
            yield f"instance_group is {group.Kind.Name(group.kind)}, which a machine without a GPU refuses"


def _versions(model: Path) -> list[Path]:
    return [path for path in model.iterdir() if path.is_dir() and path.name.isdigit() and int(path.name) > 0]


def _tensors(config: Any) -> Iterator[str]:
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}"
    for kind, tensors in (("input", config.input), ("output", config.output)):
        names = [tensor.name for tensor in tensors]
        if not names:
            yield f"there is no {kind}"
        if len(set(names)) < len(names):
            yield f"two {kind}s have one name: {', '.join(names)}"
        for tensor in tensors:
            if not tensor.dims or any(size == 0 or size < -1 for size in tensor.dims):
                yield f"{kind} {tensor.name} has the dims {list(tensor.dims)}; sizes are positive, or -1 for any"
            if _type_name(tensor) == "TYPE_INVALID":
                yield f"{kind} {tensor.name} has no data_type"
    if config.backend == "onnxruntime" and any(tensor.allow_ragged_batch for tensor in config.input):
        yield "allow_ragged_batch needs a graph with inputs of one dimension, which no encoder has"


def _scheduling(config: Any) -> Iterator[str]:
    if config.platform == "ensemble":
        for name in ("dynamic_batching", "instance_group", "model_warmup", "optimization"):
            if any(field.name == name for field, _ in config.ListFields()):
                yield f"an ensemble has no {name}; its models have"
        return
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if not 1 <= size <= max(1, config.max_batch_size):
            yield f"preferred_batch_size {size} is outside 1 to {config.max_batch_size}, the max_batch_size"


def _by_backend(model: Path, config: Any) -> Iterator[str]:
    for version in _versions(model):
        if config.backend == "onnxruntime":
            yield from _onnx(version / (config.default_model_filename or _FILES["onnxruntime"]), config)
        elif config.backend == "python":
            yield from _python(version / _FILES["python"])
    for tensor in config.output:
        if tensor.label_filename:
            yield from _labels(model / tensor.label_filename, tensor)
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "tensorrt":
            yield (
                "accelerator tensorrt builds an FP32 engine without fused attention; serve a plan with gte-export "
                "--format triton --engine BUNDLE"
            )


def _python(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # reported already
    except (SyntaxError, UnicodeDecodeError) as error:
        yield f"{file.name} is not Python: {error}"
        return
    if not any(isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel" for node in tree.body):
        yield f"{file.name} has no class TritonPythonModel"


def _onnx(file: Path, config: Any) -> Iterator[str]:
    from gte_deploy.exporters.triton.graph import tensor_specs

    if not file.is_file():
        return  # reported already
    try:
        missing = [name for name in inspect_onnx(file).external_files if not (file.parent / name).is_file()]
        inputs, outputs = tensor_specs(file)
    except (BundleError, ValueError) as error:
        yield f"{file.name} is no graph: {error}"
        return
    yield from (f"{file.name} reads its weights from {name}, which is missing" for name in sorted(missing))
    batch = [-1] if config.max_batch_size else []
    for kind, wanted, specs in (("input", config.input, inputs), ("output", config.output, outputs)):
        graph = {spec.name: spec for spec in specs}
        for tensor in wanted:
            if (spec := graph.get(tensor.name)) is None:
                yield f"{kind} {tensor.name} is not in {file.name}, which has {', '.join(graph)}"
                continue
            if _NUMPY_TYPES.get(_type_name(tensor)) != spec.dtype:
                yield f"{kind} {tensor.name} is {_type_name(tensor)}, but {spec.dtype} in {file.name}"
            shape = [size if isinstance(size, int) else -1 for size in spec.shape]
            if not _fits([*batch, *tensor.dims], shape):
                yield f"{kind} {tensor.name} has the shape {[*batch, *tensor.dims]}, but {shape} in {file.name}"
        if kind == "input" and (unfed := sorted(set(graph) - {tensor.name for tensor in wanted})):
            yield f"{file.name} needs {', '.join(unfed)}, which is no input here"


def _fits(one: Iterable[int], other: Iterable[int]) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _labels(file: Path, tensor: Any) -> Iterator[str]:
    if not file.is_file():
        yield f"output {tensor.name} takes its labels from {file.name}, which is missing"
        return
    count = len(file.read_text(encoding="utf-8").splitlines())
    if count != tensor.dims[-1]:
        yield f"output {tensor.name} has {tensor.dims[-1]} values, and {file.name} {count} labels"


def _warmup(model: Path, config: Any) -> Iterator[str]:
    inputs = {tensor.name: tensor for tensor in config.input}
    for sample in config.model_warmup:
        where = f"model_warmup {sample.name}"
        if sample.batch_size > config.max_batch_size:
            yield f"{where} has {sample.batch_size} rows, above the max_batch_size {config.max_batch_size}"
        if missing := sorted(name for name in inputs if name not in sample.inputs and not inputs[name].optional):
            yield f"{where} leaves {', '.join(missing)} out"
        for name, value in sample.inputs.items():
            if name not in inputs:
                yield f"{where} has {name}, which is no input"
                continue
            if value.data_type != inputs[name].data_type or not _fits(value.dims, inputs[name].dims):
                yield f"{where}: {name} is {_type_name(value)} {list(value.dims)}, not what the input is"
            if value.WhichOneof("input_data_type") == "input_data_file":
                file = model / "warmup" / value.input_data_file
                yield from (f"{where}: {problem}" for problem in _data_file(file, value))


def _data_file(file: Path, value: Any) -> Iterator[str]:
    if not file.is_file():
        yield f"warmup/{file.name} is missing"
    elif (dtype := _NUMPY_TYPES.get(_type_name(value))) is not None:
        size = math.prod(value.dims) * np.dtype(dtype).itemsize
        if file.stat().st_size != size:
            yield f"warmup/{file.name} has {file.stat().st_size} bytes, and its shape {size}"


def _ensemble(config: Any, models: dict[str, Any]) -> Iterator[str]:
    """Follow the tensors through the steps: each must have one source, matching types and shapes, and no gap."""
    batched = config.max_batch_size > 0
    produced = {tensor.name: (tensor, batched) for tensor in config.input}
    used: set[str] = set()
    steps = [(step, models.get(step.model_name)) for step in config.ensemble_scheduling.step]
    for step, model in steps:
        if model is None:
            yield f"step {step.model_name} is no model of this repository, or its configuration is broken"
            continue
        if batched and config.max_batch_size > model.max_batch_size > 0:
            yield f"max_batch_size {config.max_batch_size} is above that of {step.model_name}, {model.max_batch_size}"
        outputs = {tensor.name: tensor for tensor in model.output}
        for key, name in step.output_map.items():
            if key not in outputs:
                yield f"step {step.model_name} has no output {key}"
            elif name in produced:
                yield f"{name} is an output of two steps"
            else:
                produced[name] = outputs[key], model.max_batch_size > 0
    for step, model in steps:
        if model is None:
            continue
        inputs = {tensor.name: tensor for tensor in model.input}
        if missing := sorted(n for n, tensor in inputs.items() if not tensor.optional and n not in step.input_map):
            yield f"step {step.model_name} is not given {', '.join(missing)}"
        for key, name in step.input_map.items():
            used.add(name)
            if key not in inputs:
                yield f"step {step.model_name} has no input {key}"
            elif name not in produced:
                yield f"step {step.model_name} takes {name}, which no step gives"
            else:
                taken = inputs[key], model.max_batch_size > 0
                yield from _joint(f"{name} as {step.model_name}'s {key}", produced[name], taken)
    for tensor in config.output:
        if tensor.name not in produced:
            yield f"output {tensor.name} comes from no step"
        else:
            yield from _joint(f"output {tensor.name}", produced[tensor.name], (tensor, batched))
    if unused := sorted({tensor.name for tensor in config.input} - used):
        yield f"input {', '.join(unused)} is used by no step"


def _joint(where: str, maker: tuple[Any, bool], taker: tuple[Any, bool]) -> Iterator[str]:
    """Compare two tensors. Each comes with a flag: whether its model has a batch axis that `dims` leaves out."""
    produced, taken = maker[0], taker[0]
    if produced.data_type != taken.data_type:
        yield f"{where}: {_type_name(produced)} is given, but {_type_name(taken)} is expected"
    shape, wanted = ([*([-1] if batched else []), *tensor.dims] for tensor, batched in (maker, taker))
    if not _fits(shape, wanted):
        yield f"{where}: {shape} is given, but {wanted} is expected"
    if getattr(produced, "optional", False) and not getattr(taken, "optional", True):
        yield f"{where}: an optional tensor feeds a required input"


def _type_name(tensor: Any) -> str:
    from tritonclient.grpc import model_config_pb2

    messages: Any = model_config_pb2
    return messages.DataType.Name(tensor.data_type)
