"""The targets of an export by their names. A new target is one module here and one line in `TARGETS`."""

import importlib
from collections.abc import Iterator, Mapping

from gte_deploy.core.options import check_choice
from gte_deploy.exporters.targets.base import Target

TARGETS: Mapping[str, str] = {
    "cpu": "cpu:CpuTarget",
    "cuda": "cuda.target:CudaTarget",
    "openvino": "openvino:OpenVinoTarget",
    "tensorrt": "tensorrt.target:TensorRTTarget",
}
"""Name -> module and class, imported when they are asked for."""


def target_class(name: str) -> type[Target]:
    """The target of this name.

    Raises:
        InputError: there is none.
    """
    check_choice("target", name, tuple(TARGETS))
    module, _, kind = TARGETS[name].partition(":")
    found: type[Target] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    return found


def target_classes() -> Iterator[type[Target]]:
    """Every target, in the order of `TARGETS`."""
    return map(target_class, TARGETS)
