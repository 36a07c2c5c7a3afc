"""A small encoder with biased scores, made of transformers' BERT: the network of the family in `alibi.py`.

transformers has biased scores (ALiBi, https://arxiv.org/abs/2108.12409) in decoders only. This encoder lowers the score
of two tokens by their distance, in either direction, times a slope of the head.

Shapes: B rows, S tokens, N heads, H hidden size, L labels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPreTrainedModel, BertSelfAttention


class AlibiConfig(BertConfig):
    """BERT's under another name."""

    model_type = "alibi"


def slopes(heads: int) -> Tensor:
    """[N], from 1/2 or less down to 1/256."""
    return torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])


class AlibiEmbeddings(BertEmbeddings):
    """BERT's without a table of positions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.position_embeddings, self.position_ids, self.token_type_ids

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[B, S] and [B, S] to [B, S, H]; None stands for types of 0."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.token_type_embeddings(types)))


class AlibiSelfAttention(BertSelfAttention):
    """BERT's with a bias on each score."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As BERT's; the mask broadcasts to [B, N, S, S], and is boolean or added to the scores."""
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        distances = (places[:, None] - places[None, :]).abs()
        factors = slopes(self.num_attention_heads).to(hidden_states)
        bias = (-factors[:, None, None] * distances)[None]
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        elif attention_mask is not None:
            bias = bias + attention_mask
        return super().forward(hidden_states, attention_mask=bias, **kwargs)


class AlibiModel(BertModel):
    """The encoder."""

    config_class = AlibiConfig

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        self.embeddings = AlibiEmbeddings(config)
        for i, layer in enumerate(self.encoder.layer):
            layer.attention.self = AlibiSelfAttention(config, layer_idx=i)
        self.post_init()


class AlibiForTokenClassification(BertPreTrainedModel):
    """The encoder with a linear layer, `scorer`, on each token."""

    config_class = AlibiConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = AlibiModel(config, add_pooling_layer=False)
        self.scorer = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> TokenClassifierOutput:
        """[B, S] to logits [B, S, L]."""
        return TokenClassifierOutput(logits=self.scorer(self.bert(input_ids, **kwargs).last_hidden_state))
