import subprocess
import sys
import textwrap

import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.exporters.graph import fusion
from gte_deploy.exporters.graph.editing import integers
from gte_deploy.exporters.graph.fusion.attention import MASK_COLUMNS


def test_fires_once_a_layer(plain, apply, same_function, kinds):
    assert apply(plain, "attention") == (2, [])
    assert kinds(plain).count("MultiHeadAttention") == 2
    assert "Softmax" not in kinds(plain)
    same_function(plain)


def test_mask_is_part_of_the_dot_product_and_no_input(plain, apply, find):
    apply(plain, "attention")
    node = find(plain, "MultiHeadAttention")
    assert len(node.inputs) == 3, "a mask input would make the kernel hold all scores"
    assert node.attributes["scale"].value == pytest.approx(8**-0.5), "the true head size, without the columns"
    query_target = node.inputs[0].producer().inputs[1].const_value.numpy()
    assert query_target.tolist() == [0, 0, 4 * (8 + MASK_COLUMNS)]


def test_without_padding_a_cpu_has_no_columns(plain, traced_proto, apply, feeds, run, same_function):
    apply(plain, "attention", passes=fusion.PASSES)
    same_function(plain)
    padded = feeds(3, 40)
    unpadded = {**padded, "attention_mask": np.ones((3, 40), np.int64)}
    expected = run(ir.from_proto(traced_proto), unpadded)[0]
    np.testing.assert_allclose(run(plain, unpadded)[0], expected, rtol=0, atol=5e-5)
    for node in [node for node in plain.graph if node.op_type == "MultiHeadAttention"]:
        plain.graph.outputs.extend(node.inputs[:2])
    assert [value.shape for value in run(plain, padded)[2:]] == [(3, 40, 4 * (8 + MASK_COLUMNS))] * 4
    assert [value.shape for value in run(plain, unpadded)[2:]] == [(3, 40, 4 * 8)] * 4


@pytest.mark.parametrize("passes", [fusion.MERGED_PASSES, fusion.PASSES])
def test_padding_changes_nothing(plain, apply, feeds, run, passes):
    """A row padded by any number of tokens equals the row alone, whatever the padding holds."""
    apply(plain, "attention", passes=passes)
    alone = feeds(1, 12)
    hidden = run(plain, alone)[0]
    for extra in (1, 5, 300):
        padded = {
            "input_ids": np.pad(alone["input_ids"], ((0, 0), (0, extra)), constant_values=77),
            "attention_mask": np.pad(alone["attention_mask"], ((0, 0), (0, extra))),
            "mask_positions": alone["mask_positions"],
        }
        np.testing.assert_allclose(run(plain, padded)[0][:, :12], hidden, rtol=0, atol=1e-5)


def _softmax_over_queries(model: ir.Model, find) -> None:
    find(model, "Softmax").attributes["axis"] = ir.AttrInt64("axis", 2)


def _full_mask(model: ir.Model, find) -> None:
    find(model, "Softmax").inputs[0].producer().inputs[1].shape = ir.Shape(("batch", 1, "sequence", "sequence"))


def _values_first(model: ir.Model, find) -> None:
    mixed = find(model, "Softmax").outputs[0].consumers()[0]
    weights, values = mixed.inputs
    mixed.replace_input_with(0, values)
    mixed.replace_input_with(1, weights)


def _other_heads(model: ir.Model, find) -> None:
    mixed = find(model, "Softmax").outputs[0].consumers()[0]
    view = mixed.inputs[1].producer().inputs[0].producer()
    view.replace_input_with(1, integers(model.graph, 0, 0, 2, 16))


@pytest.mark.parametrize(
    ("alter", "fired", "reason"),
    [
        (_softmax_over_queries, 1, "the softmax is not over keys"),
        (_full_mask, 0, "not [batch, 1, 1, sequence]"),  # one mask, every layer
        (_values_first, 1, "the weights are not the left factor"),
        (_other_heads, 1, "split into heads differently"),
    ],
)
def test_refuses_other_attention(plain, find, refused, alter, fired, reason):
    alter(plain, find)
    message = refused(plain)
    assert f"'attention' fired {fired} times" in message and "has 2 sites" in message
    assert reason in message


@pytest.mark.parametrize("passes", [fusion.MERGED_PASSES, fusion.PASSES])
def test_long_text_holds_no_square_of_scores(plain, apply, tmp_path, passes):
    """8,192 tokens, 4 heads: the scores alone would be 1 GiB; the run adds a tenth of that at most."""
    apply(plain, "attention", passes=passes)
    ir.save(plain, tmp_path / "model.onnx")
    script = textwrap.dedent(
        """
        import sys
        import numpy as np, onnxruntime as ort

        def peak():
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

        session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
        before = peak()
        ids = np.ones((1, 8192), np.int64)
        session.run(None, {"input_ids": ids, "attention_mask": ids, "mask_positions": np.zeros((0, 2), np.int64)})
        print(peak() - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100 * 1024  # KiB
