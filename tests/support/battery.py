"""Counts what the reliability battery tries and loses, for docs/reliability.md.

    pytest tests -m reliability --battery-results FILE

The battery is every test with the marker `reliability`, which those of `tests/reliability` have without saying so. A
test counts as one attempt at what the docstring of its module says, and one of hypothesis as so many as there were
examples. A test that tries several things says how often itself, with the fixture `attempts`.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

MARKER, OPTION = "reliability", "--battery-results"
Attempts = Callable[..., None]


@dataclasses.dataclass
class Row:
    """What one file of tests tried of one kind."""

    source: str
    kind: str
    tests: int = 0
    attempts: int = 0
    lost: int = 0
    seconds: float = 0.0


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> Attempts:
    """`attempts(kind, number, lost=0)`: the test tried this so often, and so often the promise did not hold.

    A test that fails has lost one attempt without saying so.
    """

    def count(kind: str, number: int, lost: int = 0) -> None:
        request.node.user_properties.append(("attempts", (kind, number, lost)))

    return count


@functools.cache
def kind_of(file: Path) -> str:
    """The first sentence of a module's docstring, without the full stop."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem
    return text.partition("\n\n")[0].replace("\n", " ").removesuffix(".")


def counted(item: pytest.Item, report: pytest.TestReport) -> list[tuple[str, int, int]]:
    """What a test tried: each kind, how often, and how often in vain."""
    found = [value for name, value in item.user_properties if name == "attempts"]
    if not found:
        examples = re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", ""))
        found = [(kind_of(item.path), max(1, sum(map(int, examples))), 0)]
    if report.failed and not any(lost for _, _, lost in found):
        kind, number, _ = found[0]
        found[0] = (kind, number, 1)
    return found


class Battery:
    """Collects what the tests of a run tried, in every worker of pytest-xdist, and writes it at the end."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config, self._file = config, file
        self._rows: dict[tuple[str, str], Row] = {}
        self._skipped: dict[tuple[str, str], int] = {}
        self._started = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if item.get_closest_marker(MARKER) and (report.when == "call" or not report.passed):
            source = item.path.relative_to(item.config.rootpath).as_posix()
            report.user_properties.append(("battery", (source, counted(item, report))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name != "battery":
                continue
            source, counts = value
            if report.skipped:
                assert isinstance(report.longrepr, tuple)
                key = source, report.longrepr[2].removeprefix("Skipped: ")
                self._skipped[key] = self._skipped.get(key, 0) + 1
                continue
            for number, (kind, tried, lost) in enumerate(counts):
                row = self._rows.setdefault((source, kind), Row(source, kind))
                row.tests += 1
                row.attempts += tried
                row.lost += lost
                row.seconds += report.duration if number == 0 else 0

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if hasattr(self._config, "workerinput"):
            return
        from gte_deploy.backends.picks import cpu_model, engine_versions
        from gte_deploy.core.cpus import available_cpus
        from gte_deploy.core.files import write_text

        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": shlex.join(["pytest", *map(str, self._config.invocation_params.args)]),
            "cpu": cpu_model(),
            "cpus": available_cpus(),
            "versions": {"python": platform.python_version(), **engine_versions()},
            "interrupted": exitstatus == pytest.ExitCode.INTERRUPTED,
            "minutes": round((time.monotonic() - self._started) / 60, 1),
            "rows": [
                {**dataclasses.asdict(row), "seconds": round(row.seconds, 1)} for _, row in sorted(self._rows.items())
            ],
            "skipped": [
                {"source": source, "reason": reason, "tests": tests}
                for (source, reason), tests in sorted(self._skipped.items())
            ],
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps(result, indent=2) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="FILE", help="write what the reliability battery tried and lost into this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}: the reliability battery: all of tests/reliability, and more")
    if file := config.getoption(OPTION):
        config.pluginmanager.register(Battery(config, Path(os.path.abspath(file))), "battery")
