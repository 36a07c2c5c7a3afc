"""Token corpora written by hand or prepared from text, a tiny architecture, and recipes over them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory, factories: ModuleType) -> Path:
    """150 documents of 1 to 150 words from a vocabulary of 256, with the tokenizer inside. Read only."""
    from gte_deploy.training.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    lengths = [1, *(rng.choice([2, 5, 12, 25, 25, 60, 150]) for _ in range(149))]
    words = [f"w{i}" for i in range(5, 256)]
    shares = [1 / rank for rank in range(1, len(words) + 1)]  # as in a language, so that there is something to learn
    documents = [" ".join(rng.choices(words, shares, k=length)) for length in lengths]
    (folder / "text.txt").write_text("\n\n".join(documents))
    (folder / "tokenizer").mkdir()
    factories.write_tokenizer(folder / "tokenizer")
    prepare([str(folder / "text.txt")], folder / "data", tokenizer=folder / "tokenizer")
    (folder / "tokenizer").rename(folder / "data" / "tokenizer")
    return folder / "data"


@pytest.fixture(scope="session")
def make_architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_architecture(**config) -> Path`: a folder with config.json alone, so that training starts at random."""

    def make(**changes: Any) -> Path:
        config = {
            "model_type": "gte",
            "architectures": ["GteForMaskedLM"],
            "vocab_size": 256,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 128,
            "type_vocab_size": 2,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        }
        folder = tmp_path_factory.mktemp("architecture")
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return make


@pytest.fixture(scope="session")
def make_recipe(make_architecture: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """`make_recipe(steps=(6, 6), dropout=0.1, stage={}, **recipe) -> dict`, as YAML would give it."""

    def make(
        *, steps: tuple[int, ...] = (6, 6), dropout: float = 0.1, stage: dict[str, Any] | None = None, **changes: Any
    ) -> dict[str, Any]:
        lengths, bases = (32, 64, 128), (10_000, 10_000, 160_000)
        stages = [
            {
                "name": f"mlm-{lengths[i]}",
                "max_length": lengths[i],
                "rope_theta": bases[i + 3 - len(steps)],
                "steps": steps[i],
                "batch_size": 8,
                "learning_rate": 1e-3,
                **(stage or {}),
            }
            for i in range(len(steps))
        ]
        recipe = {
            "name": "test",
            "model": str(make_architecture(hidden_dropout_prob=dropout)),
            "stages": stages,
            "seed": 3,
            "dtype": "float32",
            "tokens_per_micro_batch": 128,
            "checkpoint_every": 2,
            "log_every": 1,
        }
        return {**recipe, **changes}

    return make


def _write_corpus(
    folder: Path, documents: Mapping[str, Sequence[np.ndarray]] | Sequence[np.ndarray], *, vocab_size: int = 256
) -> Path:
    folder.mkdir(parents=True)
    per_language = documents if isinstance(documents, Mapping) else {"": documents}
    shards = []
    for number, (language, texts) in enumerate(per_language.items()):
        name = f"shard-{number:05d}"
        tokens = np.concatenate(texts).astype("<u2" if vocab_size < 65_536 else "<u4").tobytes()
        offsets = np.cumsum([0, *map(len, texts)]).astype("<i8").tobytes()
        (folder / f"{name}.tokens").write_bytes(tokens)
        (folder / f"{name}.offsets").write_bytes(offsets)
        shards.append(
            {
                "name": name,
                "language": language,
                "documents": len(texts),
                "tokens": sum(map(len, texts)),
                "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
                "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
            }
        )
    index = {
        "format": "gte-token-corpus",
        "version": 1,
        "vocabulary": {
            "size": vocab_size,
            **{"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4, "special_ids": [0, 1, 2, 3, 4]},
        },
        "languages": list(per_language),
        "counts": {},
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def write_corpus() -> Callable[..., Path]:
    """`write_corpus(folder, documents, *, vocab_size=256) -> Path`: documents of ids, a list or a dict by language."""
    return _write_corpus


@pytest.fixture(scope="session")
def random_documents() -> Callable[..., list[np.ndarray]]:
    """`random_documents(lengths, *, vocab_size=256, seed=0)`: one array of ordinary ids per length."""

    def make(lengths: Sequence[int], *, vocab_size: int = 256, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(5, vocab_size, int(length)) for length in lengths]

    return make
