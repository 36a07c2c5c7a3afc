"""The kernels of a computation on a GPU, from its operators on fake tensors: FLOPs and bytes, and a time for each.

`training_roofline.py` uses it and says what the model is.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gte_deploy.models import attention

BACKWARD_ATTENTION = 2.5  # five products in place of two, as FlashAttention's papers count

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Machine:
    """An H100 SXM. Each constant has its source; none was measured here.

    peak_flops: dense bfloat16 [NVIDIA's data sheet].
    gemm_flops: what large bfloat16 products reach. About 720 TFLOP/s in shapes of language models [SemiAnalysis,
        "MI300X vs H100 vs H200 Benchmark", 2024], 794 in the best shape [Bekman, "Machine Learning Engineering"]. The
        products here are smaller (768 or 1,024 features): 650 is assumed.
    bandwidth: bytes/s of the memory. The data sheet has 3.35e12; copies reach 84 to 91 % of it [reports of H100 SXM and
        NVL]: 84 % is taken.
    kernel_seconds: shortest time of a kernel, assumed.
    fp32_flops: float32 without tensor cores [data sheet].
    link: bytes/s to other GPUs in one direction: 450e9 over NVLink [data sheet], of which 80 % are assumed.
    flash: TFLOP/s of attention by version and direction at 512, 1,024, 2,048, 4,096 and 8,192 tokens, with 64 features
        a head, without causal mask [FlashAttention-3, arXiv 2407.08608, figures 5 and 6].
    """

    name: str = "H100 SXM"
    peak_flops: float = 989e12
    gemm_flops: float = 650e12
    bandwidth: float = 2.8e12
    kernel_seconds: float = 3e-6
    fp32_flops: float = 67e12
    link: float = 0.8 * 450e9
    flash: dict[tuple[str, str], tuple[float, ...]] = field(
        default_factory=lambda: {
            ("FA2", "forward"): (282, 306, 318, 321, 322),
            ("FA2", "backward"): (198, 238, 264, 279, 287),
            ("FA3", "forward"): (333, 392, 460, 476, 496),
            ("FA3", "backward"): (272, 363, 422, 453, 472),
        }
    )

    def attention_flops(self, version: str, direction: str, length: int) -> float:
        """FLOP/s of attention over sequences of `length` tokens, between the points of the table."""
        rates = self.flash[version, direction]
        place = min(max(math.log2(length / 512), 0), len(rates) - 1)
        below = min(int(place), len(rates) - 2)
        return 1e12 * (rates[below] + (place - below) * (rates[below + 1] - rates[below]))

    def seconds(self, kernel: Kernel, *, flash: str) -> float:
        """The time of one kernel."""
        rate = self.fp32_flops if kernel.wide else self.gemm_flops
        if kernel.kind == "attention":
            rate = self.attention_flops(flash, kernel.direction, kernel.length)
        return max(kernel.flops / rate, kernel.bytes / self.bandwidth, self.kernel_seconds)


@dataclass(frozen=True)
class Kernel:
    """One kernel. `kind` is "gemm", "attention" or "elementwise"; `wide` is a product in float32."""

    name: str
    kind: str
    flops: float
    bytes: float
    wide: bool = False
    direction: str = ""
    length: int = 0


# --- kernels of eager operators -------------------------------------------------------------------------------------


def touched(tensor: Tensor) -> float:
    """Bytes of the distinct elements of a tensor; an expanded one has fewer than its shape says."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return float(math.prod(sizes) * tensor.element_size()) if tensor.numel() else 0.0


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


_FREE = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "lift_fresh", "device", "promote_types", "split", "split_with_sizes", "chunk", "unbind", "scalar_tensor",
    "_local_scalar_dense", "sym_size", "resize_",
}  # fmt: skip
_GATHERS = {"embedding", "index_select", "gather", "index"}
_ATTENTION = {"_varlen_attn": "forward", "_varlen_attn_backward": "backward"}


def kernel_of(func: Any, args: Any, kwargs: Any, out: Any) -> Kernel | None:
    """Return the kernel of an operator, or None for a view or an allocation."""
    name = func._schema.name.partition("::")[2]
    returned = func._schema.returns[0].alias_info if func._schema.returns else None
    if name in _FREE or (returned is not None and not returned.is_write):
        return None
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
    if not outputs and not inputs:
        return None
    if name in _ATTENTION:
        return _attention_kernel(_ATTENTION[name], inputs, outputs, keys=_longest(args))
    moved = sum(touched(x) for x in _distinct(inputs)) + sum(touched(x) for x in outputs)
    if func.overloadpacket in flop_registry:
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return Kernel(name, "gemm", float(flops), moved, wide=inputs[-1].dtype == torch.float32)
    return Kernel(name, "elementwise", 0.0, _moved(name, args, inputs, outputs, moved))


