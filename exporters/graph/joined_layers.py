"""Takes joined linear layers of a trace apart: one matrix for queries, keys and values, or for up and gate.

    view(x · [W0 W1 W2], [B, S, 3, N, D])[:, :, i]  ->  view(x · Wi, [B, S, N, D])
    split(x · [W0 W1])[i]                           ->  x · Wi

Then every family has the layers of GTE, and one set of fusion passes. On CPUs the splits would copy data, and a wider
matrix product is not faster (docs/decisions/projections-apart-on-cpu.md); the passes for GPUs join the layers again.
The parts of a matrix are views of the model's own, named `matrix.0`, `matrix.1`, …
"""

from collections.abc import Sequence

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    Mismatch,
    array,
    clean_up,
    consumer,
    initializer,
    integers,
    operand,
    replace,
    require,
    same_constant,
)
from gte_deploy.exporters.graph.fusion.linear import LinearMatch, require_linear

_PART_AXIS = (2, -3)  # of [B, S, parts, N, D]


def separate_joined_layers(model: ir.Model) -> int:
    """Take the joined linear layers apart in place; return their number."""
    separated = 0
    for node in list(model.graph):
        try:
            if node.op_type == "Reshape":
                _separate_heads(model.graph, node)
            elif node.op_type == "Split":
                _separate_columns(model.graph, node)
            else:
                continue
            separated += 1
        except Mismatch:
            continue
    if separated:
        clean_up(model)
    return separated


def _separate_heads(graph: ir.Graph, view: ir.Node) -> None:
    """Rewrite a view [B, S, parts, N, D] of a linear layer, of which each part is taken alone."""
    target = array(view.inputs[1]).tolist()
    require(len(target) == 5 and target[:2] == [0, 0] and min(target[2:]) > 0, "it is no view of parts and heads")
    count, heads, size = target[2:]
    linear = require_linear(operand(view, 0))
    taken = [_taken_part(use.node) for use in view.outputs[0].uses()]
    require(sorted(index for index, _ in taken) == list(range(count)), "the parts are not taken one by one")
    parts = _parts(graph, view, linear, [heads * size] * count)
    build = Builder(graph, view, (view.name or "").rpartition("/")[0])
    for index, old in taken:
        shape = (*_leading(view), heads, size)
        replace(old, build.op("Reshape", parts[index], integers(graph, 0, 0, heads, size), shape=shape, allowzero=0))


def _taken_part(part: ir.Node) -> tuple[int, ir.Value]:
    """The number of the part that Slice and Squeeze take, and the result [B, S, N, D]."""
    require(part.op_type == "Slice" and len(part.inputs) == 4, f"{part.name} does not take one part")
    start, end = (int(array(part.inputs[i]).item()) for i in (1, 2))
    require(_is_part_axis(part.inputs[3]) and end == start + 1, f"{part.name} does not take one part")
    squeezed = consumer(part.outputs[0], "Squeeze")
    require(_is_part_axis(squeezed.inputs[1]), f"{squeezed.name} removes another axis")
    return start, squeezed.outputs[0]


def _is_part_axis(axes: ir.Value | None) -> bool:
    return any(same_constant(axes, [axis]) for axis in _PART_AXIS)


def _separate_columns(graph: ir.Graph, split: ir.Node) -> None:
    """Rewrite a Split of the last axis of a linear layer."""
    linear = require_linear(operand(split, 0))
    rank = len(operand(split, 0).shape or ())
    require(split.attributes.get_int("axis", 0) in (-1, rank - 1), f"{split.name} does not split the columns")
    sizes = [output.shape[-1] if output.shape is not None else None for output in split.outputs]
    widths = [size for size in sizes if isinstance(size, int)]
    require(len(widths) == len(sizes) and sum(widths) == linear.out, f"{split.name} has parts of unknown sizes")
    for old, new in zip(split.outputs, _parts(graph, split, linear, widths), strict=True):
        replace(old, new)


def _parts(graph: ir.Graph, anchor: ir.Node, linear: LinearMatch, sizes: Sequence[int]) -> list[ir.Value]:
    """The linear layers of the parts, whose widths are `sizes`; each has the joined layer's input."""
    results, start = [], 0
    leading = (linear.x.shape or ())[:-1]
    for index, size in enumerate(sizes):
        build = Builder(graph, anchor, f"{linear.scope}.{index}")
        columns = slice(start, start + size)
        result = build.op("MatMul", linear.x, _columns(graph, linear.weight, index, columns), shape=(*leading, size))
        if linear.bias is not None:
            result = build.op("Add", result, _columns(graph, linear.bias, index, columns), shape=(*leading, size))
        results.append(result)
        start += size
    return results


def _columns(graph: ir.Graph, whole: ir.Value, index: int, columns: slice) -> ir.Value:
    """Some columns of a weight [in, out] or a bias [out], without a copy: x.weight.T -> x.0.weight.T"""
    module, kind, end = str(whole.name).rpartition(".weight" if ".weight" in str(whole.name) else ".bias")
    return initializer(graph, f"{module}.{index}{kind}{end}", ir.Tensor(array(whole)[..., columns]))


def _leading(view: ir.Node) -> Sequence[int | str | None]:
    shape = view.outputs[0].shape
    assert shape is not None  # the trace gives the shape of every view of a linear layer
    return [size if isinstance(size, int) else size.value for size in shape[:2]]
