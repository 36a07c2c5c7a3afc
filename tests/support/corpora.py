"""Token corpora written by hand: no line of the package under test takes part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def write_corpus(
    folder: Path, documents: Mapping[str, Sequence[np.ndarray]] | Sequence[np.ndarray], *, vocab_size: int = 256
) -> Path:
    """Write documents of ids, a list or a dict by language, in the format of a token corpus: a shard per language."""
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


def write_empty_corpus(folder: Path, lengths: np.ndarray) -> Path:
    """Write a corpus of one shard whose tokens are a hole of zeros: many documents that take no room on the disk."""
    write_corpus(folder, [np.array([5])])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    (folder / "shard-00000.offsets").write_bytes(offsets.tobytes())
    with (folder / "shard-00000.tokens").open("wb") as file:
        file.truncate(2 * int(offsets[-1]))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0].update(documents=len(lengths), tokens=int(offsets[-1]))
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def random_documents(lengths: Sequence[int], *, vocab_size: int = 256, seed: int = 0) -> list[np.ndarray]:
    """One array of ordinary ids per length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab_size, int(length)) for length in lengths]
