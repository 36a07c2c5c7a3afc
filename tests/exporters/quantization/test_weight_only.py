import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.quantization.int8 import is_large
from gte_deploy.exporters.quantization.weight_only import BLOCK_SIZE, quantize_blocks, quantize_weights


def restored(blocks, scales, bits, inputs):
    """The matrix that the kernel multiplies with, from the operator's definition."""
    if bits == 4:
        blocks = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:2], -1)
    values = (blocks.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return values.reshape(len(values), -1)[:, :inputs].T


@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_multiplies_what_the_blocks_hold(graph, run, cosines, batches, bits):
    """Against FP32 products with the restored matrices: what is left is how the kernel rounds activations."""
    model, plain = graph(), graph()
    assert quantize_weights(model, bits) == {f"int{bits}_linears": 15, "int8_embeddings": 1}
    for linear in find_linear_layers(plain):
        if is_large(linear.name):
            width = 8 if "decoder" in linear.name else bits
            matrix = linear.matrix()
            held = restored(*quantize_blocks(matrix, width), width, len(matrix))
            linear.weight.const_value = ir.tensor(held.T if linear.transposed else held)
    for batch in batches:
        real = batch.attention_mask.astype(bool)
        (hidden, logits), (found, found_logits) = run(plain, batch), run(model, batch)
        assert cosines(hidden[real], found[real]).mean() > 0.99
        assert cosines(logits, found_logits).mean() > 0.99


@pytest.mark.parametrize("bits", [8, 4])
@given(inputs=st.integers(1, 300), outputs=st.integers(1, 5), seed=st.integers(0, 1000))
def test_blocks_hold_the_matrix(bits, inputs, outputs, seed):
    matrix = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    matrix[:, 0] = 0
    blocks, scales = quantize_blocks(matrix, bits)
    count = -(-inputs // BLOCK_SIZE[bits])
    assert blocks.shape == (outputs, count, BLOCK_SIZE[bits] * bits // 8) and scales.shape == (outputs, count)
    step = np.abs(scales).max(axis=1)
    error = np.abs(restored(blocks, scales, bits, inputs) - matrix)
    # Half a step, or as much as the end of the range that has one step less cuts off.
    assert (error.max(axis=0) <= step * (1.0001 if bits == 8 else 2.5)).all()


def test_a_narrower_range_is_taken_where_it_errs_less():
    """One outlier among 31 alike: 4 bits that reach it would round all the others to nothing."""
    matrix = np.full((32, 1), 0.08, np.float32)
    matrix[0] = 1.0
    blocks, scales = quantize_blocks(matrix, 4)
    full = np.abs(np.rint(matrix / (1 / 8)).clip(-8, 7) * (1 / 8) - matrix)
    found = np.abs(restored(blocks, scales, 4, 32) - matrix)
    assert np.square(found).sum() < np.square(full).sum()
