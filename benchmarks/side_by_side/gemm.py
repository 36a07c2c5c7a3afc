"""Measures the peak matrix-multiply speed of this machine's cores, the base of every contestant's share of peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from side_by_side.machine import kernel_of

SIZE = 2048
_REPEATS = 7


def method(size: int) -> str:
    """Describe the method of `Gemm` for the report."""
    return (
        f"best of {_REPEATS} products of two {size} × {size} matrices, a multiply-add counted as two: torch.mm in fp32 "
        "and, with kernels for it, bf16; int8 ONNX Runtime's MatMulInteger (uint8 × int8) or, if faster, torch._int_mm"
    )


class Gemm:
    """Measures the operations per second of the fastest GEMM of each precision."""

    def __init__(self, threads: int, size: int, offered: Sequence[str]) -> None:
        """Keep the settings; `offered` are the CPU's kernels, see `machine.kernels`."""
        import torch

        torch.set_num_threads(threads)
        self._threads, self._size = threads, size
        # Without these kernels, torch takes many seconds for a product in bf16 or int8.
        self._has_bf16 = kernel_of("16-bit", offered) is not None
        self._has_int8 = kernel_of("int8", offered) in ("VNNI", "AMX-INT8", "i8mm")

    def peaks(self) -> dict[str, float]:
        """Return precision, as in `Contestant` -> operations per second; without bf16 if the CPU has no kernels."""
        import torch

        generator, shape = torch.Generator().manual_seed(0), (self._size, self._size)
        a, b = (torch.randn(shape, generator=generator) for _ in range(2))
        p, q = (torch.randint(-127, 127, shape, generator=generator, dtype=torch.int8) for _ in range(2))
        half = a.bfloat16(), b.bfloat16()
        seconds = {"fp32": _best(lambda: torch.mm(a, b)), "int8": _best(self._matmul_integer())}
        if self._has_bf16:
            seconds["16-bit"] = _best(lambda: torch.mm(*half))
        if self._has_int8:
            seconds["int8"] = min(seconds["int8"], _best(lambda: torch._int_mm(p, q)))
        return {precision: 2 * self._size**3 / least for precision, least in seconds.items()}

    def _matmul_integer(self) -> Callable[[], object]:
        import numpy as np
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        rng, shape = np.random.default_rng(0), (self._size, self._size)
        weights = numpy_helper.from_array(rng.integers(-127, 127, shape, dtype=np.int8), "b")
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
            "gemm",
            [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("c", TensorProto.INT32, shape)],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"a": rng.integers(0, 255, shape, dtype=np.uint8)}
        return lambda: session.run(None, feed)


def _best(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
