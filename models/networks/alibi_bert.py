"""The network of JinaBERT v2 and MosaicBERT: BERT with biased scores (ALiBi) and gated linear units.

The two publish it as remote code. Here it is made of transformers' BERT, from which it differs in three places:

* The embeddings have no table of positions.
* Every score of two tokens is lowered by their distance, in either direction, times a slope of the head (symmetric
  ALiBi: https://arxiv.org/abs/2108.12409, https://arxiv.org/abs/2310.19923). The biases depend on the length alone, so
  they are computed in each run, once for all layers, and added to the mask.
* A layer ends in `act(x A) * (x B) W + b` (https://arxiv.org/abs/2002.05202). One matrix holds A and then B.

Shapes: B rows, S tokens, N heads, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import (
    BertEncoder,
    BertLayer,
    BertOnlyMLMHead,
    BertPooler,
    BertPreTrainedModel,
)

from gte_deploy.models.networks.alibi_bert_config import JinaBertConfig, MosaicBertConfig

_AUTO_CLASSES: tuple[Any, ...] = (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "reglu": F.relu}
"""`feed_forward_type` of a gated unit -> its function. GELU is the exact one."""


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of the heads, as the authors of ALiBi publish them.

    For a power of two they are 2^(-8/N), 2^(-16/N), …, 2^-8. Otherwise the first heads have those of the next lower
    power P, and the others every second one of 2 P, from its first on.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def alibi_bias(length: int, heads: int, device: torch.device) -> Tensor:
    """The biases of the scores, [1, N, S, S] float32, computed for one length."""
    places = torch.arange(length, device=device)
    distances = (places[None, :] - places[:, None]).abs()
    factors = torch.tensor([-slope for slope in alibi_slopes(heads)], dtype=torch.float32, device=device)
    return (factors[:, None, None] * distances)[None]


class AlibiEmbeddings(nn.Module):
    """Embeddings of words and token types."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Embed ids [B, S], or take embeddings [B, S, H] of words; types are 0 where they are None. [B, S, H]"""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros((1, 1), dtype=torch.long, device=words.device)
        embedded: Tensor = self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))
        return embedded


class GatedUnit(nn.Module):
    """The gated linear unit at the end of a layer, with its residual sum and LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = GATES[config.feed_forward_type]
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] to [B, S, H]"""
        gated, plain = self.gated_layers(hidden_states).chunk(2, dim=-1)
        update = self.wo(self.dropout(self.gate(gated) * plain))
        output: Tensor = self.layernorm(update + hidden_states)
        return output


class AlibiLayer(BertLayer):
    """A layer of BERT, with a gated unit in place of its two feed-forward layers unless they are the "original"."""

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        if config.feed_forward_type in GATES:
            del self.intermediate, self.output
            self.mlp = GatedUnit(config)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """[B, S, H] to [B, S, H]"""
        output: Tensor
        output = self.mlp(attention_output) if hasattr(self, "mlp") else super().feed_forward_chunk(attention_output)
        return output


class AlibiEncoder(BertEncoder):
    """The layers of BERT, with biases in the mask."""

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList(AlibiLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As BERT's. The mask broadcasts to [B, N, S, S]; it is boolean (True for a seen token) or added to scores."""
        bias = alibi_bias(hidden_states.shape[1], self.config.num_attention_heads, hidden_states.device)
        bias = bias.to(hidden_states.dtype)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        elif attention_mask is not None:
            bias = bias + attention_mask
        return super().forward(hidden_states, bias, *args, **kwargs)


class _Alibi(BertPreTrainedModel):
    """What all models share. Flash and flex attention would leave the biases out, so neither is offered."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _no_split_modules = ["AlibiEmbeddings", "AlibiLayer"]


class AlibiBertModel(_Alibi, BertModel):
    """The encoder, with BERT's pooler unless `add_pooling_layer` is False."""

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.embeddings = AlibiEmbeddings(config)  # type: ignore[assignment]
        self.encoder = AlibiEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


class AlibiBertForMaskedLM(_Alibi, BertForMaskedLM):
    """The encoder with BERT's masked-LM head."""

    def __init__(self, config: Any) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.bert = AlibiBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.cls.predictions.transform.LayerNorm.eps = config.head_layer_norm_eps
        self.post_init()


class AlibiBertForSequenceClassification(_Alibi, BertForSequenceClassification):
    """The encoder with its pooler and a linear layer."""

    def __init__(self, config: Any) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = AlibiBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class AlibiBertForTokenClassification(_Alibi, BertForTokenClassification):
    """The encoder with a linear layer on each token."""

    def __init__(self, config: Any) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = AlibiBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def _classifier_dropout(config: Any) -> float:
    own = config.classifier_dropout
    return config.hidden_dropout_prob if own is None else own


class JinaBertModel(AlibiBertModel):
    """`AlibiBertModel` for JinaBERT v2."""

    config_class = JinaBertConfig


class JinaBertForMaskedLM(AlibiBertForMaskedLM):
    """`AlibiBertForMaskedLM` for JinaBERT v2."""

    config_class = JinaBertConfig


class JinaBertForSequenceClassification(AlibiBertForSequenceClassification):
    """`AlibiBertForSequenceClassification` for JinaBERT v2."""

    config_class = JinaBertConfig


class JinaBertForTokenClassification(AlibiBertForTokenClassification):
    """`AlibiBertForTokenClassification` for JinaBERT v2."""

    config_class = JinaBertConfig


class MosaicBertModel(AlibiBertModel):
    """`AlibiBertModel` for MosaicBERT."""

    config_class = MosaicBertConfig


class MosaicBertForMaskedLM(AlibiBertForMaskedLM):
    """`AlibiBertForMaskedLM` for MosaicBERT."""

    config_class = MosaicBertConfig


class MosaicBertForSequenceClassification(AlibiBertForSequenceClassification):
    """`AlibiBertForSequenceClassification` for MosaicBERT."""

    config_class = MosaicBertConfig


class MosaicBertForTokenClassification(AlibiBertForTokenClassification):
    """`AlibiBertForTokenClassification` for MosaicBERT."""

    config_class = MosaicBertConfig


def register_with_transformers() -> None:
    """Let the Auto classes of transformers take these classes for the native layouts; further calls change nothing."""
    for config, classes in (
        (
            JinaBertConfig,
            (JinaBertModel, JinaBertForMaskedLM, JinaBertForSequenceClassification, JinaBertForTokenClassification),
        ),
        (
            MosaicBertConfig,
            (
                MosaicBertModel,
                MosaicBertForMaskedLM,
                MosaicBertForSequenceClassification,
                MosaicBertForTokenClassification,
            ),
        ),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in zip(_AUTO_CLASSES, classes, strict=True):
            auto.register(config, model, exist_ok=True)
