"""The chunked loss against torch's own, which computes all logits: values, gradients, autocast, and memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from gte_deploy.training.cross_entropy import IGNORE_INDEX, linear_cross_entropy, softmax_of_labels


def make_inputs(*, rows=37, classes=101, features=16, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, features), (classes, features), (classes,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], labels


def whole(rows, weight, bias, labels):
    return F.cross_entropy(F.linear(rows, weight, bias).float(), labels, reduction="sum", ignore_index=IGNORE_INDEX)


def results(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, inputs)]


@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 2048])
def test_loss_and_gradients_equal_those_of_all_logits(chunk_rows):
    inputs, labels = make_inputs()
    labels[[3, 36]] = IGNORE_INDEX
    expected = results(whole(*inputs, labels), inputs)
    actual = results(linear_cross_entropy(*inputs, labels, chunk_rows=chunk_rows), inputs)
    for name, a, b in zip(("loss", "rows", "weight", "bias"), actual, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm(), name
    assert not actual[1][[3, 36]].any()


def test_gradients_are_those_of_finite_differences():
    inputs, labels = make_inputs(rows=5, classes=7, features=3, dtype=torch.float64)
    labels[2] = IGNORE_INDEX
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, labels, chunk_rows=2), inputs)


def test_a_certain_prediction_has_an_exact_gradient():
    """Its softmax is close to 1: in bfloat16 the difference of the two would be 0, or 1/256."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    nats, softmax, of_labels = softmax_of_labels(logits, torch.tensor([0, IGNORE_INDEX]))
    wanted = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64).softmax(0)
    assert of_labels[0].item() == pytest.approx(wanted[0].item() - 1, rel=1e-3)
    assert nats[0].item() == pytest.approx(-wanted[0].log().item(), rel=1e-3)
    assert softmax.dtype == torch.bfloat16
    assert (nats[1], of_labels[1], softmax[1].any()) == (0, 0, False)


def test_under_autocast_it_is_closer_to_float64_than_all_logits_are():
    inputs, labels = make_inputs(rows=300, classes=500, features=64, scale=0.5)
    exact = results(whole(*(x.double() for x in inputs), labels), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [linear_cross_entropy(*inputs, labels, chunk_rows=64), whole(*inputs, labels)]
    assert losses[0].dtype == torch.float32
    chunked, all_logits = (results(loss, inputs) for loss in losses)
    for name, a, b, c in zip(("loss", "rows", "weight", "bias"), chunked, all_logits, exact, strict=True):
        assert (a - c).norm() <= max(1.05 * (b - c).norm(), 1e-4 * c.norm()), name
        assert (a - c).norm() <= 1e-2 * c.norm(), name
        assert a.dtype == torch.float32


def test_without_gradients_it_computes_none():
    inputs, labels = make_inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs, labels)
    assert not loss.requires_grad and loss.item() == pytest.approx(whole(*inputs, labels).item(), rel=1e-6)


PEAK = r"""
import re, sys, torch
import torch.nn.functional as F
from gte_deploy.training.cross_entropy import linear_cross_entropy
torch.set_num_threads(1)
def step(count, words):
    rows, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((count, 16), (words, 16), (words,)))
    labels = torch.arange(count)
    if sys.argv[1] == "chunked":
        linear_cross_entropy(rows, weight, bias, labels, chunk_rows=128).backward()
    else:
        F.cross_entropy(F.linear(rows, weight, bias), labels, reduction="sum").backward()
def peak():  # of this program; ru_maxrss would begin with that of the test's process
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
step(256, 512)  # what the first step alone takes
before = peak()
step(2048, 20_000)
print(peak() - before)
"""


def test_peak_memory_is_that_of_a_chunk():
    peaks = {}
    for kind in ("chunked", "whole"):
        done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True)
        peaks[kind] = int(done.stdout)
    logits = 4 * 2048 * 20_000
    assert peaks["whole"] > 0.9 * logits
    assert peaks["chunked"] < 0.3 * logits
