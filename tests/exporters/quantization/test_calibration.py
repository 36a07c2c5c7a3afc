import numpy as np
import torch


def test_ranges_are_those_of_the_modules(ranges, torch_model, batches):
    """Each layer's input, channel by channel, as PyTorch sees it."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0].flatten(0, -2))
        )
        for name, module in torch_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
            hidden = torch_model.gte(input_ids=ids, attention_mask=mask).last_hidden_state
            torch_model.lm_head(hidden[tuple(batch.mask_positions.T)])
    for hook in hooks:
        hook.remove()
    assert sorted(ranges) == sorted(seen)
    for name, found in ranges.items():
        rows = torch.cat(seen[name])
        # Padded rows of a batch differ between the two: every key is masked there in another way.
        np.testing.assert_allclose(found.low, rows.amin(0).numpy(), atol=0.05)
        np.testing.assert_allclose(found.high, rows.amax(0).numpy(), atol=0.05)


def test_the_graph_is_left_as_it_was(fp32, ranges):
    assert [value.name for value in fp32["onnxruntime"].model.graph.outputs] == ["logits", "last_hidden_state"]
