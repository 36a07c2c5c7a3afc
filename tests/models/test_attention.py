"""Packed attention against transformers' padded SDPA, and that no sequence sees another."""

import copy

import pytest
import torch
from torch import nn
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.core.errors import InputError
from gte_deploy.models.attention import PACKED_ATTENTION, packed_attention, register_packed_attention

LENGTHS = [5, 17, 1, 17, 33, 5]
VOCAB = 97


def make_models() -> tuple[nn.Module, nn.Module]:
    """The same weights behind padded SDPA and behind packed attention; larger than at initialisation, so they show."""
    register_packed_attention()
    config = GteConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        type_vocab_size=2,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    padded = GteForMaskedLM._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    packed = GteForMaskedLM._from_config(copy.deepcopy(config), attn_implementation=PACKED_ATTENTION)
    packed.load_state_dict(padded.state_dict())
    return padded, packed


def make_documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in LENGTHS]


def pack(documents: list[torch.Tensor]) -> dict:
    lengths = torch.tensor([len(document) for document in documents])
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
        "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        "max_seqlen": int(lengths.max()),
    }


def pad(documents: list[torch.Tensor]) -> dict:
    input_ids = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def test_packed_logits_and_gradients_equal_padded():
    padded, packed = make_models()
    documents = make_documents()
    expected = padded(**pad(documents)).logits[pad(documents)["attention_mask"].bool()]
    actual = packed(**pack(documents)).logits[0]
    assert (actual - expected).abs().max() <= 1e-5

    labels = torch.cat(documents).roll(1)
    nn.functional.cross_entropy(expected, labels).backward()
    nn.functional.cross_entropy(actual, labels).backward()
    gradients = dict(packed.named_parameters())
    for name, parameter in padded.named_parameters():
        difference = (gradients[name].grad - parameter.grad).norm()
        # A key's bias moves every score of a query alike, so its true gradient is 0: only its size can be judged.
        floor = 1e-6 if name.endswith("k_proj.bias") else 0.0
        assert difference <= 1e-4 * parameter.grad.norm() + floor, name


def test_changing_one_document_leaves_the_others_bitwise_unchanged():
    _, packed = make_models()
    documents = make_documents()
    changed = [document.clone() for document in documents]
    changed[1] = (changed[1] + 7) % (VOCAB - 1) + 1
    with torch.no_grad():
        before = packed(**pack(documents)).logits[0].split(LENGTHS)
        after = packed(**pack(changed)).logits[0].split(LENGTHS)
    assert not torch.equal(before[1], after[1])
    for i in (0, 2, 3, 4, 5):
        assert torch.equal(before[i], after[i]), i


def test_empty_sequences_change_nothing():
    _, packed = make_models()
    batch = pack(make_documents())
    with torch.no_grad():
        expected = packed(**batch).logits
        batch["cu_seqlens"] = torch.cat([batch["cu_seqlens"], batch["cu_seqlens"][-1:].repeat(4)])
        assert torch.equal(packed(**batch).logits, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    _, packed = make_models()
    batch = pack(make_documents())
    packed(**batch).logits.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in packed.named_parameters()}
    packed.zero_grad()
    packed.activation_checkpointing_enable({"use_reentrant": False})
    packed.train()
    packed(**batch).logits.square().mean().backward()
    for name, parameter in packed.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_autocast_reaches_the_attention():
    """RoPE's float32 tables make q and k float32 again, which would keep the flash kernel from running."""
    seen = []
    _, packed = make_models()
    packed.gte.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = pack(make_documents())
    with torch.no_grad():
        exact = packed(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = packed(**batch).logits
    assert [x.dtype for x in seen] == [torch.float32, torch.bfloat16]
    assert (rounded.float() - exact).norm() <= 0.05 * exact.norm()


def test_what_it_cannot_honour_is_refused():
    _, packed = make_models()
    batch = pack(make_documents())
    with pytest.raises(InputError, match="no cu_seqlens"):
        packed(input_ids=batch["input_ids"])
    with pytest.raises(InputError, match="in place of attention_mask"):
        packed(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    with pytest.raises(InputError, match="78 tokens; it goes from 0 to 77"):
        cut = batch["cu_seqlens"].clone()
        cut[-1] -= 1
        packed(**{**batch, "cu_seqlens": cut})
    two_rows = torch.zeros(2, 1, 3, 4)
    with pytest.raises(InputError, match="2 rows"):
        packed_attention(packed, two_rows, two_rows, two_rows, None, cu_seqlens=batch["cu_seqlens"], max_seqlen=3)


@pytest.mark.gpu
def test_flash_kernel_equals_segments():
    from gte_deploy.models.attention import _attend_per_segment, _attend_varlen

    generator = torch.Generator("cuda").manual_seed(0)
    cu_seqlens = pack(make_documents())["cu_seqlens"].cuda()
    rows = [
        torch.randn(78, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for _ in range(3)
    ]
    flash = _attend_varlen(*rows, cu_seqlens, max_seqlen=33, scaling=None)
    segments = _attend_per_segment(*(row.float() for row in rows), cu_seqlens, scaling=None)
    torch.testing.assert_close(flash.float(), segments, atol=2e-2, rtol=2e-2)
    flash.float().square().sum().backward()
    assert all(torch.isfinite(row.grad).all() for row in rows)
