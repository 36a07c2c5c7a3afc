"""Writes docs/reliability.md from the results of the reliability battery; tools/generate_docs.py calls it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NOTICE = "<!-- Written by tools/generate_docs.py from benchmarks/results/reliability: run `make docs`. -->"
# The results of each part -> its title. A part that was not run has no file, and no section.
_PARTS = {"quick": "In every run", "soak": "The long part"}
_INTRODUCTION = """# Reliability

What the tests try in order to break gte-deploy, how often they tried it, and how often it did not hold. They are the
*reliability battery*: `tests/reliability`, and the tests elsewhere with the marker `reliability`. Its quick part runs
with all other tests (`make test`). Its long part takes about a quarter of an hour on two cores. These commands run
both, and write this page anew:

<!-- not run: it takes a quarter of an hour -->
```console
$ python tests/support/environments.py fuzz    # once: atheris, for the fuzzers of the long part
$ results=benchmarks/results/reliability
$ pytest tests -n 2 --dist loadgroup -m "reliability and not slow" --battery-results $results/quick.json
$ pytest tests -n 2 --dist loadgroup -m soak --battery-results $results/soak.json
$ make docs
```

An attempt is one call, file, request or process, as the row says; a row that says no more counts its tests, and the
examples that hypothesis made for them. An attempt is **lost** if the promise of the row did not hold.
[Security](../SECURITY.md) says what is promised of the data of strangers, [processes](processes.md) what of threads and
processes.
"""


def reliability_page(folder: Path) -> str:
    """Return the whole of docs/reliability.md.

    Args:
        folder: the folder with the results: `quick.json` and `soak.json`, each as `--battery-results` writes it.
    """
    parts = [_NOTICE, "", _INTRODUCTION]
    for name, title in _PARTS.items():
        if (file := folder / f"{name}.json").is_file():
            parts += [f"## {title}\n", *_section(json.loads(file.read_text(encoding="utf-8"))), ""]
    return "\n".join(parts)


def _section(result: dict[str, Any]) -> Iterator[str]:
    rows = result["rows"]
    lost, tried = (sum(row[name] for row in rows) for name in ("lost", "attempts"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield (
        f"{tried:,} attempts, {lost:,} lost: {result['date']}, {result['minutes']:.0f} minutes on {result['cpu']} "
        f"({result['cpus']} CPUs); {versions}. The command was `{result['command']}`.\n"
    )
    if result["interrupted"]:
        yield "This run was interrupted: the table has only the tests that had run by then.\n"
    yield "| what was tried, or what holds | attempts | lost | tests |\n|---|---|---|---|"
    for row in rows:
        kind = row["kind"].replace("|", "\\|")
        yield f"| {kind} | {row['attempts']:,} | {row['lost']:,} | `{row['source']}` |"
    if result["skipped"]:
        yield "\nNot run there:\n"
        for row in result["skipped"]:
            yield f"- {row['tests']} of `{row['source']}`: {row['reason']}"
