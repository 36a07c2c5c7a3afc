"""Makes the parts of a graph: smaller graphs over the same weights that compute some of its outputs.

* "answer" computes only the answer of the task, for tasks that read few tokens: the first token of each text (CLS
  pooling, classifiers) or the masked tokens (fill-mask). Its last layer computes only these rows, see `asked_rows`.
* "embedding" computes only the sentence embedding of a hybrid model with CLS pooling. Its last layer computes only the
  first token of each text.
* "hidden" computes only the hidden states, for heads that work on the whole vocabulary for every token.

A part has the same inputs as the whole graph, and its outputs have the same values.
"""

from collections.abc import Collection

from onnx_ir.passes import common as ir_passes

from gte_deploy.backends.checks import has_costly_head
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.asked_rows import ask_for_rows, selects_rows
from gte_deploy.exporters.graph.build import Graph, graph_of
from gte_deploy.tasks.base import EMBEDDING, HIDDEN


def parts_of(graph: Graph, spec: ModelSpec) -> dict[str, Graph]:
    """Return name -> part, for the parts that the model has; `graph` stays unchanged.

    Args:
        graph: the finished graph of any target and precision.
        spec: the facts about the model.

    Raises:
        ExportError: the head of the graph does not select its rows in a known way.
    """
    parts = {}
    # Only the graph shows whether a classifier reads the first token, or the mean of all.
    if reads_few_rows(spec) and (spec.task != "classify" or selects_rows(graph.model)):
        parts["answer"] = _part(graph, [output.name for output in graph.outputs if output.name != HIDDEN])
    if spec.task == "hybrid" and spec.pooling == "cls":
        parts["embedding"] = _part(graph, [EMBEDDING])
    if has_costly_head(spec):
        parts["hidden"] = _part(graph, [HIDDEN])
    return parts


def reads_few_rows(spec: ModelSpec) -> bool:
    """Whether the answer of the task depends on few rows of the last layer.

    A classifier of a family that lets it pool all tokens may need every row; see `Family.classifier_pooling`.
    """
    match spec.task:
        case "embed":
            return spec.pooling == "cls"
        case "fill-mask":
            return spec.logits == "masked"
        case task:
            return task == "classify"


def _part(graph: Graph, outputs: Collection[str]) -> Graph:
    model = graph.model.clone()
    for value in [value for value in model.graph.outputs if value.name not in outputs]:
        model.graph.outputs.remove(value)
    ir_passes.RemoveUnusedNodesPass()(model)
    if HIDDEN not in outputs:
        ask_for_rows(model)
    return graph_of(model, graph.fusions, graph.opset)
