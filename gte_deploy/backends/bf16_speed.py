"""Measures how fast OpenVINO computes in bfloat16 on this CPU, compared with float32.

The flags of a CPU say only that it has instructions for bfloat16: a Xeon with AVX512-BF16 and without AMX multiplies
bfloat16 at 0.6 times the speed of float32 (docs/decisions/default-engine.md). So two small products are timed, once for
each CPU and version of OpenVINO; the result is kept in the user's cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import cpu_flags
from gte_deploy.core.files import cache_folder, write_text
from gte_deploy.core.own_cache import own_cache_folder, read_own
from gte_deploy.core.spec import ComputePrecision

_FOLDER = "bf16-speed"
_MAX_BYTES = 1 << 16
_ROUNDS = 10
# Seconds after which no further round begins, for CPUs that need more than some 10 ms for a product.
_ENOUGH = 0.08


@dataclass(frozen=True)
class Bf16Speed:
    """How many times as fast as float32 this CPU computes in bfloat16.

    Args:
        layers: the product of a linear layer, of tokens and a constant matrix.
        attention: the products and the softmax of attention, which an INT8 graph leaves in floating point.
    """

    layers: float
    attention: float


def bf16_speed(*, measure: bool = True) -> Bf16Speed | None:
    """The speed on this CPU, from the cache or measured now, in a fifth of a second.

    Args:
        measure: whether to measure if the cache has no result. Without, OpenVINO is not imported.

    Returns:
        The speed; None if this CPU does not compute in bfloat16, or if nothing was measured yet.

    Raises:
        MissingDependencyError: openvino is not installed, and `measure` is set.
    """
    return _measured() if measure and may_have_bf16() else _recorded()


def may_have_bf16() -> bool:
    """Whether the CPU's flags name bfloat16. If the system tells no flags, OpenVINO must decide."""
    flags = cpu_flags()
    return not flags or any("bf16" in flag for flag in flags)


@functools.cache
def _measured() -> Bf16Speed | None:
    from gte_deploy.backends.openvino import has_native_bf16

    recorded = _recorded()
    if recorded is not None or not has_native_bf16():
        return recorded
    speed = Bf16Speed(
        layers=_ratio((128, 768), (768, 768), is_attention=False),
        attention=_ratio((1, 12, 128, 64), (1, 12, 128, 64), is_attention=True),
    )
    with contextlib.suppress(OSError):  # without a writable cache, every process measures
        own_cache_folder(_FOLDER)
        write_text(_file(), json.dumps({"key": _key(), "speed": dataclasses.asdict(speed)}, indent=2) + "\n")
    return speed


def _recorded() -> Bf16Speed | None:
    """The result in the cache for this CPU and OpenVINO; None if there is none, or another user can have written it."""
    try:
        own_cache_folder(_FOLDER, create=False)
        content = json.loads(read_own(_file(), max_bytes=_MAX_BYTES))
        if content["key"] != _key():
            return None
        return Bf16Speed(**{name: float(value) for name, value in content["speed"].items()})
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _ratio(x: tuple[int, ...], y: tuple[int, ...], *, is_attention: bool) -> float:
    """Time a product in both precisions in turn. The best of several times is the least disturbed one."""
    precisions: tuple[ComputePrecision, ...] = ("fp32", "bf16")
    products: dict[ComputePrecision, Product] = {
        precision: Product(x, y, precision, is_attention=is_attention) for precision in precisions
    }
    best: dict[ComputePrecision, float] = dict.fromkeys(precisions, float("inf"))
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        for precision, product in products.items():
            best[precision] = min(best[precision], product.seconds())
        if time.perf_counter() - started > _ENOUGH:
            break
    return best["fp32"] / best["bf16"]


class Product:
    """A product that OpenVINO has compiled, of inputs of shape `x` and `y`: x·y, or attention(x, y, y)."""

    def __init__(
        self, x: tuple[int, ...], y: tuple[int, ...], precision: ComputePrecision, *, is_attention: bool
    ) -> None:
        from gte_deploy.backends.openvino import compile_on_cpu, without_onednn_cache
        from gte_deploy.core.quiet import import_openvino

        openvino = import_openvino()
        ops = openvino.opset13
        rng = np.random.default_rng(0)
        left, right = (rng.standard_normal(shape, np.float32) for shape in (x, y))
        self._inputs: list[NDArray[np.float32]] = [left, right, right] if is_attention else [left]
        parameters = [ops.parameter(list(values.shape), np.float32) for values in self._inputs]
        if is_attention:
            query, key, value = parameters
            weights = ops.softmax(ops.matmul(query, key, False, True), len(y) - 1)
            result = ops.matmul(weights, value, False, False)
        else:
            result = ops.matmul(*parameters, ops.constant(right), False, False)
        model = openvino.Model([result], parameters)
        with without_onednn_cache():
            # One thread: the ratio is that of a core, and other processes disturb it less.
            self._request: Any = compile_on_cpu(model, precision, num_threads=1).create_infer_request()
            self.seconds()  # the first run compiles kernels

    def seconds(self) -> float:
        """Run once; return the time."""
        started = time.perf_counter()
        self._request.infer(self._inputs, share_inputs=True, share_outputs=True)
        return time.perf_counter() - started


def _key() -> Mapping[str, Any]:
    # Two machines with one name of their CPU may offer different instructions.
    flags = [flag for flag in cpu_flags() if "bf16" in flag or "amx" in flag]
    return {"cpu": cpu_model(), "flags": flags, "openvino": engine_versions().get("openvino")}


def _file() -> Path:
    digest = hashlib.sha256(json.dumps(_key(), sort_keys=True).encode()).hexdigest()
    return cache_folder() / _FOLDER / f"{digest[:32]}.json"
