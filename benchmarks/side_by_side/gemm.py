"""What this machine's cores can multiply at most: the measure of every contestant's share of peak."""

from __future__ import annotations

import time
from collections.abc import Callable

SIZE = 2048
METHOD = (
    f"best of 7 products of two {SIZE} × {SIZE} matrices, a multiply-add counted as two: torch.mm in fp32 and bf16; "
    "int8 the faster of torch._int_mm and ONNX Runtime's MatMulInteger (uint8 × int8)"
)
_REPEATS = 7


class Gemm:
    """Operations per second of the fastest GEMM of each precision."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._threads = threads

    def peaks(self) -> dict[str, float]:
        """Precision, as the contestants' -> operations per second."""
        import torch

        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
        p, q = (torch.randint(-127, 127, (SIZE, SIZE), generator=generator, dtype=torch.int8) for _ in range(2))
        half = a.bfloat16(), b.bfloat16()
        return {
            "fp32": _best(lambda: torch.mm(a, b)),
            "16-bit": _best(lambda: torch.mm(*half)),
            "int8": max(_best(lambda: torch._int_mm(p, q)), _best(self._matmul_integer())),
        }

    def _matmul_integer(self) -> Callable[[], object]:
        import numpy as np
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        rng = np.random.default_rng(0)
        weights = numpy_helper.from_array(rng.integers(-127, 127, (SIZE, SIZE), dtype=np.int8), "b")
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
            "gemm",
            [helper.make_tensor_value_info("a", TensorProto.UINT8, (SIZE, SIZE))],
            [helper.make_tensor_value_info("c", TensorProto.INT32, (SIZE, SIZE))],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"a": rng.integers(0, 255, (SIZE, SIZE), dtype=np.uint8)}
        return lambda: session.run(None, feed)


def _best(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds)
