"""The kernel of packed attention on a GPU: torch's own FlashAttention-2, or FlashAttention-3 on Hopper.

torch has no FlashAttention-3 in it. It takes that of the package flash-attn-3, which has the module
`flash_attn_interface`, once it is activated; `torch.nn.attention.varlen` then calls it. (torch 2.13 never takes cuDNN's
kernel there, which it has switched off.)
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention as torch_attention

from gte_deploy.core.errors import ConfigError

logger = logging.getLogger(__name__)

_FA3 = "FA3"  # torch's name of it
_MODULE = "flash_attn_interface"


@contextmanager
def flash_attention(choice: str, device: torch.device) -> Iterator[None]:
    """Compute attention with the chosen kernel, and tell on a GPU which one it is.

    Args:
        choice: "FA3", "default" for torch's own kernel, or "auto" for FlashAttention-3 where it can run.
        device: the device of this process. On a CPU there is no such kernel.

    Raises:
        ConfigError: "FA3" cannot run here; the message says why.
    """
    missing = why_not_flash_attention_3(device) if choice != "default" else "flash_attention is 'default'"
    if missing is None:
        missing = _activate()
    if choice == _FA3 and missing is not None:
        raise ConfigError(f"flash_attention is 'FA3', but {missing}; set it to auto or default")
    if device.type == "cuda":
        logger.info("attention: %s", "FlashAttention-3" if missing is None else f"FlashAttention-2, because {missing}")
    try:
        yield
    finally:
        if missing is None:
            _registry().restore_flash_attention_impl()


def why_not_flash_attention_3(device: torch.device) -> str | None:
    """Return why FlashAttention-3 cannot run on a device, or None if nothing is missing."""
    if device.type != "cuda":
        return f"the device is {device.type!r}, not a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:  # as torch checks, too
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, and FlashAttention-3 needs 9.0 (Hopper)"
        )
    if _FA3 not in getattr(_registry(), "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot activate it"
    if importlib.util.find_spec(_MODULE) is None:
        return f"the module {_MODULE} is not installed (package flash-attn-3)"
    return None


def _activate() -> str | None:
    """Activate FlashAttention-3; return why that failed, or None."""
    try:
        _registry().activate_flash_attention_impl(_FA3)
    except (ImportError, OSError, RuntimeError) as error:  # a package that was built for another torch or CUDA
        return f"{_MODULE} cannot be loaded ({error})"
    return None


def _registry() -> Any:
    """The module with torch's functions, which older versions do not have."""
    return torch_attention
