"""The table by which a ChunkIndex finds its chunks, and the files in which the ranks of a run share it.

The documents of each shard lie in blocks of 64. The table has two numbers for each block: how many chunks come before
it, and one bit for each of its documents, which says whether the document's last chunk stays. That is a quarter of a
byte for each document. The rest follows from the offsets of the corpus, which are mapped, and so shared anyway.

The table of a stage is two files: `chunks-KEY.npy`, which every rank maps, and `chunks-KEY.json`, which is written
after it and has its sha256. The key stands for everything that the table follows from.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.arrays import array_writer
from gte_deploy.core.errors import InputError
from gte_deploy.core.files import read_json_object, sha256_file, write_text, write_with

logger = logging.getLogger(__name__)

DOCUMENTS_PER_BLOCK = 64
"""Documents of a block: the bits of a number."""
TABLE_FORMAT = 1
_PREFIX = "chunks-"


@dataclass(frozen=True)
class ChunkTable:
    """Where the chunks of a corpus are.

    Args:
        first_chunk: `[blocks + 1]` int64, the chunks before each block, and their number.
        keeps: `[blocks]` uint64, bit i is 1 if the last chunk of document i of the block stays.
        tokens: `[languages]`, the tokens of the chunks of each language, with [CLS] and [SEP].
    """

    first_chunk: NDArray[np.int64]
    keeps: NDArray[np.uint64]
    tokens: NDArray[np.float64]

    @property
    def num_chunks(self) -> int:
        """The number of chunks."""
        return int(self.first_chunk[-1])


def num_blocks(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of blocks of shards that have so many documents, [shards]."""
    return -(-documents // DOCUMENTS_PER_BLOCK)


def pack_bits(keeps: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Pack one boolean for each document into one number for each block; document i of a block is bit i."""
    whole = np.zeros(-(-len(keeps) // DOCUMENTS_PER_BLOCK) * DOCUMENTS_PER_BLOCK, dtype=bool)
    whole[: len(keeps)] = keeps
    return np.packbits(whole, bitorder="little").view("<u8")


def unpack_bits(bits: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return the booleans of each block, [N, 64]."""
    octets = np.ascontiguousarray(bits, dtype="<u8").view(np.uint8).reshape(-1, DOCUMENTS_PER_BLOCK // 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def write_table(table: ChunkTable, folder: Path, key: str) -> None:
    """Write a table into `folder`, and remove the tables of other keys."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_tables(folder)
    rows = np.stack([table.first_chunk, np.append(table.keeps, np.uint64(0)).view(np.int64)])
    array = folder / f"{_PREFIX}{key}.npy"
    write_with(array, array_writer(rows))
    facts = {"sha256": sha256_file(array), "tokens": [int(count) for count in table.tokens]}
    write_text(_facts_file(folder, key), json.dumps(facts) + "\n")


def read_table(folder: Path, key: str, *, verify: bool) -> ChunkTable | None:
    """Map the table of a key; None if `folder` has none.

    Args:
        folder: the folder that `write_table` was given.
        key: stands for the corpus, the chunking and the seed of the table.
        verify: also read the whole file and compare its sha256.

    Raises:
        InputError: the files are damaged.
    """
    array, facts_file = folder / f"{_PREFIX}{key}.npy", _facts_file(folder, key)
    if not array.is_file() or not facts_file.is_file():
        return None
    facts = read_json_object(facts_file, error=InputError, advice="Remove it.")
    if verify and sha256_file(array) != facts.get("sha256"):
        raise InputError(f"{array} does not match its sha256 in {facts_file.name}: it was altered; remove it")
    try:
        rows = np.load(array, mmap_mode="r", allow_pickle=False)
        first_chunk, keeps = rows
        tokens = np.array(facts["tokens"], dtype=np.float64)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{array} is damaged ({error}): remove it") from error
    if rows.dtype != np.int64 or rows.ndim != 2:
        raise InputError(f"{array} holds {rows.dtype} {rows.shape}, expected int64 [2, blocks + 1]: remove it")
    return ChunkTable(first_chunk, keeps[:-1].view(np.uint64), tokens)


def remove_tables(folder: Path) -> None:
    """Remove all tables in a folder, and what a killed process left of one."""
    for pattern in (f"{_PREFIX}*.npy", f"{_PREFIX}*.json", f".{_PREFIX}*.tmp"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def _facts_file(folder: Path, key: str) -> Path:
    return folder / f"{_PREFIX}{key}.json"
