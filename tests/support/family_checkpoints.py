"""Tiny random checkpoints of the families of transformers, written by transformers and sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factories import SPELLING

PREFIXES = {
    **{"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"},
    **{"nomic_bert": "NomicBert", "modernbert": "ModernBert"},
}
MASKS = {
    **{"bert": "[MASK]", "roberta": "<mask>", "xlm-roberta": "<mask>"},
    **{"nomic_bert": "[MASK]", "modernbert": "[MASK]"},
}
WORD_PIECES = ("bert", "nomic_bert")
"""The kinds with BERT's tokenizer, positions from 0 and token types."""
LIMIT = 48
"""The most tokens of a text."""
LAYERS = 2
SUFFIXES = {
    "fill-mask": "ForMaskedLM",
    "embed": "Model",
    "classify": "ForSequenceClassification",
    "token-classify": "ForTokenClassification",
}
_WORDS = ("the", "river", "city", "is", "old", "and", "Paris", "река", "城市", "مدينة", "नदी")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"
_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "l"), ("Ġ", "ol"), ("Ġol", "d")]
_CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюя"


def make_family_checkpoint(
    folder: Path,
    kind: str,
    task: str = "fill-mask",
    *,
    labels: Sequence[str] = ("LABEL_0",),
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a random model of `kind` (a `model_type`) with the head of `task`, and its tokenizer.

    `sizes` replaces fields of the config of transformers.
    """
    import torch
    import transformers

    tokenizer = make_tokenizer(kind)
    vocabulary = len(tokenizer)
    is_bert = kind in WORD_PIECES
    own: dict[str, Any] = {
        "max_position_embeddings": LIMIT if is_bert else LIMIT + 2,
        "type_vocab_size": 2 if is_bert else 1,
        "layer_norm_eps": 1e-12 if is_bert else 1e-5,
    }
    if kind == "modernbert":
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
        own = {**ids, "bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
        # A window that is much shorter than the texts, and a layer after the last global one.
        own |= {"max_position_embeddings": LIMIT, "local_attention": 8, "num_hidden_layers": 5}
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        **own,
        # Far from the tiny weights of a fresh model: a missing or doubled part of the embedding must show.
        "initializer_range": 0.4,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        **sizes,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{PREFIXES[kind]}Config")(**fields)
    model = getattr(transformers, PREFIXES[kind] + SUFFIXES[task])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or any(part in name for part in ("LayerNorm", "layer_norm", "norm.")):
                parameter.add_(0.1 * torch.randn_like(parameter))  # fresh ones are all 0 or 1, and would hide a mix-up
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(kind: str) -> Any:
    """WordPiece of `SPELLING`, byte-level BPE with few merges, or Unigram."""
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if kind in WORD_PIECES:
        return transformers.BertTokenizer({word: i for i, word in enumerate(SPELLING)}, model_max_length=LIMIT)
    if kind == "modernbert":
        return _modernbert_tokenizer()
    if kind == "roberta":
        merged = (a + b for a, b in _MERGES)
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), *merged, "<mask>"]
        vocab = {token: i for i, token in enumerate(tokens)}
        return transformers.RobertaTokenizer(vocab=vocab, merges=_MERGES, model_max_length=LIMIT)
    return transformers.XLMRobertaTokenizer(vocab=unigram_pieces(), model_max_length=LIMIT)


def _modernbert_tokenizer() -> Any:
    """Byte-level BPE with the special tokens last, as answerdotai/ModernBERT-base has it; no class of its own."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), *(a + b for a, b in _MERGES)]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, _MERGES))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    made.add_special_tokens([*special, tokenizers.AddedToken("[MASK]", lstrip=True, special=True)])
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    names = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=LIMIT,
        **names,
    )


def unigram_pieces(size: int | None = None) -> list[tuple[str, float]]:
    """The vocabulary of an XLM-R tokenizer: pieces with scores; filled up to `size` with words w0, w1, …"""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -3.0 - i / 10) for i, word in enumerate(_WORDS)]
    pieces += [("\u2581", -8.0), *((letter, -9.0 - i / 100) for i, letter in enumerate(_LETTERS + _CYRILLIC))]
    if size is not None:
        pieces += [(f"\u2581w{i}", -12.0) for i in range(size - len(pieces) - 1)]
    return [*pieces, ("<mask>", 0.0)]


def make_embedder(folder: Path, kind: str, *, pooling: str, normalize: bool, prompts: Mapping[str, str]) -> Path:
    """Write an embedding model as sentence-transformers saves it, such as bge (cls, normalised) or e5 (mean)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    source = make_family_checkpoint(folder.with_name(f"{folder.name}-encoder"), kind, "embed")
    transformer = Transformer(str(source))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)]
    modules += [Normalize()] if normalize else []
    SentenceTransformer(modules=modules, prompts=dict(prompts), device="cpu").save_pretrained(str(folder))
    return folder


def make_reranker(folder: Path, kind: str) -> Path:
    """Write a cross-encoder as sentence-transformers saves it, such as bge-reranker or ms-marco-MiniLM."""
    from sentence_transformers import CrossEncoder

    options = {"classifier_pooling": "mean"} if kind == "modernbert" else {}  # as gte-reranker-modernbert-base
    source = make_family_checkpoint(folder.with_name(f"{folder.name}-model"), kind, "classify", **options)
    CrossEncoder(str(source), device="cpu").save_pretrained(str(folder))
    return folder


def assert_fills_as_the_pipeline(model: Any, pipe: Any, texts: Sequence[str]) -> None:
    """Compare the answers of `fill_mask` with those of transformers' pipeline; each text has one mask."""
    import numpy as np

    for text in texts:
        expected, found = pipe(text, top_k=5), model.fill_mask(text, top_k=5)
        for part in ("token", "token_str", "sequence"):
            assert [answer[part] for answer in found] == [answer[part] for answer in expected]
        np.testing.assert_allclose([a["score"] for a in found], [a["score"] for a in expected], rtol=1e-4)


def edit_config(folder: Path, **fields: Any) -> Path:
    """Replace fields of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder
