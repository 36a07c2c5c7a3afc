"""Tells whether two tokenizers give the same token ids, by a hash of their files."""

import hashlib
import json
from pathlib import Path

from gte_deploy.core.files import read_json_object
from gte_deploy.text.tokenization import TextTokenizer

# Parts that do not change token ids: `TextTokenizer` switches the first two off, and the last is for decoding.
_WITHOUT_EFFECT = ("truncation", "padding", "decoder")


def fingerprint(folder: Path, tokenizer: TextTokenizer) -> str:
    """Return a SHA-256 of everything that decides the token ids, for a tokenizer that was loaded from `folder`.

    Files with other spaces, another order of keys or another decoder have the same fingerprint.
    """
    data = {
        name: value
        for name, value in read_json_object(folder / "tokenizer.json").items()
        if name not in _WITHOUT_EFFECT
    }
    side = read_json_object(folder / "tokenizer_config.json").get("truncation_side", "right")
    facts = [data, tokenizer.pad_token_id, tokenizer.mask_token_id, side]
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
