"""Quantizes only the weights of an FP32 graph, to 8 or 4 bits in blocks, to save disk space.

The operator is com.microsoft MatMulNBits; activations stay FP32. Each column of a weight is cut into blocks along its
inputs, with one scale each. Word embeddings and the vocabulary projection always have 8 bits, because 4 bits would harm
rare words.
"""

from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as ir_passes

from gte_deploy.exporters.graph.editing import CONTRIB, Builder, initializer, replace, scope_of
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.quantization.int8 import quantize_embeddings
from gte_deploy.exporters.quantization.smoothing import is_large

Bits = Literal[4, 8]

BLOCK_SIZE: dict[Bits, int] = {8: 128, 4: 32}
# Lets the kernel round activations to int8 in the same blocks: integer arithmetic, for 1e-4 of cosine.
_ACCURACY_LEVEL = 4
# Shares of a block's full range to try. A narrower range clips the largest weight, but rounds the others less.
_RANGE_SHARES: dict[Bits, tuple[float, ...]] = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8)}


def quantize_weights(model: ir.Model, bits: Bits) -> dict[str, int]:
    """Rewrite an FP32 graph in place; return the numbers of quantized linear layers and embeddings."""
    graph = model.graph
    linears = [linear for linear in find_linear_layers(model) if is_large(linear.name)]
    for linear in linears:
        layer_bits: Bits = 8 if "decoder" in linear.name else bits
        matrix = linear.matrix()
        blocks, scales = quantize_blocks(matrix, layer_bits)
        build = Builder(graph, linear.node, scope_of(linear.node))
        product = build.op(
            "MatMulNBits",
            linear.x,
            initializer(graph, f"{linear.name}.int{layer_bits}", ir.tensor(blocks)),
            initializer(graph, f"{linear.name}.scale", ir.tensor(scales)),
            None,
            None,
            linear.bias,
            domain=CONTRIB,
            K=matrix.shape[0],
            N=matrix.shape[1],
            bits=layer_bits,
            block_size=BLOCK_SIZE[layer_bits],
            accuracy_level=_ACCURACY_LEVEL,
        )
        replace(linear.node.outputs[0], product)
    ir_passes.RemoveUnusedNodesPass()(model)
    embeddings = quantize_embeddings(graph)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.TopologicalSortPass()(model)
    return {f"int{bits}_linears": len(linears), "int8_embeddings": embeddings}


def quantize_blocks(matrix: NDArray[np.float32], bits: Bits) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize [in, out] float32 to blocks [out, in/block, block·bits/8] uint8 and scales [out, in/block] float32.

    The zero point is 2^(bits-1). The last block is padded with zeros. A byte holds two 4-bit values, the first
    one in the low bits.
    """
    size, half = BLOCK_SIZE[bits], 1 << (bits - 1)
    inputs, outputs = matrix.shape
    padded = np.zeros((outputs, -(-inputs // size) * size), np.float32)
    padded[:, :inputs] = matrix.T
    blocks = padded.reshape(outputs, -1, size)
    # The value with the largest magnitude becomes -half, because the negative side has one step more.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    full = np.where(extreme == 0, 1, extreme / -half).astype(np.float32)
    scale, quantized = full, _rounded(blocks, full, half)
    error = _squared_error(blocks, quantized, full)
    for share in _RANGE_SHARES[bits][1:]:
        narrower = full * np.float32(share)
        candidate = _rounded(blocks, narrower, half)
        found = _squared_error(blocks, candidate, narrower)
        better = found < error
        quantized, scale = np.where(better, candidate, quantized), np.where(better, narrower, scale)
        error = np.minimum(found, error)
    stored = (quantized + half).astype(np.uint8)
    if bits == 4:
        stored = stored[..., ::2] | np.left_shift(stored[..., 1::2], 4, dtype=np.uint8)
    return stored, scale[..., 0]


def _rounded(blocks: NDArray[np.float32], scale: NDArray[np.float32], half: int) -> NDArray[np.float32]:
    return np.rint(blocks / scale).clip(-half, half - 1)


def _squared_error(
    blocks: NDArray[np.float32], quantized: NDArray[np.float32], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    return np.square(quantized * scale - blocks).sum(axis=-1, keepdims=True)
