"""Tiny checkpoints in the published layouts, written by hand: no line of the package under test takes part."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL_TOKENS, *(f"w{i}" for i in range(5, 256)))
SPELLING = (
    *(*SPECIAL_TOKENS, *".,!?", *string.ascii_lowercase),
    *(f"##{letter}" for letter in string.ascii_lowercase),
    *("the", "river", "city", "is", "old", "and"),
)
"""Word pieces that spell every lower-case word, and a few whole words."""

ARCHITECTURES = {
    "fill-mask": "ForMaskedLM",
    "embed": "Model",
    "classify": "ForSequenceClassification",
    "token-classify": "ForTokenClassification",
}


def make_checkpoint(
    folder: Path | str,
    *,
    task: str = "fill-mask",
    layout: str = "original",
    prefix: str | None = None,
    pack_qkv: bool = True,
    tie_stored: bool = False,
    type_vocab_size: int = 0,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_theta: float = 160000,
    num_labels: int = 1,
    vocab: str | Sequence[str] = "words",
    vocab_size: int | None = None,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    max_positions: int = 8192,
    shards: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    string_booleans: bool = False,
    pooling: str | None = None,
    normalize: bool = False,
    prompts: Mapping[str, str] | None = None,
    with_pooler: bool = False,
) -> Path:
    """Write config.json, safetensors and a WordPiece tokenizer; the same seed gives the same function in every layout.

    `prefix` None is the published one: none for a bare encoder, else `new.` (original) or `gte.` (native).
    `vocab` is "words" ([PAD] [UNK] [CLS] [SEP] [MASK] w5 … w255) or a list of word pieces that starts with those five;
    `vocab_size` above the list's length pads the embedding with rows that no word owns.
    `pooling` "cls" or "mean" adds modules.json and 1_Pooling/config.json in the legacy form, `normalize`
    a third module.
    `rope_scaling` takes the original field, e.g. {"type": "ntk", "factor": 2.0}; native cannot spell mixed_b.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS if vocab == "words" else tuple(vocab)
    sizes = {
        "vocab_size": vocab_size or len(words),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "type_vocab_size": type_vocab_size,
    }
    tensors = _original_tensors(sizes, task=task, num_labels=num_labels, with_pooler=with_pooler, seed=seed)
    if tie_stored:
        tensors["lm_head.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]
    if layout == "native":
        tensors = dict(pair for item in tensors.items() for pair in _native_items(*item))
        config = _native_config(sizes, rope_theta, rope_scaling)
    else:
        if not pack_qkv:
            tensors = dict(pair for item in tensors.items() for pair in _unpacked_items(*item))
        config = _original_config(sizes, rope_theta, rope_scaling, pack_qkv)
    config["architectures"] = [("Gte" if layout == "native" else "New") + ARCHITECTURES[task]]
    config["torch_dtype" if layout == "original" else "dtype"] = dtype
    if task in ("classify", "token-classify"):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
        if layout == "original":
            config["num_labels"] = num_labels
    if string_booleans:
        config = {k: str(v).lower() if isinstance(v, bool) else v for k, v in config.items()}
    if prefix is None:
        prefix = "" if task == "embed" else {"original": "new.", "native": "gte."}[layout]
    heads_of_model = ("lm_head.", "classifier.")
    named = {(k if k.startswith(heads_of_model) else prefix + k): v for k, v in tensors.items()}

    _write_json(folder / "config.json", config)
    write_safetensors(folder, named, dtype=dtype, shards=shards)
    write_tokenizer(folder, words, max_length=max_positions)
    if pooling is not None:
        _write_sentence_transformers(folder, hidden_size, max_positions, pooling, normalize)
    if prompts is not None:
        _write_json(
            folder / "config_sentence_transformers.json", {"prompts": dict(prompts), "default_prompt_name": None}
        )
    return folder


def add_sparse_modules(
    folder: Path,
    *,
    pooling: str = "max",
    activation: str = "relu",
    query_weights: Sequence[float] | None = None,
    default_route: str | None = "document",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Make a fill-mask checkpoint a SparseEncoder's, in the published layout: the transformer stays in the root.

    With `query_weights` a Router sends queries to a SparseStaticEmbedding. `config` are further fields of
    config_sentence_transformers.json.
    """
    sparse = "sentence_transformers.sparse_encoder.models"
    transformer, splade = f"{sparse}.MLMTransformer.MLMTransformer", f"{sparse}.SpladePooling.SpladePooling"
    name = "1_SpladePooling" if query_weights is None else "document_1_SpladePooling"
    (folder / name).mkdir()
    _write_json(folder / name / "config.json", {"pooling_strategy": pooling, "activation_function": activation})
    _write_json(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder", **(config or {})})
    kinds = [("", transformer), (name, splade)]
    if query_weights is not None:
        kinds = [("", "sentence_transformers.models.Router")]
        queries = folder / "query_0_SparseStaticEmbedding"
        queries.mkdir()
        static = f"{sparse}.SparseStaticEmbedding.SparseStaticEmbedding"
        _write_json(
            folder / "router_config.json",
            {
                "types": {queries.name: static, "": transformer, name: splade},
                "structure": {"query": [queries.name], "document": ["", name]},
                "parameters": {"default_route": default_route, "allow_empty_key": default_route is not None},
            },
        )
        _write_json(queries / "config.json", {"frozen": True})
        write_safetensors(queries, {"weight": list(query_weights)})
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (queries / file).write_bytes((folder / file).read_bytes())
    _write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)],
    )
    return folder


def add_multi_vector_modules(
    folder: Path,
    *,
    library: str = "pylate",
    widths: Sequence[int] = (8,),
    config: Mapping[str, Any] | None = None,
    transformer: Mapping[str, Any] | None = None,
    mask: Mapping[str, Any] | None = None,
    normalize: bool = True,
) -> Path:
    """Make an encoder's checkpoint one for late interaction, in the layout of "pylate" or "sentence-transformers".

    `widths` are those of the projections, which are random. `config` are further fields of
    config_sentence_transformers.json, `transformer` of sentence_bert_config.json. MultiVectorEncoder also has a
    MultiVectorMask with the fields `mask` (None for no such module), and Normalize if `normalize`.
    """
    import numpy as np

    is_pylate = library == "pylate"
    dense = "pylate.models.Dense.Dense" if is_pylate else "sentence_transformers.base.modules.dense.Dense"
    kinds = [("", "sentence_transformers.models.Transformer")]
    width, rng = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"],
        np.random.default_rng(7),
    )
    for i, out in enumerate(widths, start=1):
        where = folder / f"{i}_Dense"
        where.mkdir()
        fields = {"in_features": width, "out_features": out, "bias": False}
        _write_json(where / "config.json", {**fields, "activation_function": "torch.nn.modules.linear.Identity"})
        weight = (rng.standard_normal((out, width)) / math.sqrt(width)).astype(np.float32)
        write_safetensors(where, {"linear.weight": weight})
        kinds.append((where.name, dense))
        width = out
    later = (
        []
        if is_pylate or mask is None
        else [("MultiVectorMask", "multi_vector_encoder.modules.multi_vector_mask", mask)]
    )
    if normalize and not is_pylate:
        later.append(("Normalize", "base.modules.normalize", {"module_input_name": "token_embeddings"}))
    for kind, module, fields in later:
        where = folder / f"{len(kinds)}_{kind}"
        where.mkdir()
        _write_json(where / "config.json", fields)
        kinds.append((where.name, f"sentence_transformers.{module}.{kind}"))
    _write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)],
    )
    _write_json(folder / "sentence_bert_config.json", dict(transformer or {}))
    whole = {"model_type": "ColBERT" if is_pylate else "MultiVectorEncoder", **(config or {})}
    _write_json(folder / "config_sentence_transformers.json", whole)
    return folder


def add_stanford_projection(folder: Path, *, width: int = 8, **metadata: Any) -> Path:
    """Make a BERT checkpoint one of Stanford's ColBERT: linear.weight among the weights, and artifact.metadata."""
    import numpy as np
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng, hidden = np.random.default_rng(7), config["hidden_size"]
    tensors = {f"bert.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    weight = (rng.standard_normal((width, hidden)) / math.sqrt(hidden)).astype(np.float32)
    write_safetensors(folder, {**tensors, "linear.weight": weight})
    _write_json(folder / "config.json", {**config, "architectures": ["HF_ColBERT"]})
    _write_json(folder / "artifact.metadata", {"dim": width, "similarity": "cosine", **metadata})
    return folder


def add_tokens(folder: Path, tokens: Sequence[str]) -> Path:
    """Add tokens to a tokenizer that is there, as transformers' `add_tokens` does; ids follow those of its words."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    first = 1 + max(tokenizer["model"]["vocab"].values())
    tokenizer["added_tokens"] += [{"id": first + i, "content": token, **flags} for i, token in enumerate(tokens)]
    _write_json(file, tokenizer)
    return folder


def raise_token_weights(folder: Path) -> Path:
    """Add 1 to the bias of a token classifier with one label, so that its weights lie on both sides of 0."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    write_safetensors(folder, tensors)
    return folder


def write_safetensors(folder: Path, tensors: Mapping[str, Any], *, dtype: str = "float32", shards: int = 1) -> None:
    """Write arrays as model.safetensors, or as `shards` files and their index."""
    import torch
    from safetensors.torch import save_file

    ready = {k: torch.as_tensor(v).to(getattr(torch, dtype)).contiguous().clone() for k, v in tensors.items()}
    if shards == 1:
        save_file(ready, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(ready)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({k: ready[k] for k in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in ready.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, *, max_length: int = 8192) -> None:
    """Write a lower-casing WordPiece tokenizer in the files that a BERT checkpoint has."""
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    ids = {word: i for i, word in enumerate(words)}
    sep = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, sep]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[t], "content": t, **flags} for t in SPECIAL_TOKENS],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *second],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")},
        },
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": max_length, **special},
    )
    _write_json(folder / "special_tokens_map.json", special)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def write_xlmr_tokenizer(folder: Path, pieces: Sequence[str], *, max_length: int = 8192) -> None:
    """Write an XLM-R tokenizer in place of what is there: Unigram pieces, of which "\u2581" begins a word."""
    from transformers import XLMRobertaTokenizer

    special = ("<s>", "<pad>", "</s>", "<unk>")
    vocab = [*((token, 0.0) for token in special), *((piece, -1.0 - i / 100) for i, piece in enumerate(pieces))]
    vocab += [("<mask>", 0.0)]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    XLMRobertaTokenizer(vocab=vocab, model_max_length=max_length).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", {**config, "pad_token_id": 1})