def _distinct(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Arguments without repetitions: x * x reads x once."""
    return list({id(x): x for x in inputs}.values())


def _moved(name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor], moved: float) -> float:
    """Bytes of an operator that is no product. `moved`: of all arguments and results."""
    result = sum(touched(x) for x in outputs)
    if name in {"zero_", "fill_", "bernoulli_", "full", "zeros", "ones", "zeros_like", "ones_like", "new_zeros"}:
        return result
    if name == "copy_":
        return touched(inputs[1]) + result
    if name in _GATHERS:  # reads the chosen elements, not the table
        return 2 * result + sum(touched(x) for x in inputs[1:])
    if name in {"slice_backward", "select_backward"}:  # fills with zeros, then copies
        return result + 2 * touched(inputs[0])
    if name in {"embedding_dense_backward", "index_add"}:  # zeros or a copy; then adds row by row
        source = inputs[0] if name == "embedding_dense_backward" else inputs[2]
        start = 0.0 if name == "embedding_dense_backward" else touched(inputs[0])
        return start + result + 3 * touched(source) + touched(inputs[1])
    if name == "scatter_":  # writes at the chosen places
        return sum(touched(x) for x in inputs[1:]) + touched(inputs[1]) / inputs[1].element_size() * (
            outputs[0].element_size()
        )
    if name == "_fused_adamw_":
        parameters, gradients, first, second = (sum(map(touched, tensors_in(each))) for each in args[:4])
        return 2 * (parameters + first + second) + gradients
    return moved


def _longest(args: Any) -> int:
    """The keys of each query: the schema of both operators ends its lengths with max_k."""
    return next(b for a, b in zip(args, args[1:], strict=False) if type(a) is int and type(b) is int)


def _attention_kernel(direction: str, inputs: list[Tensor], outputs: list[Tensor], *, keys: int) -> Kernel:
    """`inputs` begin with the query (forward), or with the gradient of the output (backward), `[Q, heads, D]`."""
    factor = 1.0 if direction == "forward" else BACKWARD_ATTENTION
    flops = factor * 4.0 * inputs[0].numel() * keys
    moved = sum(touched(x) for x in _distinct(inputs)) + sum(touched(x) for x in outputs)
    return Kernel("flash", "attention", flops, moved, direction=direction, length=keys)


class KernelCounter(TorchDispatchMode):
    """Records the kernels of what runs inside. `paused` records nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._paused = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._paused and (kernel := kernel_of(func, args, kwargs, out)):
            self.kernels.append(kernel)
        return out


class AsOnCuda(TorchFunctionMode):
    """Lets fake tensors of the CPU choose the operators of CUDA, which this machine's torch may not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            rate = kwargs["p"]
            return torch.native_dropout(args[0], rate, True)[0] if kwargs["training"] and rate else args[0]
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):  # in CUDA's list of float32 operators
            return func(args[0].float(), *args[1:], **kwargs)
        if func is Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_fake_gpu() -> Iterator[None]:
    """Tensors made inside are fake, and packed attention takes the flash kernel."""
    kept = attention._has_varlen_kernel
    attention._has_varlen_kernel = lambda *_, **__: True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        attention._has_varlen_kernel = kept


# --- kernels of compiled graphs -------------------------------------------------------------------------------------

_ANCHORS = {"mm", "addmm", "bmm", "_varlen_attn", "_varlen_attn_backward"}
_SCATTERS = {"index_put", "index_add", "scatter", "scatter_add", "embedding_dense_backward"}
_CONSTANTS = {"full", "full_like", "iota", "inductor_seed", "inductor_seeds", "inductor_lookup_seed", "scalar_tensor"}
_VIEWS = {
    "view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "alias", "as_strided",
    "split", "split_with_sizes", "_unsafe_view", "reshape", "unbind",
}  # fmt: skip


def _operator(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    return node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]


def _is_view(node: fx.Node) -> bool:
    """A view, or one of several results; neither is a kernel."""
    return _operator(node) in _VIEWS or (_operator(node) == "getitem" and _operator(node.args[0]) in _VIEWS)  # type: ignore[arg-type]


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _value_bytes(node: fx.Node) -> float:
    return sum(touched(x) for x in tensors_in(node.meta.get("val")))


def _sums_tokens(node: fx.Node) -> bool:
    """A sum over the tokens, which gives one number for each feature."""
    if _operator(node) != "sum":
        return False
    source = node.all_input_nodes[0].meta["val"]
    dims = node.args[1] if len(node.args) > 1 else range(source.dim())
    return source.dim() - 1 not in {d % source.dim() for d in dims} and source.numel() > node.meta["val"].numel()  # type: ignore[union-attr]


def graph_kernels(graph: fx.Graph) -> list[Kernel]:
    """Return the kernels of a compiled graph by the rule at the top of this file."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and not _is_view(node)]
    fused = {
        node for node in nodes if _operator(node) not in _ANCHORS | _SCATTERS | _CONSTANTS and not _part_of_anchor(node)
    }
    kernels = [_anchor_kernel(node) for node in nodes if _operator(node) in _ANCHORS | _SCATTERS]
    return kernels + [_fused_kernel(group) for group in _groups(graph, nodes, fused)]


def _part_of_anchor(node: fx.Node) -> bool:
    return _operator(node) == "getitem" and _operator(node.args[0]) in _ANCHORS  # type: ignore[arg-type]


def _groups(graph: fx.Graph, nodes: list[fx.Node], fused: set[fx.Node]) -> list[set[fx.Node]]:
    """Connected fused nodes of one level. The level is the largest number of products on a path to the node."""
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = [level[x] + (_operator(x) in _ANCHORS | _SCATTERS) for x in node.all_input_nodes]
        level[node] = max(before, default=0)
    for node in reversed(
        nodes
    ):  # as late as possible: what the backward pass computes again is computed where it is used
        if node in fused and (users := _users(node)) and all(user.op != "output" for user in users):
            level[node] = min(level[user] for user in users)
    group = {node: {node} for node in fused}
    for node in nodes:
        if node not in fused:
            continue
        for source in map(_root, node.all_input_nodes):
            apart = _sums_tokens(node) and not all(_sums_tokens(user) for user in _users(source))
            if source in fused and level[source] == level[node] and not apart and group[source] is not group[node]:
                merged = group[source] | group[node]
                for member in merged:
                    group[member] = merged
    return list({id(members): members for members in group.values()}.values())


def _users(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's memory, also through views."""
    found = []
    for user in node.users:
        found += _users(user) if _is_view(user) else [user]
    return found


def _anchor_kernel(node: fx.Node) -> Kernel:
    name = _operator(node)
    inputs = [tensor for source in node.all_input_nodes for tensor in tensors_in(source.meta["val"])]
    outputs = tensors_in(node.meta["val"])
    moved = sum(touched(x) for x in _distinct(inputs)) + sum(touched(x) for x in outputs)
    if name in _ATTENTION:
        return _attention_kernel(_ATTENTION[name], inputs, outputs, keys=_longest(node.args))
    if name in _SCATTERS:
        return Kernel(name, "elementwise", 0.0, moved)
    left, right = inputs[-2:]
    flops = 2.0 * left.shape[-2] * left.shape[-1] * outputs[0].numel() / outputs[0].shape[-2]
    return Kernel(name, "gemm", flops, moved, wide=right.dtype == torch.float32)


def _fused_kernel(group: set[fx.Node]) -> Kernel:
    read: dict[fx.Node, float] = {}
    written = 0.0
    for node in group:
        for argument in node.all_input_nodes:
            source = _root(argument)
            if source in group or _operator(source) in _CONSTANTS:
                continue
            size = (
                _value_bytes(node)
                if _operator(node) in _GATHERS and argument is node.args[0]
                else (_value_bytes(argument))
            )
            read[source] = min(read.get(source, 0.0) + size, max(_value_bytes(source), size))
        if _operator(node) != "getitem" and any(_operator(user) == "getitem" for user in node.users):
            continue  # its results are counted one by one
        if any(user not in group for user in _users(node)):
            written += _value_bytes(node)
    return Kernel("fused", "elementwise", 0.0, sum(read.values()) + written)


# --- functions and their backward passes -----------------------------------------------------------------------------


def eager_kernels(function: Function, inputs: Sequence[Tensor]) -> list[Kernel]:
    """Kernels of a function and of its backward pass for all inputs that have gradients."""
    with KernelCounter() as counter, AsOnCuda():
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        with counter.paused():
            gradient = torch.zeros_like(out)
        torch.autograd.grad(out, wanted, gradient, allow_unused=True)
    return counter.kernels


def compiled_kernels(function: Function, inputs: Sequence[Tensor]) -> list[Kernel]:
    """As `eager_kernels`, of the function compiled."""

    def whole(*values: Tensor) -> tuple[Tensor]:
        with AsOnCuda(), torch.autocast("cpu", torch.bfloat16):
            return (function(*values),)

    joint: Any = aot_export_joint_simple(whole, tuple(inputs), trace_joint=True, decompositions=select_decomp_table())
    with V.set_fake_mode(detect_fake_mode(inputs)):
        joint_graph_passes(joint)
    forward, backward = min_cut_rematerialization_partition(joint, (None,), num_fwd_outputs=1, compiler="inductor")
    return graph_kernels(forward.graph) + graph_kernels(backward.graph)


def kernels_of(
    trace: Callable[[Function, Sequence[Tensor]], list[Kernel]],
    module: nn.Module,
    function: Function,
    inputs: Sequence[Tensor],
) -> tuple[Kernel, ...]:
    """Kernels of a function that computes with a module's parameters, which become inputs of it."""
    names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def pure(*values: Tensor) -> Tensor:
        given, weights = values[: len(inputs)], values[len(inputs) :]
        with nn.utils.stateless._reparametrize_module(module, dict(zip(names, weights, strict=True))):
            return function(*given)

    return tuple(trace(pure, (*inputs, *parameters)))
