"""The measurement of domain adaptation: its text, its commands, and the whole of it in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gte_deploy.models import builtin_path
from loading import load_file

domain_adaptation = load_file(
    Path(__file__).resolve().parents[2] / "benchmarks" / "domain_adaptation.py", "domain_adaptation"
)

DICTD = r"""
Abjure \Ab*jure"\, v. t. [imp. & p. p. {Abjured}.] [L. abjurare to
   deny upon oath.]
   1. To renounce upon oath; to forswear; to disavow. To {abjure the
      realm}, is to swear to abandon it forever.
      [1913 Webster]

Abit \A*bit"\, 3d sing. pres.
   of {Abide}. [Obs.]

Ablactation \Ab`lac*ta"tion\ n.
   The weaning of a child from the breast, or of young beasts.
   [1913 Webster]
"""


def test_entries_are_sentences_without_pronunciations_and_references():
    first, second = domain_adaptation.entries(DICTD)  # "Abit" has fewer than eight words
    assert first == (
        "Abjure , v. t. 1. To renounce upon oath; to forswear; to disavow. To abjure the realm, is to swear to abandon "
        "it forever."
    )
    assert second == "Ablactation n. The weaning of a child from the breast, or of young beasts."


def test_documents_are_split_by_their_hash():
    text = "\n".join(
        f"Word{i} n. A definition of this word with a number {i} and {'more ' * (i % 40)}text.\n" for i in range(20_000)
    )
    parts = domain_adaptation.split(text)
    every = list(domain_adaptation.documents(text))
    assert not set(parts["train"]) & set(parts["held-out"])
    assert {*parts["train"], *parts["held-out"]} < set(every)
    assert all(len(document) >= 2_000 for document in every)
    kept = len(parts["train"]) + len(parts["held-out"])
    assert kept == pytest.approx(len(every) / 8, rel=0.3)
    assert len(parts["held-out"]) == pytest.approx(kept / 10, rel=0.6)


@pytest.mark.slow
def test_the_measurement_in_miniature(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Texts that are there are not downloaded; two steps of each run, a table, and a result with its commands."""
    entry = "A word that means a thing of the sea, and in old books a ship of war with many guns."
    for folder, held_out in (("domain", "held-out"), ("corpus", "heldout")):
        (tmp_path / folder).mkdir()
        for part, first in (("train", 0), (held_out, 1)):
            lines = [json.dumps({"text": f"{folder} {i} {entry} " * (1 + i % 3)}) for i in range(first, 60, 2)]
            (tmp_path / folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    sets = ["stages.0.steps=2", "stages.0.batch_size=2", "stages.0.max_length=64", "dtype=float32"]
    options = [word for each in sets for word in ("--set", each)]
    output = tmp_path / "result.json"
    assert domain_adaptation.main([str(tmp_path), *options, "--max-tokens", "300", "--output", str(output)]) == 0
    out = capfd.readouterr().out
    report = json.loads(output.read_text())
    assert out.count("$ gte-train run domain-adaptation") == 2 and len(report["commands"]) == 5
    models = [model["model"] for model in report["evaluation"]["models"]]
    assert models == [builtin_path().name.replace("_", "-"), "runs/no-replay", "runs/replay"]
    assert out.count("| domain |") == out.count("| general |") == 3
    assert output.with_suffix(".png").is_file()
