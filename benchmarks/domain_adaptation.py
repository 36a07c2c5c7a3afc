"""Measures what domain adaptation gains, and what it costs on general text, with and without replay.

    python benchmarks/domain_adaptation.py WORK
    python benchmarks/domain_adaptation.py WORK --set stages.0.steps=100 --set stages.0.batch_size=8     # a small CPU

The built-in model goes on with entries of an English dictionary of 1913, which it has never seen: once on them alone
("no-replay"), once with general text mixed in, as the recipe `domain-adaptation` says ("replay"). `gte-train evaluate`
then compares the three models on held-out entries and on held-out general text. General text is that of
tools/tiny_model/corpus.py; the built-in model was trained on it, except for the held-out documents.

The script needs a Debian machine on which `apt-get update` was run. What lies in WORK is not made again, and a run that
was stopped continues. Tables and commands go to stdout; the result goes to benchmarks/results/ with date, hardware,
versions and commands.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.core.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "gte-en-mlm-tiny"
PACKAGE = "dict-gcide"  # the Collaborative International Dictionary of English; GPL-2 or later
DICTIONARY = "./usr/share/dictd/gcide.dict.dz"
DOCUMENT_CHARACTERS = 2_000
LEAST_WORDS = 8
KEPT_ONE_IN = 8  # about 900,000 tokens
HELD_OUT_ONE_IN = 10
WEIGHTS = {"no-replay": (1.0, 0.0), "replay": (0.7, 0.3)}
_NOT_PROSE = re.compile(r"\\[^\\\n]{0,80}\\|\[[^\[\]]{0,200}\]|[{}]")  # pronunciations, etymologies, cross references


def entries(text: str) -> Iterator[str]:
    """Yield the entries of a dictd database as plain sentences: a headword at the margin begins each of them."""
    for block in re.split(r"\n(?=\S)", text):
        plain = " ".join(_NOT_PROSE.sub("", block).split())
        if len(plain.split()) >= LEAST_WORDS:
            yield plain


def documents(text: str) -> Iterator[str]:
    """Join neighbouring entries into documents of some 2,000 characters; what is left at the end is dropped."""
    held: list[str] = []
    for entry in entries(text):
        held.append(entry)
        if sum(map(len, held)) >= DOCUMENT_CHARACTERS:
            yield "\n".join(held)
            held = []


def split(text: str) -> dict[str, list[str]]:
    """Return one document in eight, as "train" and "held-out"; the hash of a document decides."""
    chosen: dict[str, list[str]] = {"train": [], "held-out": []}
    for document in documents(text):
        number = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")
        if number % KEPT_ONE_IN == 0:
            part = "held-out" if number // KEPT_ONE_IN % HELD_OUT_ONE_IN == 0 else "train"
            chosen[part].append(document)
    return chosen


def dictionary(folder: Path) -> str:
    """Download the dictionary's package into `folder`, and return its text.

    Raises:
        CalledProcessError: apt-get or dpkg-deb failed.
    """
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
    (archive,) = folder.glob(f"{PACKAGE}_*.deb")
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile(DICTIONARY)
        assert member is not None  # the package has this file
        return gzip.decompress(member.read()).decode("utf-8", errors="replace")


def gather(work: Path) -> None:
    """Write the text: `domain/` and `corpus/` in `work`, each with documents to train on and held-out ones."""
    if not (work / "corpus" / "heldout.jsonl").is_file():
        script = ROOT / "tools" / "tiny_model" / "corpus.py"
        subprocess.run([sys.executable, script, work / "corpus"], check=True)
    folder = work / "domain"
    if (folder / "held-out.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part, texts in split(dictionary(folder)).items():
        write_text(folder / f"{part}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))


def commands(overrides: Sequence[str], *, max_tokens: int) -> list[list[str]]:
    """The commands of `gte-train` that make the measurement in the folder of the text, in order."""
    sets = [word for override in overrides for word in ("--set", override)]
    prepare = ["prepare", "domain=domain/train.jsonl", "general=corpus/train.jsonl", "-o", "tokens"]
    hold_out = ["prepare", "domain=domain/held-out.jsonl", "general=corpus/heldout.jsonl", "-o", "held-out-tokens"]
    runs = [
        ["run", "domain-adaptation", "--data", "tokens", "-o", f"runs/{name}", *sets]
        + [f"--set=stages.0.source_weights.domain={domain}", f"--set=stages.0.source_weights.general={general}"]
        for name, (domain, general) in WEIGHTS.items()
    ]
    models = [MODEL, *(f"runs/{name}" for name in WEIGHTS)]
    evaluate = ["evaluate", *models, "--data", "held-out-tokens", "-o", "evaluation", f"--max-tokens={max_tokens}"]
    return [prepare, hold_out, *runs, evaluate]


def measure(work: Path, planned: Sequence[Sequence[str]]) -> None:
    """Run the commands in `work`; corpora that are there already are not prepared again.

    Raises:
        CalledProcessError: a command failed.
    """
    for arguments in planned:
        if arguments[0] == "prepare" and (work / arguments[-1] / "index.json").is_file():
            continue
        print("$", shlex.join(["gte-train", *arguments]), flush=True)
        subprocess.run([sys.executable, "-m", "gte_deploy.training.cli", *arguments], cwd=work, check=True)


def markdown(evaluation: dict[str, Any]) -> str:
    """The scores as a table for a page."""
    lines = ["| model | text | hidden tokens | loss (nats) | top-1 | top-5 |", "|---|---|---|---|---|---|"]
    for model in evaluation["models"]:
        for score in model["scores"]:
            if score["source"] != "all":
                lines.append(
                    f"| {Path(model['model']).name} | {score['source']} | {score['masked_tokens']:,} "
                    f"| {score['loss']:.3f} ± {score['loss_error']:.3f} "
                    f"| {score['top1']:.1%} ± {100 * score['top1_error']:.1f} | {score['top5']:.1%} |"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what domain adaptation gains and costs.")
    parser.add_argument("work", type=Path, help="folder for text, corpora and runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--max-tokens", type=int, default=200_000, help="held-out tokens of each source, at most")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/DATE-domain-adaptation.json"
    )
    arguments = parser.parse_args(argv)
    gather(arguments.work)
    planned = commands(arguments.set, max_tokens=arguments.max_tokens)
    measure(arguments.work, planned)
    evaluation = json.loads((arguments.work / "evaluation" / "evaluation.json").read_text("utf-8"))
    today = datetime.date.today().isoformat()
    report = {
        "date": today,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commands": [shlex.join(["gte-train", *each]) for each in planned],
        "hardware": {"cpu": cpu_model(), "cpus": os.cpu_count(), "cuda": torch.cuda.is_available()},
        "versions": {
            "gte-deploy": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "evaluation": evaluation,
    }
    output = arguments.output or RESULTS / f"{today}-domain-adaptation.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(report, indent=2) + "\n")
    shutil.copyfile(arguments.work / "evaluation" / "evaluation.png", output.with_suffix(".png"))
    print(markdown(evaluation))
    print(f"written to {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
