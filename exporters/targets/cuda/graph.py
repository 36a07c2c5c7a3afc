"""Builds the graph for ONNX Runtime's CUDA provider: few, wide kernels in half precision, and fused attention.

Fused attention never stores the L x L scores. The trace is rewritten to: RoPE as one operator; one GEMM for queries,
keys and values, and one for up and gate; the gated unit on its two halves; residual sums and LayerNormalization as two
operators (the fused kernel of ONNX Runtime may sum in FP16). Attention has one of two forms:

* padding-free (`removes_padding`): RemovePadding, PackedMultiHeadAttention with cumulative lengths, RestorePadding. No
  kernel sees a padding token. It is for FP16 and FP32; ONNX Runtime has no such kernels for BF16. Padding must be on
  the right.
* padded: MultiHeadAttention with the mask folded into the dot product, because the flash kernel accepts no mask.

Both forms use flash attention in FP16 (the padded form also in BF16) from compute capability 8.0 on, and
memory-efficient attention below.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph, graph_of, save_graphs
from gte_deploy.exporters.graph.fusion import MERGED_PASSES, fuse_graph
from gte_deploy.exporters.graph.fusion.flash import FLASH
from gte_deploy.exporters.graph.fusion.padding import remove_padding
from gte_deploy.exporters.graph.half import HALVES, lower_to_half
from gte_deploy.exporters.job import by_outputs
from gte_deploy.exporters.targets.base import PADDING_FREE_PASS
from gte_deploy.exporters.verification.emulation import cpu_emulation

_NOT_ON_CUDA = (
    "ONNX Runtime's CUDA kernels were not run: onnxruntime-gpu or a GPU is missing here. The comparison ran an "
    "emulation of the graph on the CPU: the same operators in float32, rounded to half precision after each of them. "
    "An export on a machine with both compares the CUDA run."
)


def cuda_graph(plain: Graph, *, sites: Mapping[str, int], precision: str, removes_padding: bool) -> Graph:
    """Fuse a copy of the graph of standard operators for CUDA.

    Args:
        plain: the graph with explicit attention, see `gte_deploy.exporters.graph.build.build_graphs`.
        sites: how often each fusion pass must fire.
        precision: the precision of weights and activations, "fp16", "bf16" or "fp32"; inputs stay int64 and outputs
            float32.
        removes_padding: whether attention is padding-free.

    Raises:
        ExportError: a fusion pass did not match as often as it must.
    """
    model = plain.model.clone()
    passes = MERGED_PASSES if removes_padding else (*MERGED_PASSES, FLASH)
    fusions = fuse_graph(model, sites=sites, passes=passes)
    if removes_padding:
        fusions[PADDING_FREE_PASS] = remove_padding(model)
    if precision in HALVES:
        fusions["half_weights"] = lower_to_half(model, HALVES[precision])
    return graph_of(model, fusions, plain.opset)


@contextlib.contextmanager
def opened_for_comparison(graphs: Mapping[Path, Graph], spec: ModelSpec) -> Iterator[tuple[OnnxBackend, list[str]]]:
    """Open a graph and its parts on CUDA to compare them with PyTorch, or emulate them if CUDA cannot run here.

    `graphs` are those in the files, the whole graph and its parts.

    Yields the backend and the caveats: one sentence for each thing that is not verified.
    """
    if has_cuda():
        with contextlib.closing(OnnxBackend(by_outputs(graphs), spec, device="cuda")) as backend:
            yield backend, []
        return
    with tempfile.TemporaryDirectory() as folder:
        emulations = {Path(folder) / file.name: cpu_emulation(graph) for file, graph in graphs.items()}
        save_graphs(emulations, Path(folder) / "weights")
        with contextlib.closing(OnnxBackend(by_outputs(emulations), spec)) as backend:
            yield backend, [_NOT_ON_CUDA]


def has_cuda() -> bool:
    """Whether ONNX Runtime has its CUDA provider and there is a GPU."""
    import onnxruntime
    import torch

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
