"""The acceptance table of docs/training.md: each line names tests, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("\n## Acceptance\n")[2]


def rows() -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] != "check"]


def test_each_line_has_a_bound_and_names_tests_that_exist():
    missing = []
    for check, bound, *tests in rows():
        assert bound and len(tests) == 1, check
        named = re.findall(r"`(tests/[^`:]+)(?:::([^`]+))?`", tests[0])
        assert named, f"{check!r} names no test"
        for file, test in named:
            path = ROOT / file
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if not text or (test and f"\ndef {test}(" not in text):
                missing.append(f"{file}::{test}")
    assert missing == []


def test_every_part_of_the_training_is_there():
    parts = re.findall(r"^\*\*(.+)\*\*$", TEXT, flags=re.MULTILINE)
    assert parts == ["Pretraining", "Continuing and rescuing a run", "Fine-tuning and conversion", "Evaluation"]
    assert len(rows()) > 50
