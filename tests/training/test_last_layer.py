"""The last layer for masked rows only, and the loss on it, against transformers' whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GteConfig

from gte_deploy.core.errors import InputError
from gte_deploy.models.attention import packed_attention
from gte_deploy.training.model import PackedMaskedLM, build_model

LENGTHS = (5, 17, 1, 17, 33)


def make_models(dropout=0.0):
    config = GteConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        type_vocab_size=2,
        pad_token_id=0,
        hidden_dropout_prob=dropout,
        initializer_range=0.2,
    )
    model = build_model(config, rope_theta=10_000)
    whole = copy.deepcopy(model)
    whole.set_attn_implementation("sdpa")
    return PackedMaskedLM(model), whole


def make_batch(masked):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]
    return {
        "input_ids": torch.cat(ids),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        "max_seqlen": max(LENGTHS),
        "masked_positions": torch.tensor(masked, dtype=torch.int64),
        "labels": torch.randint(1, 97, (len(masked),), generator=generator),
    }


def loss_of_whole(model, batch):
    rows = nn.utils.rnn.pad_sequence(batch["input_ids"].split(LENGTHS), batch_first=True)
    logits = model(rows, attention_mask=(rows != 0).long()).logits[rows != 0]
    return F.cross_entropy(logits[batch["masked_positions"]], batch["labels"], reduction="sum")


# A sequence with none, one with every token, and only one masked token at all.
@pytest.mark.parametrize("masked", [[1, 3, 6, 9, 21, 24, 25, 44, 72], [60], [*range(5), 30, 72], list(range(73))])
def test_loss_and_gradients_equal_those_of_the_whole_model(masked):
    packed, whole = make_models()
    batch = make_batch(masked)
    loss, expected = packed(**batch), loss_of_whole(whole, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    loss.backward()
    expected.backward()
    gradients = dict(packed.model.named_parameters())
    assert gradients.keys() == dict(whole.named_parameters()).keys()
    largest = max(parameter.grad.norm() for parameter in whole.parameters())
    for name, parameter in whole.named_parameters():
        floor = 1e-6 * largest if name.endswith("k_proj.bias") else 0.0  # a key's bias has the true gradient 0
        assert (gradients[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + floor, name


def test_no_masked_token_gives_no_loss_and_no_gradient():
    packed, _ = make_models()
    loss = packed(**make_batch([]))
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in packed.parameters())


def test_gradient_checkpointing_changes_nothing():
    batch = make_batch([1, 3, 6, 9, 21, 44, 72])
    gradients = []
    for checkpointing in (False, True):
        packed, _ = make_models(dropout=0.1)
        if checkpointing:
            packed.model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        packed(**batch).backward()
        gradients.append([parameter.grad for parameter in packed.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_last_layer_computes_masked_rows_only():
    packed, _ = make_models()
    seen = {}
    layers = packed.model.gte.layers
    for number in (1, 2):
        layers[number].mlp.register_forward_pre_hook(lambda _, x, n=number: seen.update({n: tuple(x[0].shape)}))
    packed(**make_batch([1, 3, 6]))
    assert seen == {1: (1, 73, 48), 2: (1, 3, 48)}


def test_a_window_with_chosen_queries_is_refused():
    x, bounds = torch.zeros(1, 1, 3, 4), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(InputError, match="not both"):
        packed_attention(
            nn.Identity(), x, x, x, None, cu_seqlens=bounds, max_seqlen=3, sliding_window=2, cu_seqlens_q=bounds
        )


@pytest.mark.gpu
def test_flash_kernel_with_chosen_queries_equals_segments():
    from gte_deploy.models.attention import _attend_from_some, _attend_varlen

    generator = torch.Generator("cuda").manual_seed(0)
    bounds = torch.tensor([0, 5, 22, 23, 40, 73], dtype=torch.int32, device="cuda")
    asking = torch.tensor([0, 2, 2, 3, 8, 20], dtype=torch.int32, device="cuda")
    rows = [
        torch.randn(size, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for size in (20, 73, 73)
    ]
    flash = _attend_varlen(*rows, bounds, max_seqlen=33, scaling=None, cu_seqlens_q=asking)
    segments = _attend_from_some(*(row.float() for row in rows), bounds, asking, scaling=None)
    torch.testing.assert_close(flash.float(), segments, atol=2e-2, rtol=2e-2)
    flash.float().square().sum().backward()
    assert all(torch.isfinite(row.grad).all() for row in rows)
