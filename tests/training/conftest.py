"""A token corpus prepared from text, a tiny architecture, and recipes over them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from factories import write_tokenizer


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    write_tokenizer(folder / "tokenizer")
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


@pytest.fixture(scope="module")
def without_plots() -> Iterator[None]:
    """A plot takes longer than a run here; tests/training/test_train.py looks at one."""
    from gte_deploy.training import train as train_module

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_module, "plot_run", lambda folder: None)
        yield
