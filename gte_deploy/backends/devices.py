"""Device names: "cpu", "cuda", "cuda:0"."""

import re
from typing import Literal

from gte_deploy.core.errors import InputError

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


def parse_device(device: str) -> tuple[Literal["cpu", "cuda"], int]:
    """The kind and the index of a device; "cuda" means "cuda:0".

    Raises:
        InputError: another name.
    """
    match = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if match is None:
        raise InputError(f"device must be 'cpu', 'cuda' or 'cuda:N', not {device!r}")
    return ("cpu", 0) if device == "cpu" else ("cuda", int(match[1] or 0))
