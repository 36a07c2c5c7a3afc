"""The graph for ONNX Runtime's CUDA provider: few and wide kernels, half precision, attention without L x L scores.

From the trace: RoPE as one operator, one GEMM for queries, keys and values and one for up and gate, the gated unit on
its two halves, residual sums and LayerNormalization apart (ONNX Runtime's fused kernel of the two may sum in FP16).
Attention is one of

* padding-free (`padding="remove"`): RemovePadding, PackedMultiHeadAttention with cumulated lengths, RestorePadding. No
  kernel sees a padding token. For FP16 and FP32; ONNX Runtime has no such kernels for BF16. Masks must be padding on
  the right.
* padded (`padding="keep"`): MultiHeadAttention with the mask folded into the dot product, so that the flash kernel,
  which wants no mask, takes it.

Both reach flash attention in FP16 (padded also in BF16) from compute capability 8.0 on, and memory-efficient attention
below it.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from gte_deploy.backends.onnx_backend import OnnxBackend
from gte_deploy.exporters.cuda_options import removes_padding
from gte_deploy.exporters.cuda_stand_in import cpu_stand_in
from gte_deploy.exporters.fusion import PACKED_PASSES, fuse_graph
from gte_deploy.exporters.fusion.flash import FLASH
from gte_deploy.exporters.fusion.padding import remove_padding
from gte_deploy.exporters.graph import DEFAULT_OPSET, Graph, graph_of, save_graph
from gte_deploy.exporters.half import HALVES, lower_to_half
from gte_deploy.exporters.trace import trace
from gte_deploy.spec import ModelSpec, SparseSpec

_NOT_ON_CUDA = (
    "ONNX Runtime's CUDA kernels were not run: onnxruntime-gpu or a GPU is missing here. What was compared is the "
    "graph's stand-in on the CPU: the same operators, half precision as float32 that is rounded behind each of them. "
    "An export on a machine with both compares the CUDA run."
)


def build_cuda_graph(
    model: PreTrainedModel,
    *,
    task: str,
    max_length: int,
    precision: str,
    padding: str = "auto",
    pooling: str | None = None,
    logits: str = "masked",
    opset: int = DEFAULT_OPSET,
    token_types: bool = False,
    sparse: SparseSpec | None = None,
) -> Graph:
    """Trace `model` and fuse it for CUDA.

    Args:
        model: of the task's class, float32; its weights are rounded when the graph is written.
        task: one of gte_deploy.spec.TASKS.
        max_length: longest sequence that the graph takes.
        precision: "fp16", "bf16" or "fp32", of weights and activations; inputs stay int64 and outputs float32.
        padding: "remove", "keep", or "auto" to remove it in fp16; see above.
        pooling: "mean" or "cls", for embed.
        logits: "masked" or "all", for fill-mask.
        opset: version of the standard operators.
        token_types: whether the graph takes `token_type_ids`; without, every token has type 0.
        sparse: how to pool, for sparse.

    Raises:
        InputError: precision and padding do not go together.
        ExportError: an argument that the model cannot honour, or a fusion pass that did not fire as it must.
    """
    removes = removes_padding(precision, padding)
    graph = trace(
        model,
        task=task,
        max_length=max_length,
        pooling=pooling,
        logits=logits,
        opset=opset,
        token_types=token_types,
        sparse=sparse,
    )
    layers = model.config.num_hidden_layers
    fusions = fuse_graph(graph, num_layers=layers, passes=PACKED_PASSES if removes else (*PACKED_PASSES, FLASH))
    if removes:
        fusions["packed_attention"] = remove_padding(graph)
    if precision in HALVES:
        fusions["half_weights"] = lower_to_half(graph, HALVES[precision])
    return graph_of(graph, fusions, opset)


@contextlib.contextmanager
def opened_for_proof(graph: Graph, file: Path, spec: ModelSpec) -> Iterator[tuple[OnnxBackend, list[str]]]:
    """What is compared with PyTorch: `file` on CUDA where that can run, else its stand-in on the CPU.

    The second part says what is not proven then, one sentence each.
    """
    if has_cuda():
        with contextlib.closing(OnnxBackend(file, spec, device="cuda")) as backend:
            yield backend, []
        return
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "model.onnx"
        save_graph(cpu_stand_in(graph), stand_in)
        with contextlib.closing(OnnxBackend(stand_in, spec)) as backend:
            yield backend, [_NOT_ON_CUDA]


def has_cuda() -> bool:
    """Whether ONNX Runtime has its CUDA provider and there is a GPU for it."""
    import onnxruntime
    import torch

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
