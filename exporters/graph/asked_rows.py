"""Lets the last layer compute only the rows that the head asks for: first tokens, or masked tokens.

The head selects rows of the hidden states. This selection moves up through operators that treat every row alone (linear
layers, sums, LayerNorms, activations, quantization with constant scales) until an operator mixes rows. Attention is
such an operator, but only in its keys and values: first tokens pass it on the side of the queries, through the rotation
too. Masked tokens stop at the output of attention, because several may be in one text. An operator that is not known
stops the selection as well, so the result never depends on this list of operators.

Below the place where the selection stops, the graph looks like a batch of R texts with one token each, so most nodes
stay as they are. The engines differ only in how a tensor holds tokens, see `_Layout`.

Shapes: B texts, S tokens of a padded text, T tokens without padding, R rows that are asked for, W width.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    array,
    clean_up,
    constant,
    integers,
    operand,
    read_values,
    replace,
    same_constant,
    scope_of,
)
from gte_deploy.exporters.graph.fusion import forget_shapes
from gte_deploy.exporters.graph.fusion.rows import from_rows

_MASK_POSITIONS, _QUERY_LENGTHS = "mask_positions", "query_lengths"

# Operators that compute each element alone.
_ELEMENTWISE = frozenset(
    ("Add", "Cast", "Div", "Erf", "Gelu", "Identity", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh")
)
# Operators whose first input has the rows; the others are the same for all rows.
_LINEAR = frozenset(("Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits"))
_QUANTIZATION = frozenset(("DequantizeLinear", "QuantizeLinear"))
# Operators that compute along some axes.
_ON_AXIS = frozenset(("Concat", "LayerNormalization", "Slice", "Softmax", "Split"))


@dataclass(frozen=True)
class _Layout:
    """How a tensor holds tokens.

    Args:
        kind: "padded", [B, S, W] and other tensors whose first axis is the text; "rows", all tokens of padded texts,
            [B*S, W]; "packed", the tokens of all texts without padding, [T, W].
        axis: the axis of the tokens, counted from the end.
        offsets: for "packed" inside a padded graph, the input of RestorePadding that says where tokens belong.
    """

    kind: Literal["padded", "rows", "packed"] = "padded"
    axis: int = -2
    offsets: ir.Value | None = None


@dataclass(frozen=True)
class _Head:
    """The node that selects rows of the hidden states.

    Args:
        node: the node; its first input has the hidden states.
        positions: the positions of masked tokens or, in a packed graph, of the rows; None for the first token of padded
            texts.
        layout: the layout of the hidden states.
    """

    node: ir.Node
    positions: ir.Value | None
    layout: _Layout

    @property
    def takes_first(self) -> bool:
        """Whether the head reads the first token of padded texts, so that R rows are B texts."""
        return self.positions is None


def ask_for_rows(model: ir.Model) -> None:
    """Rewrite a graph in place that computes nothing but the output of a head.

    Raises:
        ExportError: the graph does not have exactly one node that selects rows in a known way.
    """
    ir_passes.ShapeInferencePass()(model)  # the axes of some operators count from the front
    graph = model.graph
    heads = [head for node in graph if (head := _head(node)) is not None]
    if len(heads) != 1:
        raise ExportError(
            f"{len(heads)} nodes select the first or the masked tokens for {graph.outputs[0].name}, instead of one. "
            "The traced graph differs from the one that is known; check the versions of transformers and torch."
        )
    _Selection(graph, heads[0], _computed(graph)).move_up()
    clean_up(model)
    forget_shapes(graph)


def selects_rows(model: ir.Model) -> bool:
    """Whether the head of a graph reads single rows, in a way that `ask_for_rows` knows; the graph stays unchanged."""
    copy = model.clone()
    ir_passes.ShapeInferencePass()(copy)
    return any(_head(node) is not None for node in copy.graph)


def _head(node: ir.Node) -> _Head | None:
    if node.op_type not in ("Gather", "GatherND"):
        return None
    indices, axis = operand(node, 1), node.attributes.get_int("axis", 0)
    if indices.is_graph_input() and indices.name == _MASK_POSITIONS:
        return _Head(node, indices, _Layout() if node.op_type == "GatherND" else _Layout("packed"))
    if indices.is_initializer():
        takes_first = axis == 1 and _rank(node.inputs[0]) == 3 and same_constant(indices, [0])
        return _Head(node, None, _Layout()) if takes_first else None
    starts = indices.producer()
    is_packed = starts is not None and starts.op_type == "Slice" and operand(starts, 0).name == _QUERY_LENGTHS
    return _Head(node, indices, _Layout("packed")) if is_packed else None


def _computed(graph: ir.Graph) -> set[ir.Value]:
    found: set[ir.Value] = set(graph.inputs)
    for node in graph:
        if not found.isdisjoint(read_values(node)):
            found.update(node.outputs)
    return found


@dataclass
class _Selection:
    """The selection of a head, on its way up.

    Args:
        graph: the graph.
        head: the head.
        computed: the values that depend on inputs of the graph.
        asked: value -> its layout, for the values of which R rows are asked for.
        whole: the values of which all rows are needed.
        picked: the rows of values at which the selection stops.
    """

    graph: ir.Graph
    head: _Head
    computed: set[ir.Value]
    asked: dict[ir.Value, _Layout] = field(default_factory=dict)
    whole: set[ir.Value] = field(default_factory=set)
    picked: dict[tuple[ir.Value, _Layout], ir.Value] = field(default_factory=dict)

    def move_up(self) -> None:
        """Rewrite the graph."""
        self.whole.update(self.graph.outputs)
        reduced = {node: inputs for node in reversed(self.graph) if (inputs := self._visit(node))}
        for node, inputs in reduced.items():
            for index, layout in inputs.items():
                value = operand(node, index)
                if value.producer() not in reduced:
                    node.replace_input_with(index, self._pick(node, value, layout))
            if node is not self.head.node:
                self._fit(node)
        self._drop_head()

    def _visit(self, node: ir.Node) -> dict[int, _Layout]:
        """Ask for rows of the inputs of a node, and for all the other inputs. Return the former: input -> layout."""
        inputs: dict[int, _Layout] = {}
        layouts = {self.asked.get(value) for value in node.outputs}
        if node is self.head.node:
            inputs = {0: self.head.layout}
        elif len(layouts) == 1 and self.whole.isdisjoint(node.outputs) and (layout := layouts.pop()) is not None:
            inputs = self._inputs(node, layout)
        for index, value in enumerate(node.inputs):
            if value is not None and (
                index not in inputs or self.asked.setdefault(value, inputs[index]) != inputs[index]
            ):
                self.whole.add(value)
        self.whole.update(value for value in read_values(node) if value not in node.inputs)
        return inputs

    def _inputs(self, node: ir.Node, layout: _Layout) -> dict[int, _Layout]:
        """The inputs of which rows are enough for rows of the outputs; none if the node is not known to allow it."""
        inputs = {
            i: layout for i, value in enumerate(node.inputs) if value in self.computed and _has_rows(value, layout)
        }
        others = [value for value in node.inputs[1:] if value in self.computed]
        is_first, is_linear = self.head.takes_first, not node.attributes.get_int("transA", 0)
        match node.op_type:
            case kind if kind in _ELEMENTWISE:
                is_alone = is_first or len(inputs) == sum(value in self.computed for value in node.inputs)
                return inputs if is_alone else {}
            case kind if kind in _QUANTIZATION and not others:
                return {0: layout}
            case kind if kind in _LINEAR and is_linear and all(map(_is_scalar, others)):
                return {0: layout}
            case kind if kind in _ON_AXIS and (axes := _axes(node)):
                may_be_texts = kind == "Slice" and is_first and layout.axis not in axes
                return inputs if may_be_texts or min(axes) > layout.axis else {}
            case "Reshape":
                return _before_reshape(node, layout)
            case "RestorePadding" if layout == _Layout():
                return {0: _Layout("packed", offsets=operand(node, 1))}
        return _before_attention(node, layout) if is_first and layout.kind == "padded" else {}

    def _pick(self, user: ir.Node, value: ir.Value, layout: _Layout) -> ir.Value:
        """The rows that are asked for, of a value whose rows are all computed."""
        if (value, layout) not in self.picked:
            self.picked[value, layout] = self._picked(Builder(self.graph, user, "asked_rows"), value, layout)
        return self.picked[value, layout]

    def _picked(self, build: Builder, value: ir.Value, layout: _Layout) -> ir.Value:
        source, dtype = value.producer(), value.dtype or ir.DataType.FLOAT
        if source is not None and source.op_type in _QUANTIZATION and self.computed.isdisjoint(source.inputs[1:]):
            # An engine wants the quantization right before the product.
            rows = self._pick(build.anchor, operand(source, 0), layout)
            attributes = {name: attribute.value for name, attribute in source.attributes.items()}
            return build.op(source.op_type, rows, *source.inputs[1:], dtype=dtype, **attributes)
        positions = self.head.positions
        if layout.kind == "packed" and layout.offsets is None:
            return build.op("Gather", value, positions, axis=0, dtype=dtype)
        padded = value
        if layout.kind == "packed":
            padded = build.op("RestorePadding", value, layout.offsets, domain=CONTRIB, dtype=dtype)
        elif layout.kind == "rows":
            value.shape = value.shape or ir.Shape((None, None))
            padded = from_rows(build, value)
            padded.dtype = dtype
        if layout.kind == "padded" and positions is None:
            start, end, axis = (integers(self.graph, n) for n in (0, 1, layout.axis))
            return build.op("Slice", padded, start, end, axis, dtype=dtype)
        if positions is None:
            return build.op(
                "Gather", padded, constant(self.graph, "int64_scalar_0", np.array(0, np.int64)), axis=1, dtype=dtype
            )
        rows = build.op("GatherND", padded, positions, dtype=dtype)
        return build.op("Unsqueeze", rows, integers(self.graph, 1), dtype=dtype) if layout.kind == "padded" else rows

    def _fit(self, node: ir.Node) -> None:
        """Replace a node that makes padded texts [B, S, W] by one that makes R texts of one token, [R, 1, W]."""
        makes_texts = node.op_type == "Reshape" and not operand(node, 1).is_initializer()
        if makes_texts or node.op_type == "RestorePadding":
            build, dtype = Builder(self.graph, node, scope_of(node)), node.outputs[0].dtype or ir.DataType.FLOAT
            replace(node.outputs[0], build.op("Unsqueeze", operand(node, 0), integers(self.graph, 1), dtype=dtype))

    def _drop_head(self) -> None:
        """Remove the selection from its old place; only the first of one token remains there."""
        node, layout = self.head.node, self.head.layout
        hidden, build = operand(node, 0), Builder(self.graph, node, scope_of(node))
        dtype = hidden.dtype or ir.DataType.FLOAT
        if layout.kind == "packed":
            replace(node.outputs[0], build.op("Identity", hidden, dtype=dtype))
        elif not self.head.takes_first:
            replace(node.outputs[0], build.op("Squeeze", hidden, integers(self.graph, 1), dtype=dtype))


def _before_reshape(node: ir.Node, layout: _Layout) -> dict[int, _Layout]:
    target, rank = operand(node, 1), _rank(node.inputs[0])
    if rank is None:
        return {}
    if not target.is_initializer():
        makes_texts = layout == _Layout() and rank == 2 and _is_size_of_texts(target)
        return {0: _Layout("rows")} if makes_texts else {}
    sizes = array(target).tolist()
    splits_or_joins = layout == _Layout(axis=1 - len(sizes)) and sizes[:2] == [0, 0] and 0 not in sizes[2:]
    makes_rows = layout.kind == "rows" and len(sizes) == 2 and sizes[0] == -1 and rank > 2
    return {0: _Layout(axis=1 - rank)} if splits_or_joins or makes_rows else {}


def _is_size_of_texts(target: ir.Value) -> bool:
    """Whether the target of a Reshape is [batch, sequence, -1], from the shape of an input."""
    concat = target.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        return False
    shape = operand(concat, 0).producer()
    is_input = shape is not None and shape.op_type == "Shape" and operand(shape, 0).is_graph_input()
    return is_input and operand(concat, 1).is_initializer() and same_constant(concat.inputs[1], [-1])


def _before_attention(node: ir.Node, layout: _Layout) -> dict[int, _Layout]:
    """Follow the queries of padded texts; every text keeps its keys and values."""
    rank, given = _rank(node.inputs[0]), [i for i, value in enumerate(node.inputs) if value is not None]
    match node.op_type:
        case "Transpose" if rank is not None:
            return {0: _Layout(axis=node.attributes.get_ints("perm", ())[layout.axis] - rank)}
        case "MatMul" if layout.axis == -2:
            return {0: layout}
        case "MultiHeadAttention" if (
            rank == 3 and given == [0, 1, 2] and not node.attributes.get_int("unidirectional", 0)
        ):
            return {0: layout}
        case "RotaryEmbedding" if rank == 3 and _rank(node.inputs[1]) == 2:
            return {0: layout, 1: _Layout(axis=-1)}
    return {}


def _axes(node: ir.Node) -> list[int]:
    """The axes along which a node computes, counted from the end; none if they are not known."""
    rank = _rank(node.outputs[0])
    if node.op_type != "Slice":
        axes = [node.attributes.get_int("axis", 0 if node.op_type == "Split" else -1)]
    elif len(node.inputs) > 3 and operand(node, 3).is_initializer():
        axes = array(node.inputs[3]).tolist()
    else:
        return []
    return [] if rank is None else [axis if axis < 0 else axis - rank for axis in axes]


def _rank(value: ir.Value | None) -> int | None:
    """The number of axes; ONNX Runtime's own operators in the layers keep that of their first input."""
    while value is not None and value.shape is None:
        source = value.producer()
        value = None if source is None else source.inputs[0]
    return None if value is None or value.shape is None else len(value.shape)


def _is_scalar(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 0


def _has_rows(value: ir.Value | None, layout: _Layout) -> bool:
    """Whether a value may differ between tokens; one with a single token is the same for all."""
    if value is None or value.shape is None:
        return value is not None
    return len(value.shape) >= -layout.axis and value.shape[layout.axis] != 1
