"""Small retrieval sets in the files of MLDR and LongEmbed, with all fields that the published ones have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MLDR_CORPUS = [{"docid": f"doc-en-{i}", "text": f"text {i}"} for i in range(3)]
MLDR_TEST = [
    {
        "query_id": f"q-en-{i}",
        "query": f"question {i}",
        "positive_passages": [{"docid": f"doc-en-{i}", "text": f"text {i}"}],
        "negative_passages": [],
    }
    for i in range(2)
]
LENGTHS = (256, 512)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_mldr(folder: Path) -> Path:
    write_lines(folder / "mldr-v1.0-en/corpus.jsonl.gz", MLDR_CORPUS)
    write_lines(folder / "mldr-v1.0-en/test.jsonl.gz", MLDR_TEST)
    write_lines(folder / "mldr-v1.0-en/dev.jsonl.gz", MLDR_TEST[:1])
    return folder


def write_long_embed(folder: Path) -> Path:
    """qmsum without lengths; passkey with documents of two lengths, which have the same ids."""
    write_lines(folder / "qmsum/corpus.jsonl", [{"doc_id": f"d{i}", "text": f"meeting {i}"} for i in range(3)])
    write_lines(folder / "qmsum/queries.jsonl", [{"qid": f"q{i}", "text": f"summary {i}"} for i in range(2)])
    write_lines(folder / "qmsum/qrels.jsonl", [{"qid": f"q{i}", "doc_id": f"d{i}"} for i in range(2)])
    places = [(length, i) for length in LENGTHS for i in range(4)]
    write_lines(
        folder / "passkey/corpus.jsonl",
        [
            {"doc_id": f"d{i}", "text": f"the pass key of n{i} is {length}", "context_length": length}
            for length, i in places
        ],
    )
    asked = [(length, i) for length, i in places if i < 2]
    write_lines(
        folder / "passkey/queries.jsonl",
        [{"qid": f"q{i}", "text": f"what is the pass key of n{i}?", "context_length": length} for length, i in asked],
    )
    write_lines(
        folder / "passkey/qrels.jsonl",
        [{"qid": f"q{i}", "doc_id": f"d{i}", "context_length": length} for length, i in asked],
    )
    return folder
