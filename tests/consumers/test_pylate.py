"""PyLate writes a multi-vector model and is its judge: queries and documents, on PyTorch and from the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gte_deploy
from family_checkpoints import make_family_checkpoint

pytestmark = pytest.mark.consumers

TEXTS = ("the river, and the city?", "a", "the old city is old, and the river is the city! " * 3, "is . the")
KNOWN = [".", ",", "!", "?"]  # PyLate takes words that are no tokens for [UNK], and skips that
LENGTHS = {"embedding_size": 8, "query_length": 24, "document_length": 40}
# float32 sums in another order.
TOLERANCE = 2e-5


@pytest.fixture
def environment() -> str:
    """See the fixture of this name in conftest.py."""
    return "pylate"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"skiplist_words": KNOWN}),
        ("bert", {"skiplist_words": ["the"], "attend_to_expansion_tokens": True, "query_prefix": "old"}),
        ("xlm-roberta", {"skiplist_words": KNOWN}),
        ("roberta", {"skiplist_words": KNOWN, "do_query_expansion": False}),
    ],
)
def test_a_model_of_pylate(
    kind: str,
    settings: dict[str, Any],
    tmp_path: Path,
    run_script: Callable[..., Path],
    bundle_of: Callable[..., Path],
) -> None:
    encoder, saved = make_family_checkpoint(tmp_path / "encoder", kind, "embed"), tmp_path / "saved"
    answers = run_script("late_pylate.py", encoder, saved, json.dumps({**LENGTHS, **settings}), *TEXTS)
    wanted = list(np.load(answers / "answers.npz").values())
    for path, backend in ((saved, "torch"), (bundle_of(saved), "onnx")):
        with gte_deploy.load(path, backend=backend) as model:
            found = [
                each
                for is_query in (True, False)
                for each in model.encode_multi_vector(TEXTS, is_query=is_query, truncation=True)
            ]
        assert [each.shape for each in found] == [each.shape for each in wanted]
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
