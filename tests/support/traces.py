"""Traces that tests share: exports of equal models trace once, and take that graph with their own weights.

torch.onnx.export takes most of the time of a small model's export, and hundreds of tests export one of a few dozen
models. Its graph depends on the module, its settings and its code; the weights are looked up by name. What is kept is
under a digest of all of these, in a folder that pytest-xdist's workers share. A process of its own traces afresh, and
so does a test of the trace itself, with `fresh_traces`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

_LARGEST = 64 << 20
"""Bytes. The weights of a larger model take longer to write and read than its trace."""


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """All tests of a session share what torch.onnx.export makes of equal models."""
    if "torch" not in sys.modules or find_spec("onnx_ir") is None:  # tests without torch do not pay for its import
        yield
        return
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "traces"
    folder.mkdir(exist_ok=True)
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", sharing(torch.onnx.export, folder))
        yield


@contextlib.contextmanager
def fresh_traces() -> Iterator[None]:
    """Trace every model afresh, for what a test says of the trace itself, such as that it is the same again."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", getattr(torch.onnx.export, "afresh", torch.onnx.export))
        yield


def sharing(export: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`torch.onnx.export` that keeps its graphs in `folder`."""

    def shared(module: Any, arguments: tuple[Any, ...], **options: Any) -> Any:
        import onnx_ir as ir

        key = digest(module, arguments, options)
        if key is None:
            return export(module, arguments, **options)
        file = folder / f"{key}.onnx"
        with FileLock(folder / f"{key}.lock"):
            if not file.exists():
                program = export(module, arguments, **options)
                ir.save(program.model.clone(), aside := folder / f"{key}.tmp")
                os.replace(aside, file)
                return program
        return types.SimpleNamespace(model=_with_tensors_of(module, ir.load(file)))

    shared.afresh = export  # type: ignore[attr-defined]
    return shared


def _with_tensors_of(module: Any, model: Any) -> Any:
    """Let the graph refer to the module's tensors without a copy, as a trace does."""
    from onnx_ir.tensor_adapters import TorchTensor

    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, value in model.graph.initializers.items():
        if (tensor := tensors.get(name)) is not None:
            assert tuple(tensor.shape) == value.const_value.shape.numpy()
            value.const_value = TorchTensor(tensor, name=name)
    return model


def digest(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """A digest of all that the graph of a module depends on, or None if it cannot be had.

    That is the module with all its attributes, the code of its classes (a test may replace a method), and of every
    tensor its shape, type and place; not its values, unless it is no parameter or buffer.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > _LARGEST:
        return None
    pickler = _Structure(stream := io.BytesIO(), {id(tensor): i for i, tensor in enumerate(tensors)})
    try:
        pickler.dump((module, arguments, sorted(options.items())))
    except Exception:  # something in it cannot be pickled
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()[:32]


class _Structure(pickle.Pickler):
    """Writes classes and functions as their names and code, and tensors without the values of those that are known."""

    def __init__(self, stream: io.BytesIO, known: dict[int, int]) -> None:
        super().__init__(stream, protocol=5)
        self.known = known

    def persistent_id(self, item: Any) -> Any:
        import torch

        if not isinstance(item, torch.Tensor):
            return None
        about = (self.known.get(id(item)), tuple(item.shape), str(item.dtype), item.requires_grad)
        return about if id(item) in self.known else (*about, item.tolist())

    def reducer_override(self, item: Any) -> Any:
        if (
            isinstance(item, type) and item.__module__ != "builtins"
        ):  # some are in files that a test loads, where pickle does not find them
            own = [kind for kind in item.__mro__ if not kind.__module__.startswith("torch")]
            return (str, (repr([(kind.__module__, kind.__qualname__, _code_of(kind)) for kind in (item, *own)]),))
        if isinstance(item, types.FunctionType):
            return (str, (repr(_code_of_function(item)),))
        return NotImplemented


def _code_of(kind: type) -> list[Any]:
    if kind.__module__.startswith("torch"):
        return []
    functions = {name: getattr(value, "__func__", value) for name, value in vars(kind).items()}
    return [
        (name, _code_of_function(value))
        for name, value in sorted(functions.items())
        if isinstance(value, types.FunctionType)
    ]


def _code_of_function(function: types.FunctionType) -> tuple[Any, ...]:
    return (function.__module__, *_parts_of(function.__code__))


def _parts_of(code: types.CodeType) -> tuple[Any, ...]:
    constants = [
        _parts_of(one)
        if isinstance(one, types.CodeType)
        else repr(sorted(one, key=repr) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    return (code.co_qualname, code.co_firstlineno, code.co_code, code.co_names, constants)
