"""The graph for ONNX Runtime's CUDA provider: few and wide kernels, half precision, attention without L x L scores.

From the trace: RoPE as one operator, one GEMM for queries, keys and values and one for up and gate, the gated unit on
its two halves, residual sums and LayerNormalization apart (ONNX Runtime's fused kernel of the two may sum in FP16).
Attention is one of

* padding-free (`removes_padding`): RemovePadding, PackedMultiHeadAttention with cumulated lengths, RestorePadding. No
  kernel sees a padding token. For FP16 and FP32; ONNX Runtime has no such kernels for BF16. Masks must be padding on
  the right.
* padded: MultiHeadAttention with the mask folded into the dot product, so that the flash kernel,
  which wants no mask, takes it.

Both reach flash attention in FP16 (padded also in BF16) from compute capability 8.0 on, and memory-efficient attention
below it.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph, graph_of, save_graph
from gte_deploy.exporters.graph.fusion import MERGED_PASSES, fuse_graph
from gte_deploy.exporters.graph.fusion.flash import FLASH
from gte_deploy.exporters.graph.fusion.padding import remove_padding
from gte_deploy.exporters.graph.half import HALVES, lower_to_half
from gte_deploy.exporters.verification.emulation import cpu_emulation

_NOT_ON_CUDA = (
    "ONNX Runtime's CUDA kernels were not run: onnxruntime-gpu or a GPU is missing here. What was compared is the "
    "graph's emulation on the CPU: the same operators, half precision as float32 that is rounded behind each of them. "
    "An export on a machine with both compares the CUDA run."
)


def cuda_graph(plain: Graph, *, sites: Mapping[str, int], precision: str, removes_padding: bool) -> Graph:
    """Fuse a copy of the graph of standard operators for CUDA.

    Args:
        plain: with explicit attention, see `gte_deploy.exporters.graph.build.build_graphs`.
        sites: how often each fusion pass must fire.
        precision: "fp16", "bf16" or "fp32", of weights and activations; inputs stay int64 and outputs float32.
        removes_padding: see above.

    Raises:
        ExportError: a fusion pass did not fire as it must.
    """
    model = plain.model.clone()
    passes = MERGED_PASSES if removes_padding else (*MERGED_PASSES, FLASH)
    fusions = fuse_graph(model, sites=sites, passes=passes)
    if removes_padding:
        fusions["packed_attention"] = remove_padding(model)
    if precision in HALVES:
        fusions["half_weights"] = lower_to_half(model, HALVES[precision])
    return graph_of(model, fusions, plain.opset)


@contextlib.contextmanager
def opened_for_comparison(graph: Graph, file: Path, spec: ModelSpec) -> Iterator[tuple[OnnxBackend, list[str]]]:
    """Open what is compared with PyTorch: `file` on CUDA where that can run, else its emulation on the CPU.

    The second part says what is not verified then, one sentence each.
    """
    if has_cuda():
        with contextlib.closing(OnnxBackend(file, spec, device="cuda")) as backend:
            yield backend, []
        return
    with tempfile.TemporaryDirectory() as folder:
        emulation = Path(folder) / "model.onnx"
        save_graph(cpu_emulation(graph), emulation)
        with contextlib.closing(OnnxBackend(emulation, spec)) as backend:
            yield backend, [_NOT_ON_CUDA]


def has_cuda() -> bool:
    """Whether ONNX Runtime has its CUDA provider and there is a GPU for it."""
    import onnxruntime
    import torch

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
