"""The parts of a fusion pass: functions that match a site of a graph, build its replacement, and count the matches.

A pass looks at every node of one operator type, its anchors. It either rewrites the site around an anchor or raises
`Mismatch` with the reason. The new value replaces the old one; nodes without uses are removed after the pass.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

CONTRIB = "com.microsoft"

# "layers.0" in the names of GTE, "layer.0" in those of BERT.
_LAYER = re.compile(r"\blayers?\.\d")


class Mismatch(Exception):
    """The graph around an anchor is not the pattern; str() is the reason."""


@dataclass(frozen=True)
class FusionPass:
    """A named rewrite: `rewrite(graph, anchor)` for every node whose operator is `anchor`, or one of several.

    Args:
        name: the name in reports and in the sites of a family.
        anchor: the operator type that every site has exactly once; for several, every site has one of them.
        rewrite: rewrites one site, or raises Mismatch.
    """

    name: str
    anchor: str | tuple[str, ...]
    rewrite: Callable[[ir.Graph, ir.Node], None]

    @property
    def anchors(self) -> tuple[str, ...]:
        """The operator types of anchors."""
        return (self.anchor,) if isinstance(self.anchor, str) else self.anchor

    def __call__(self, model: ir.Model) -> tuple[int, list[str]]:
        """Rewrite every site in place; return their number, and the reason for each anchor that did not match."""
        fired, reasons = 0, []
        for node in [node for node in model.graph if node.op_type in self.anchors]:
            try:
                self.rewrite(model.graph, node)
                fired += 1
            except Mismatch as mismatch:
                reasons.append(f"{node.name}: {mismatch}")
        ir_passes.RemoveUnusedNodesPass()(model)
        ir_passes.NameFixPass()(model)
        return fired, reasons


def producer(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node that computes `value`; Mismatch unless its operator is `op_type`."""
    node = None if value is None else value.producer()
    if node is None:
        raise Mismatch(f"{_quoted(value)} is not made by a node, but {op_type} was expected")
    if node.op_type != op_type:
        raise Mismatch(f"{_quoted(value)} is made by {node.op_type}, not {op_type}")
    return node


def consumer(value: ir.Value, op_type: str) -> ir.Node:
    """The only node that uses `value`; Mismatch unless its operator is `op_type`."""
    users = [use.node for use in value.uses()]
    if [user.op_type for user in users] != [op_type] or value.is_graph_output():
        kinds = ", ".join(user.op_type for user in users) or "nothing"
        raise Mismatch(f"{_quoted(value)} is used by {kinds}, not by one {op_type} alone")
    return users[0]


def operand(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of a node; Mismatch if it is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Mismatch(f"{node.name} has no input {index}")
    return value


def other_operand(node: ir.Node, one: ir.Value) -> ir.Value:
    """The operand of a binary node that is not `one`."""
    first, second = operand(node, 0), operand(node, 1)
    require(one is first or one is second, f"{node.name} does not use {one.name!r}")
    return second if one is first else first


def read_values(node: ir.Node) -> list[ir.Value]:
    """All values that a node reads: its inputs, and what graphs in its attributes (the body of a Scan) read outside."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            own = {*body.inputs, *(value for each in body for value in each.outputs)}
            found += [value for each in body for value in read_values(each) if value not in own]
    return found


def by_name(values: Iterable[ir.Value], name: str) -> ir.Value:
    """The value called `name` among the inputs or the outputs of a graph; it must exist."""
    return next(value for value in values if value.name == name)


def dimensions(value: ir.Value) -> tuple[int | str | None, ...]:
    """The shape of a value, with names for dynamic axes; Mismatch if it is not known."""
    if value.shape is None:
        raise Mismatch(f"the shape of {value.name!r} is not known")
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def split_operands(node: ir.Node, op_type: str) -> tuple[ir.Node, ir.Value]:
    """Of a commutative node's two inputs, find one that an `op_type` computes; return that node and the other input."""
    first, second = operand(node, 0), operand(node, 1)
    for value, other in ((first, second), (second, first)):
        source = value.producer()
        if source is not None and source.op_type == op_type:
            return source, other
    raise Mismatch(f"no operand of {node.name} is made by {op_type}")


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of an initialiser; Mismatch if `value` is not one."""
    if value is None or value.const_value is None or not value.is_initializer():
        raise Mismatch(f"{_quoted(value)} is not a constant")
    return value.const_value


def array(value: ir.Value | None) -> np.ndarray:
    """The contents of an initialiser."""
    return tensor_of(value).numpy()


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initialiser to the graph."""
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
    )
    graph.register_initializer(value)
    return value


def require(condition: bool, reason: str) -> None:
    """Raise Mismatch(reason) unless `condition`."""
    if not condition:
        raise Mismatch(reason)


def same_constant(value: ir.Value | None, expected: Sequence[int]) -> bool:
    """Whether `value` is a constant that holds exactly these integers."""
    contents = array(value)
    return contents.size == len(expected) and contents.ravel().tolist() == list(expected)


def constant(graph: ir.Graph, name: str, contents: np.ndarray) -> ir.Value:
    """The initialiser `name`, added at its first use and shared by all later ones."""
    return graph.initializers.get(name) or initializer(graph, name, ir.tensor(contents))


def integers(graph: ir.Graph, *numbers: int) -> ir.Value:
    """A shared int64 vector, such as the target of a Reshape."""
    return constant(graph, "int64_" + "_".join(map(str, numbers)).replace("-", "m"), np.array(numbers, np.int64))


def clean_up(model: ir.Model) -> None:
    """Remove unused nodes, merge equal ones, and sort and name the rest, after a rewriting of the graph in place."""
    for clean in (
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.TopologicalSortPass(),
        ir_passes.NameFixPass(),
    ):
        clean(model)


@dataclass
class Builder:
    """Inserts new nodes before `anchor`; their names begin with `scope` and a slash."""

    graph: ir.Graph
    anchor: ir.Node
    scope: str

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str | None = None,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | Sequence[int | str | None] | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Insert one node and return its outputs."""
        title = f"{self.scope}/{name or op_type}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=title)
        for i, value in enumerate(node.outputs):
            value.name = title if outputs == 1 else f"{title}_{i}"
            value.dtype = dtype
        if shape is not None:
            node.outputs[0].shape = ir.Shape(shape)
        self.graph.insert_before(self.anchor, node)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return list(node.outputs)

    def inside(self, scope: str) -> "Builder":
        """A builder at the same place, for nodes of the module `scope`."""
        return Builder(self.graph, self.anchor, scope)

    def op(self, op_type: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
        """Insert one node with one output, and return the output."""
        return self.node(op_type, inputs, **options)[0]


def scope_of(node: ir.Node) -> str:
    """The module that a node belongs to: "layers.0.mlp/Gelu" -> "layers.0.mlp"."""
    return (node.name or "").rpartition("/")[0]


def is_in_layer(name: str) -> bool:
    """Whether a node or a weight belongs to a layer of the encoder, not to the embeddings or the head."""
    return _LAYER.search(name) is not None


def replace(old: ir.Value, new: ir.Value) -> None:
    """Replace all uses of `old` by `new`. If `old` is an output of the graph, `new` also gets its name and type."""
    if old.shape is not None and new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        new.name, old.name = old.name, None
        new.type = old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _quoted(value: ir.Value | None) -> str:
    return "an absent input" if value is None else f"{value.name!r}"
