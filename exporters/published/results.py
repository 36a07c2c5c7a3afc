"""The results of `gte-export verify-published`: a JSON file for each model, from which the page of the docs is made."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gte_deploy.core.errors import InputError
from gte_deploy.core.files import read_json_object, write_text
from gte_deploy.core.formats import check_version
from gte_deploy.core.options import check_choice

FORMAT = 1
Verdict = Literal["verified", "differs", "failed"]
VERDICTS = ("verified", "differs", "failed")


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """What was found for one published checkpoint.

    Args:
        model: its hub id.
        revision: the revision that was asked for; None for the default branch.
        commit: the commit that was downloaded; None if the hub did not tell it.
        target, precision: of the export.
        verdict: "verified": the bundle keeps the bounds to PyTorch, answers as the checkpoint's own library, and gives
            all expected values. "differs": one of these does not hold. "failed": there was nothing to compare.
        date: UTC, in ISO format.
        versions: library -> version.
        machine: the CPU and the system.
        files: file of the checkpoint -> its size in bytes.
        bundle_bytes: size of the bundle; None if there was none.
        backend: the engine that gave the expected values.
        parity: the comparison with PyTorch, a row for each engine: its title and largest differences.
        checks: the checks of the export, one sentence for each.
        expected: the comparison with the values of others; see `comparison.Outcome`.
        error: why the verdict is not "verified", if no comparison says it.
    """

    model: str
    revision: str | None
    commit: str | None
    target: str
    precision: str
    verdict: Verdict
    date: str
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bundle_bytes: int | None = None
    backend: str | None = None
    parity: tuple[Mapping[str, Any], ...] = ()
    checks: tuple[str, ...] = ()
    expected: tuple[Mapping[str, Any], ...] = ()
    error: str | None = None

    @property
    def agreed(self) -> tuple[int, int]:
        """The numbers of expected values that agree, and of all; a whole comparison agrees or does not."""
        counts = [(row["count"], row["passed"]) for row in self.expected]
        return sum(count for count, passed in counts if passed), sum(count for count, _ in counts)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def result_file(folder: Path, model: str, target: str, precision: str) -> Path:
    """Return the path of a model's result in a folder of results."""
    return folder / f"{model.replace('/', '--')}.{target}-{precision}.json"


def write_result(folder: Path, result: PublishedResult) -> Path:
    """Write a result in place of an earlier one for the same model, target and precision; return its path."""
    file = result_file(folder, result.model, result.target, result.precision)
    write_text(file, json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
    return file


def read_result(file: Path) -> PublishedResult:
    """Read a result.

    Raises:
        InputError: the file is no result of this format.
    """
    data = dict(read_json_object(file, error=InputError, advice="Delete it."))
    names = {field.name for field in dataclasses.fields(PublishedResult)}
    check_version(file, data.pop("format", None), (FORMAT,), error=InputError, advice="Move it out of the folder.")
    if set(data) != names:
        raise InputError(f"{file} is no result of verify-published: move it out of the folder")
    check_choice(f"verdict of {file}", data["verdict"], VERDICTS)
    lists = {name: tuple(data[name]) for name in ("parity", "checks", "expected")}
    return PublishedResult(**{**data, **lists})


def read_results(folder: Path) -> dict[str, list[PublishedResult]]:
    """Read every result of a folder: hub id -> its results by target and precision. A missing folder has none."""
    found: dict[str, list[PublishedResult]] = {}
    for result in map(read_result, sorted(folder.glob("*.json"))):
        found.setdefault(result.model, []).append(result)
    return found


def summary(results: Iterable[PublishedResult]) -> str:
    """Format results as a table for people, and say what each failure was."""
    rows = list(results)
    width = max((len(row.model) for row in rows), default=5)
    lines = [f"{'model':<{width}}  {'commit':<7}  {'verdict':<8}  expected values"]
    for row in rows:
        agreed, known = row.agreed
        values = f"{agreed} of {known} agree" if known else "none known"
        lines.append(f"{row.model:<{width}}  {(row.commit or '-')[:7]:<7}  {row.verdict:<8}  {values}")
        wrong = [outcome for outcome in row.expected if not outcome["passed"]]
        lines += [f"  {_reason(outcome)}" for outcome in wrong]
        lines += [f"  {line}" for line in (row.error or "").splitlines()]
    counts = [f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in VERDICTS]
    return "\n".join([*lines, ", ".join(counts)])


def _reason(outcome: Mapping[str, Any]) -> str:
    found = outcome["error"]
    if found is None and outcome["largest"] is not None:
        found = f"differs by {outcome['largest']:.2g}, bound {outcome['bound']:.2g}"
    if found is None:
        found = f"the bundle gives {', '.join(map(str, outcome['found']))}"
    return f"{outcome['quantity']}: {found}; {outcome['source']}"
