"""A tiny random masked-LM checkpoint of each family that the package registers."""

from __future__ import annotations

from pathlib import Path

from alibi_checkpoints import JINA, MOSAIC, make_alibi_checkpoint
from factories import SPELLING, make_checkpoint
from family_checkpoints import PREFIXES, make_family_checkpoint

TRANSFORMERS_KINDS = ("gte", *PREFIXES)
"""Values of `model_type` whose checkpoints transformers loads by itself."""
KINDS = ("new", *TRANSFORMERS_KINDS, JINA, MOSAIC)


def make_masked_lm(folder: Path, kind: str) -> Path:
    """Write a masked-LM checkpoint of `kind`, with a tokenizer that knows the words of `factories.SPELLING`."""
    if kind in ("new", "gte"):
        layout = "original" if kind == "new" else "native"
        return make_checkpoint(folder, layout=layout, vocab=SPELLING, max_positions=64, type_vocab_size=2)
    if kind in (JINA, MOSAIC):
        return make_alibi_checkpoint(folder, kind)
    return make_family_checkpoint(folder, kind)
