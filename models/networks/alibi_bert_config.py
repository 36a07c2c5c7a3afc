"""The configs of JinaBERT and MosaicBERT, whose own ones are in remote code. Importing this needs no torch."""

from transformers import BertConfig


class JinaBertConfig(BertConfig):
    """The config of JinaBERT v2: BERT's, and the fields of its own code.

    Args:
        position_embedding_type: "alibi"; its own code has others, which no published model has.
        feed_forward_type: "geglu" or "reglu" for a gated unit, "original" for BERT's two layers with `hidden_act`.
        emb_pooler: "mean" if the checkpoint is an embedding model, else None.
    """

    model_type = "jina_bert_v2"

    position_embedding_type: str = "alibi"
    feed_forward_type: str = "original"
    emb_pooler: str | None = None

    @property
    def head_layer_norm_eps(self) -> float:
        """Epsilon of the LayerNorm in the masked-LM head."""
        return self.layer_norm_eps


class MosaicBertConfig(BertConfig):
    """The config of MosaicBERT: BERT's, and the fields of its own code.

    Args:
        alibi_starting_size: the length in tokens for which its own code prepares the biases.
    """

    model_type = "mosaic_bert"

    alibi_starting_size: int = 512

    @property
    def feed_forward_type(self) -> str:
        """See `JinaBertConfig`; every MosaicBERT has this one."""
        return "geglu"

    @property
    def head_layer_norm_eps(self) -> float:
        """Epsilon of the LayerNorm in the masked-LM head, which is fixed, whatever `layer_norm_eps` is."""
        return 1e-12