def write_labels(folder: Path, labels: Sequence[str]) -> None:
    """Name the labels of a classifier that is there."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {str(i): label for i, label in enumerate(labels)}
    _write_json(
        folder / "config.json", {**config, "id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    )


def write_unigram_tokenizer(folder: Path, *, size: int = 256, max_length: int = 8192) -> None:
    """Write a cased Unigram tokenizer of `size` pieces, with the special tokens and ids of XLM-R: <pad> is 1."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?", "\u2581"]
    words = [f"\u2581w{i}" for i in range(size - len(special) - len(letters))]
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    begin, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    single, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "lstrip": token == "<mask>", **flags} for i, token in enumerate(special)
        ],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, single, end],
            "pair": [begin, single, end, end, second, end],
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", 0), ("</s>", 2))},
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [*((token, 0.0) for token in special), *((w, -5.0) for w in words), *((c, -9.0) for c in letters)],
            "byte_fallback": False,
        },
    }
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **tokens},
    )
    _write_json(folder / "special_tokens_map.json", tokens)
    (folder / "vocab.txt").unlink(missing_ok=True)


def _original_tensors(
    sizes: Mapping[str, int], *, task: str, num_labels: int, with_pooler: bool, seed: int
) -> dict[str, Any]:
    """Random weights under original names without prefix; scaled so that every one of them shows in the output."""
    import numpy as np

    rng = np.random.default_rng(seed)
    hidden, wide, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    tensors: dict[str, Any] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[name] = (rng.standard_normal((rows, columns)) * 1.2 / math.sqrt(columns)).astype(np.float32)

    def vector(name: str, size: int, mean: float = 0.0) -> None:
        tensors[name] = (mean + 0.1 * rng.standard_normal(size)).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        matrix(f"{name}.weight", rows, columns)
        vector(f"{name}.bias", rows)

    def norm(name: str) -> None:
        vector(f"{name}.weight", hidden, 1.0)
        vector(f"{name}.bias", hidden)

    tensors["embeddings.word_embeddings.weight"] = (0.5 * rng.standard_normal((vocab, hidden))).astype(np.float32)
    if sizes["type_vocab_size"]:
        matrix("embeddings.token_type_embeddings.weight", sizes["type_vocab_size"], hidden)
    norm("embeddings.LayerNorm")
    for i in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        linear(f"{layer}.attention.qkv_proj", 3 * hidden, hidden)
        linear(f"{layer}.attention.o_proj", hidden, hidden)
        norm(f"{layer}.attn_ln")
        matrix(f"{layer}.mlp.up_gate_proj.weight", 2 * wide, hidden)
        linear(f"{layer}.mlp.down_proj", hidden, wide)
        norm(f"{layer}.mlp_ln")
    if with_pooler or task == "classify":
        linear("pooler.dense", hidden, hidden)
    if task in ("classify", "token-classify"):
        linear("classifier", num_labels, hidden)
    if task == "fill-mask":
        linear("lm_head.dense", hidden, hidden)
        norm("lm_head.norm")
        vector("lm_head.decoder.bias", vocab)
    return tensors


