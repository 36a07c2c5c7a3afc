"""The lists of fusion passes, in the order in which they run. A pass expects the form that the earlier passes leave.

If a pass does not fire as often as the model's family says, that is an error. The graph is never silently slower or
different.
"""

import logging
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.editing import FusionPass, is_in_layer
from gte_deploy.exporters.graph.fusion.alibi_attention import ALIBI_ATTENTION, ALIBI_ATTENTION_ON_CPU
from gte_deploy.exporters.graph.fusion.attention import ATTENTION, ATTENTION_ON_CPU
from gte_deploy.exporters.graph.fusion.glu import GLU
from gte_deploy.exporters.graph.fusion.local_attention import LOCAL_ATTENTION
from gte_deploy.exporters.graph.fusion.qkv import PROJECTIONS, QKV
from gte_deploy.exporters.graph.fusion.rope import ROPE
from gte_deploy.exporters.graph.fusion.rows import join_rows
from gte_deploy.exporters.graph.fusion.skip_layer_norm import SKIP_LAYER_NORM
from gte_deploy.exporters.graph.fusion.up_gate import UP_GATE_ON_ROWS

logger = logging.getLogger(__name__)

MERGED_PASSES: tuple[FusionPass, ...] = (ROPE, ATTENTION, QKV, UP_GATE_ON_ROWS, GLU, SKIP_LAYER_NORM)
"""For GPUs, where kernel launches limit the speed: one GEMM for queries, keys and values, and one for up and gate."""

PASSES: tuple[FusionPass, ...] = (
    ROPE,
    LOCAL_ATTENTION,
    ALIBI_ATTENTION_ON_CPU,
    ATTENTION_ON_CPU,
    PROJECTIONS,
    SKIP_LAYER_NORM,
)
"""For CPUs, which gain nothing from wider GEMMs (docs/decisions/projections-apart-on-cpu.md)."""

STANDARD_PASSES: tuple[FusionPass, ...] = (LOCAL_ATTENTION, ALIBI_ATTENTION)
"""For OpenVINO, which fuses the rest itself: passes whose results are standard operators."""

_MAX_REASONS = 3


def fuse_graph(model: ir.Model, *, sites: Mapping[str, int], passes: Sequence[FusionPass] = PASSES) -> dict[str, int]:
    """Run `passes` on a traced graph in place; return pass -> number of matches, in order.

    A pass that did not fire is not there.

    Args:
        model: the graph.
        sites: name of a pass -> how often it must fire, from `Family.sites`. A pass without an entry must not fire.
        passes: the passes to run, in order.

    Raises:
        ExportError: a pass did not fire as often as `sites` says. The error names the pass, both numbers, and why
            anchors did not match.
    """
    fired = {}
    for fusion in passes:
        count, reasons = fusion(model)
        expected = sites.get(fusion.name, 0)
        if count != expected:
            raise ExportError(_explain(fusion, count, expected, reasons))
        logger.debug("fusion pass %s fired %d times", fusion.name, count)
        if count:
            fired[fusion.name] = count
    ir_passes.CommonSubexpressionEliminationPass()(model)
    join_rows(model.graph)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.TopologicalSortPass()(model)
    forget_shapes(model.graph)
    return fired


def forget_shapes(graph: ir.Graph) -> None:
    """Drop the shapes of values inside the graph, which cost memory (docs/decisions/no-inner-shapes.md)."""
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None


def _explain(fusion: FusionPass, count: int, expected: int, reasons: Sequence[str]) -> str:
    # Anchors outside the layers (the embedding's LayerNorm, the head's Gelu) should not match: their reasons come last.
    likely = sorted(reasons, key=lambda reason: not is_in_layer(reason))[:_MAX_REASONS]
    why = "; ".join(likely) or f"the graph has no other {' or '.join(fusion.anchors)} node"
    return (
        f"fusion pass {fusion.name!r} fired {count} times, and this architecture has {expected} sites: {why}. "
        "The traced graph differs from the one that the pass knows; check the versions of transformers and torch."
    )
