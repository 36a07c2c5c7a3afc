"""Makes the graph with the logits of every token out of fill-mask's graph, whose head computes only masked tokens.

Other libraries know fill-mask only in this form: without `mask_positions`, and with logits [batch, sequence,
vocabulary]. The head computes each token by itself, so it gives the same logits on all rows of the hidden states.
"""

import onnx_ir as ir

from gte_deploy.core.errors import ExportError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph, graph_of
from gte_deploy.exporters.graph.editing import Builder, by_name, clean_up, operand, replace, scope_of
from gte_deploy.exporters.graph.fusion import forget_shapes
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows

_MASK_POSITIONS, _LOGITS = "mask_positions", "logits"


def needs_mask_positions(spec: ModelSpec) -> bool:
    """Whether the graphs for a model have the input `mask_positions`, which other libraries do not know."""
    return spec.task == "fill-mask" and spec.logits == "masked"


def all_logits_graph(graph: Graph) -> Graph:
    """Return the graph that gives the logits of every token, over the same weights; `graph` stays unchanged.

    Args:
        graph: the finished graph of fill-mask for ONNX Runtime or OpenVINO, of any precision.

    Raises:
        ExportError: not exactly one GatherND selects the masked tokens.
    """
    model = graph.model.clone()
    positions = by_name(model.graph.inputs, _MASK_POSITIONS)
    users = [use.node for use in positions.uses()]
    if [node.op_type for node in users] != ["GatherND"]:
        raise ExportError(
            f"{', '.join(node.op_type for node in users) or 'no node'} reads the mask positions, instead of one "
            "GatherND. The traced graph differs from the one that is known; check the versions of transformers and "
            "torch."
        )
    (gather,) = users
    hidden = operand(gather, 0)
    replace(gather.outputs[0], to_rows(Builder(model.graph, gather, scope_of(gather)), hidden))
    model.graph.remove(gather, safe=True)
    model.graph.inputs.remove(positions)
    _restore_texts(model.graph)
    clean_up(model)
    forget_shapes(model.graph)
    return graph_of(model, graph.fusions, graph.opset)


def _restore_texts(graph: ir.Graph) -> None:
    """Reshape the logits from rows of tokens, [B*S, V], to texts, [B, S, V]."""
    rows = by_name(graph.outputs, _LOGITS)
    last = rows.producer()
    assert last is not None  # the head computes it
    texts = from_rows(Builder(graph, last, scope_of(last)), rows)  # `clean_up` puts it behind its input
    graph.outputs[graph.outputs.index(rows)] = texts
    texts.name, rows.name = _LOGITS, f"{_LOGITS}/rows"
