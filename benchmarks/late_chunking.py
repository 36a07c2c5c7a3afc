"""Measures what late chunking of a document costs, against encoding its chunks as texts of their own.

    python benchmarks/late_chunking.py                              # the built-in model on PyTorch
    python benchmarks/late_chunking.py --model my-bundle --tokens 1024 8192

The document is the text of docs/, cut to so many tokens; its chunks have --chunk tokens. The model has one thread.
Seconds are those of the processor, which other processes do not add to, and the least of several runs.

Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from side_by_side.report import table

import gte_deploy
from gte_deploy.backends.picks import cpu_model

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    arguments = _parse(argv)
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    rows = []
    with gte_deploy.load(arguments.model, num_threads=1) as model:
        for tokens in arguments.tokens:
            rule = gte_deploy.TokenChunks(arguments.chunk)
            whole = model.encode(text, chunks=gte_deploy.TokenChunks(tokens - 2), truncation=True, max_length=tokens)
            document = whole.texts[0]
            parts = model.encode(document, chunks=rule).texts
            together = least(lambda: model.encode(document, chunks=rule), arguments.runs)  # noqa: B023
            apart = least(lambda: model.encode(parts), arguments.runs)  # noqa: B023
            rows.append([f"{tokens:,}", str(len(parts)), f"{together:.2f}", f"{apart:.2f}", f"{together / apart:.2f}"])
        print(f"{cpu_model()}, {model.backend} {model.info()['precision']}, {model.name}")
    print(table(["tokens", "chunks", "late chunking, s", "chunks apart, s", "ratio"], rows))
    return 0


def least(call: Callable[[], object], runs: int) -> float:
    """Return the least processor time of a call, in seconds, after one call that warms up."""
    call()
    times = []
    for _ in range(runs):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL", help="as gte_deploy.load takes it (the built-in model)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], metavar="N")
    parser.add_argument("--chunk", type=int, default=256, metavar="N", help="tokens of a chunk (256)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs of each (3)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