def _unpacked_items(name: str, value: Any) -> list[tuple[str, Any]]:
    """Split qkv_proj in three, as originals with `pack_qkv: false` store it."""
    if ".qkv_proj." not in name:
        return [(name, value)]
    rows = value.shape[0] // 3
    return [(name.replace("qkv_proj", f"{p}_proj"), value[i * rows : (i + 1) * rows]) for i, p in enumerate("qkv")]


def _native_items(name: str, value: Any) -> list[tuple[str, Any]]:
    """Rename, and split the packed matrices, as transformers' own Gte modules name them."""
    name = name.replace("encoder.layer.", "layers.").replace(".attention.", ".self_attn.")
    name = name.replace(".attn_ln.", ".post_attention_layernorm.").replace(".mlp_ln.", ".post_mlp_layernorm.")
    name = name.replace("lm_head.norm.", "lm_head.layer_norm.")
    if ".up_gate_proj." in name:
        half = value.shape[0] // 2
        return [(name.replace("up_gate", "up"), value[:half]), (name.replace("up_gate", "gate"), value[half:])]
    return _unpacked_items(name, value)


def _common_config(sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        **sizes,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "classifier_dropout": None,
        "pad_token_id": 0,
    }


def _original_config(
    sizes: Mapping[str, int], rope_theta: float, rope_scaling: Mapping[str, Any] | None, pack_qkv: bool
) -> dict[str, Any]:
    remote = "Alibaba-NLP/new-impl--modeling.New"
    return {
        **_common_config(sizes),
        "layer_norm_type": "layer_norm",
        "position_embedding_type": "rope",
        "rope_theta": rope_theta,
        "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
        "pack_qkv": pack_qkv,
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
        "logn_attention_scale": False,
        "logn_attention_clip1": False,
        "model_type": "new",
        "auto_map": {
            "AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
            "AutoModel": f"{remote}Model",
            "AutoModelForMaskedLM": f"{remote}ForMaskedLM",
            "AutoModelForSequenceClassification": f"{remote}ForSequenceClassification",
        },
    }


def _native_config(
    sizes: Mapping[str, int], rope_theta: float, rope_scaling: Mapping[str, Any] | None
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(rope_theta)}
    if rope_scaling is not None:
        if rope_scaling.get("type") != "ntk" or "mixed_b" in rope_scaling:
            raise ValueError(f"native layout has no spelling for {rope_scaling}")
        head_size, factor = sizes["hidden_size"] // sizes["num_attention_heads"], rope_scaling["factor"]
        rope = {"rope_type": "linear", "rope_theta": rope_theta * factor, "factor": factor ** (2 / head_size)}
    return {**_common_config(sizes), "rope_parameters": rope, "tie_word_embeddings": True, "model_type": "gte"}


def _write_sentence_transformers(
    folder: Path, hidden_size: int, max_positions: int, pooling: str, normalize: bool
) -> None:
    kinds = ["", "1_Pooling", "2_Normalize"][: 3 if normalize else 2]
    names = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{names[i]}"}
        for i, path in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_positions, "do_lower_case": False})
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    others = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden_size,
            **{key: mode == pooling for mode, key in modes.items()},
            **dict.fromkeys(others, False),
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
