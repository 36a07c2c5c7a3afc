"""Writes docs/checkpoints-verified.md from the table of checkpoints, the recorded values and the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gte_deploy.exporters.published.recorded import RECORDED
from gte_deploy.exporters.published.results import PublishedResult, read_results
from gte_deploy.models.published import PUBLISHED, Published

NOT_RUN = "not run: nobody has run this yet"

_INTRODUCTION = """# Published checkpoints

Every published checkpoint that this toolkit should read, with what public sources say of its files and whether anybody
has verified it. A row without a result was never run: its facts are those of the sources in the
[last table](#sources), and its family is what this project expects. What no source says is empty.

Whoever has a network fills the rows:

<!-- not run: needs the hub -->
```console
$ gte-export verify-published --list
$ gte-export verify-published BAAI/bge-small-en-v1.5        # one model
$ gte-export verify-published --family gte --remove-downloads
```

The command downloads a checkpoint at the revision of the table (without one, at the head of its default branch), reads
it strictly, exports it, and compares the bundle three times: its numbers with PyTorch, its answers with the
checkpoint's own library, and some values with those that others recorded for the same weights. A model that fails does
not stop the others, and the next run goes on after the finished ones. Before the first download it says how much disk
it needs. Send the JSON files of its folder `published-results` as a pull request into `benchmarks/results/published`;
`make docs` then fills the rows.

- **verified**: all three comparisons hold. **differs**: one does not. **failed**: the checkpoint could not be had or
  read.
- Recorded values "of its conversion" stand in their source for another repository, with the same weights in the native
  layout; the table of [recorded values](#recorded-values) names it.
- Recorded values are judged in FP32 with the bounds of their source, and 1e-4 (absolute and relative) for the engine.
- `dtype` follows from the size of the weights and the number of parameters.

"""


def checkpoints_page(folder: Path) -> str:
    """Return the page, with the verdicts of the results in a folder."""
    results = read_results(folder)
    parts = [_INTRODUCTION, "## Checkpoints\n"]
    for family in dict.fromkeys(entry.family for entry in PUBLISHED.values()):
        entries = [entry for entry in PUBLISHED.values() if entry.family == family]
        parts += [f"### {family}\n", *_facts(entries, results), ""]
    parts += ["## Recorded values\n", *_values(), "", "## Sources\n", *_sources(), ""]
    return "\n".join(parts)


def _facts(entries: Sequence[Published], results: Mapping[str, Sequence[PublishedResult]]) -> list[str]:
    columns = (
        "checkpoint",
        "revision",
        "task",
        "weights",
        "tokens",
        "pooling",
        "licence",
        "recorded values",
        "verified",
    )
    lines = [_row(columns), _row(["---"] * len(columns))]
    for entry in entries:
        found = results.get(entry.id, ())
        verdict = "; ".join(map(_verdict, found)) or NOT_RUN
        cells = (
            f"[{entry.id}](https://huggingface.co/{entry.id})",
            f"`{entry.revision[:7]}`" if entry.revision else "",
            entry.task,
            _weights(entry),
            f"{entry.max_length:,}" if entry.max_length else "",
            entry.pooling or "",
            entry.license or "",
            _known(entry),
            verdict,
        )
        lines.append(_row(cells))
    notes = [f"- {entry.id}: {entry.note}" for entry in entries if entry.note]
    notes += [
        f"- {entry.id} has no tokenizer; that of {entry.tokenizer} is used." for entry in entries if entry.tokenizer
    ]
    prompts = [
        f"- {entry.id}: the prompts are "
        + ", ".join(f"{name} `{text!r}`" for name, text in entry.prompts.items())
        + "."
        for entry in entries
        if entry.prompts
    ]
    return [*lines, *([""] if notes or prompts else []), *notes, *prompts]


def _known(entry: Published) -> str:
    """Say how many recorded numbers there are, those for a conversion of the checkpoint apart from its own."""
    values = RECORDED.get(entry.id, ())
    own = sum(_count(each.values) for each in values if each.recorded_for is None)
    others = sum(_count(each.values) for each in values if each.recorded_for is not None)
    return " and ".join([*([str(own)] if own else []), *([f"{others} of its conversion"] if others else [])])


def _weights(entry: Published) -> str:
    parameters = "" if entry.parameters_millions is None else f"{entry.parameters_millions:g} M"
    size = "" if entry.weights_mib is None else f"{entry.weights_mib:,} MiB"
    return ", ".join(part for part in (parameters, size, entry.dtype or "", entry.layout or "") if part)


def _verdict(result: PublishedResult) -> str:
    agreed, known = result.agreed
    values = f", {agreed} of {known} recorded numbers" if known else ""
    version = result.versions.get("gte-deploy", "")
    return (
        f"**{result.verdict}** ({result.target}, {result.precision}): `{(result.commit or '-')[:7]}`{values}, "
        f"gte-deploy {version}, {result.date[:10]}"
    )


def _values() -> list[str]:
    lines = [_row(("checkpoint", "quantity", "numbers", "bound", "source")), _row(["---"] * 5)]
    for model, values in RECORDED.items():
        for each in values:
            count = _count(each.values)
            bound = "the same words" if each.quantity == "words" else f"{each.atol:g}"
            bound += f" + {each.rtol:g} · value" if each.rtol else ""
            source = f"{each.source}. {each.note}" if each.note else each.source
            name = model if each.recorded_for is None else f"{model}, as {each.recorded_for}"
            lines.append(_row((name, each.quantity, str(count), bound, source)))
    return lines


def _count(values: object) -> int:
    return sum(map(_count, values)) if isinstance(values, tuple) else 1


def _sources() -> list[str]:
    lines = [_row(("checkpoint", "source", "what it says")), _row(["---"] * 3)]
    for entry in PUBLISHED.values():
        lines += [_row((entry.id, source, said)) for source, said in entry.sources.items()]
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
