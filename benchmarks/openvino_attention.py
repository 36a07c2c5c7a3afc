"""Variants of attention in OpenVINO's graph, which `graph_variants.py --engine openvino` measures.

    plain            the graph of a bundle: two products, the scale, the additive mask and Softmax
    plain-no-mask    without the mask: shows what it costs (padding is not masked)
    sdpa             ScaledDotProductAttention with the additive mask
    sdpa-no-mask     ScaledDotProductAttention without a mask
    folded           the mask as 8 more columns of queries and keys, like in ONNX Runtime's graph
    folded-at-need   the same, with no columns if no text has padding

Run as a program, it prints the seconds of one text, the peak resident MB (VmHWM) and the MB before the first run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.backends.base import Batch
from gte_deploy.core.quiet import import_openvino

MASK_COLUMNS, QUERY_COLUMN = 8, 64.0

openvino = import_openvino()
ops = openvino.opset13


@dataclass(frozen=True)
class Site:
    """softmax(query · keyᵀ · scale + mask) · value in an ov.Model.

    Args:
        softmax: the Softmax.
        scores: the scaled scores [B, N, S, S], before the mask.
        query, key, value: [B, N, S, D].
        scale: the factor.
        mask: the additive mask [B, 1, 1, S].
    """

    softmax: Any
    scores: Any
    query: Any
    key: Any
    value: Any
    scale: Any
    mask: Any

    @property
    def output(self) -> Any:
        """The product of weights and values."""
        (product,) = [target.get_node() for target in self.softmax.output(0).get_target_inputs()]
        return product.output(0)


def sites(model: Any) -> Iterator[Site]:
    """All attentions of a plain graph."""
    for softmax in [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]:
        scores, mask = _operands(softmax.input_value(0).get_node(), "Multiply")
        product, scale = _operands(scores, "MatMul")
        key = product.input_value(1).get_node().input_value(0)
        (weighted,) = [target.get_node() for target in softmax.output(0).get_target_inputs()]
        query, value = product.input_value(0), weighted.input_value(1)
        yield Site(softmax, scores.output(0), query, key, value, scale, mask)


def _operands(node: Any, type_name: str) -> tuple[Any, Any]:
    """The node of type `type_name` among the operands of a binary node, and the other operand."""
    first, second = node.input_value(0), node.input_value(1)
    if first.get_node().get_type_name() != type_name:
        first, second = second, first
    if first.get_node().get_type_name() != type_name:
        raise SystemExit(f"{node.get_friendly_name()} has no operand of type {type_name}: the graph is not plain")
    return first.get_node(), second


def _replace(old: Any, new: Any) -> None:
    for target in old.get_target_inputs():
        target.replace_source_output(new)


def _without_mask(site: Site, model: Any) -> None:
    site.softmax.input(0).replace_source_output(site.scores)


def _sdpa(site: Site, model: Any) -> None:
    attended = ops.scaled_dot_product_attention(site.query, site.key, site.value, site.mask, site.scale)
    _replace(site.output, attended.output(0))


def _sdpa_without_mask(site: Site, model: Any) -> None:
    none = ops.constant(np.array(0, np.float32))  # a scalar 0 stands for no mask
    attended = ops.scaled_dot_product_attention(site.query, site.key, site.value, none, site.scale)
    _replace(site.output, attended.output(0))


def _folded(site: Site, model: Any) -> None:
    _fold(site, None)


def _folded_at_need(site: Site, model: Any) -> None:
    mask = next(node for node in model.get_parameters() if "attention_mask" in node.output(0).get_names())
    smallest = ops.reduce_min(mask, np.array([0, 1]), keep_dims=False)
    has_padding = ops.subtract(np.array([1], np.int64), ops.reshape(smallest, np.array([1]), False))
    _fold(site, ops.multiply(has_padding, np.array([MASK_COLUMNS], np.int64)))


def _fold(site: Site, width: Any) -> None:
    scale = float(site.scale.get_node().get_data().item())
    per_key = ops.multiply(ops.transpose(site.mask, [0, 1, 3, 2]), np.float32(1 / (QUERY_COLUMN * scale)))
    keys = ops.pad(per_key, [0, 0, 0, 0], [0, 0, 0, MASK_COLUMNS - 1], "constant", np.float32(0))
    first = np.zeros((1, 1, 1, MASK_COLUMNS), np.float32)
    first[..., 0] = QUERY_COLUMN
    queries = ops.constant(first)
    if width is not None:
        start, step, axis = (np.array([number]) for number in (0, 1, 3))
        keys, queries = (ops.slice(each, start, width, step, axis) for each in (keys, queries))
    size = ops.gather(ops.shape_of(site.query), np.array([0, 1, 2]), np.int64(0))
    target = ops.concat([size, ops.gather(ops.shape_of(keys), np.array([3]), np.int64(0))], 0)
    query = ops.concat([site.query, ops.broadcast(queries, target)], 3)
    key = ops.concat([site.key, ops.broadcast(keys, target)], 3)
    product = ops.matmul(query, key, False, True)
    site.softmax.input(0).replace_source_output(ops.multiply(product, np.float32(scale)).output(0))


VARIANTS: dict[str, Callable[[Site, Any], None] | None] = {
    "plain": None,
    "plain-no-mask": _without_mask,
    "sdpa": _sdpa,
    "sdpa-no-mask": _sdpa_without_mask,
    "folded": _folded,
    "folded-at-need": _folded_at_need,
}


def compiled_request(file: Path, variant: str, threads: int, precision: str) -> Any:
    """Compile a variant of a plain graph with the settings of the backend, and return an idle request.

    The model computes its last output alone, the task's: the hidden states would otherwise be copied, too.
    """
    core = openvino.Core()
    model = core.read_model(file)
    if (rewrite := VARIANTS[variant]) is not None:
        for site in list(sites(model)):
            rewrite(site, model)
    model = openvino.Model([model.outputs[-1]], model.get_parameters())
    model.validate_nodes_and_infer_types()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "ENABLE_CPU_PINNING": False,
    }
    return core.compile_model(model, "CPU", config).create_infer_request()


def feeds(request: Any, rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Inputs of texts without padding."""
    ids = np.random.default_rng(0).integers(5, 100, (rows, tokens))
    batch = Batch(ids, np.ones_like(ids), np.zeros((1, 2), np.int64))
    return batch.graph_inputs([value.any_name for value in request.model_inputs])


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def main() -> None:
    """Measure one text in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("tokens", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    options = parser.parse_args()
    request = compiled_request(options.file, options.variant, options.threads, options.precision)
    inputs, loaded = feeds(request, 1, options.tokens), _peak_mb()
    start = time.perf_counter()
    request.infer(inputs)
    print(f"{time.perf_counter() - start:.1f} | {_peak_mb():.0f} | {loaded:.0f}")


if __name__ == "__main__":
    main()
