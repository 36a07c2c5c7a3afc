"""The targets of an export by name. A new target needs one module here and one line in `TARGETS`."""

import importlib
from collections.abc import Iterator, Mapping

from gte_deploy.core.options import check_choice
from gte_deploy.exporters.targets.base import Target

TARGETS: Mapping[str, str] = {
    "cpu": "cpu:CpuTarget",
    "cuda": "cuda.target:CudaTarget",
    "openvino": "openvino:OpenVinoTarget",
    "executorch": "executorch:ExecuTorchTarget",
    "tensorrt": "tensorrt.target:TensorRTTarget",
}
"""Name -> module and class, which are imported on demand."""


def target_class(name: str) -> type[Target]:
    """The class of the target with this name.

    Raises:
        InputError: no target has this name.
    """
    check_choice("target", name, tuple(TARGETS))
    module, _, kind = TARGETS[name].partition(":")
    found: type[Target] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    return found


def target_classes() -> Iterator[type[Target]]:
    """The classes of all targets, in the order of `TARGETS`."""
    return map(target_class, TARGETS)
