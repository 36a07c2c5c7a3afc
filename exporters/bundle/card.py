"""Writes the model card of a bundle: README.md, as the Hugging Face hub and people read it."""

import json
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from gte_deploy._version import __version__
from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.errors import BundleError
from gte_deploy.core.files import read_json_object, write_text, write_with
from gte_deploy.core.spec import TaskName
from gte_deploy.exporters.bundle.uses import MASK, PLACEHOLDER, first_steps, uses
from gte_deploy.exporters.targets.tensorrt.runtimes import NO_ENGINE
from gte_deploy.exporters.verification.checks import Check

CARD = "README.md"
REPORT = "report.json"
LEGAL_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
"""The names of a checkpoint's licence; a bundle keeps them."""

# What the hub calls a task. See https://huggingface.co/docs/hub/models-tasks.
_PIPELINES: Mapping[TaskName, str] = {
    "fill-mask": "fill-mask",
    "embed": "sentence-similarity",
    "classify": "text-classification",
    "token-classify": "token-classification",
}
_OTHER_PIPELINE = "feature-extraction"
# The fields of the checkpoint's own card that hold for the bundle, too.
_CARRIED_OVER = ("language", "license", "license_name", "license_link", "datasets")


def write_card(
    folder: Path, described: Manifest, parity: Mapping[str, Any], *, checkpoint: Path, mask_token: str | None
) -> None:
    """Write README.md into the folder of a bundle, and the checkpoint's licence beside it.

    Args:
        folder: the folder of the bundle, with its config.json.
        described: its manifest, without the list of files.
        parity: the comparison with PyTorch and with the checkpoint's own library, as in `ParityReport.to_json`.
        checkpoint: the folder of the checkpoint; its card states the licence and the languages.
        mask_token: the mask of its tokenizer, for the examples; None if it has none.
    """
    for name in LEGAL_FILES:
        if (checkpoint / name).is_file():
            write_with(folder / name, partial(shutil.copyfile, checkpoint / name))
    write_text(folder / CARD, _card_of(folder, described, parity, own_metadata(checkpoint), mask_token))


def adopted_card(folder: Path, described: Manifest, mask_token: str | None) -> str:
    """Return the card of a bundle that got an engine after its export.

    The comparison is that of the export, from report.json; licence and languages are those of the bundle's own card.

    Args:
        folder: the folder of the bundle, with its report.json and earlier README.md.
        described: its manifest, with the new engine.
        mask_token: the mask of its tokenizer; None if it has none.

    Raises:
        BundleError: report.json is not the report of an export.
    """
    report = read_json_object(folder / REPORT, error=BundleError, advice="Export the bundle again.")
    try:
        parity = report["parity"]
        caveats = [line for line in parity["not_proven"] if not line.startswith(NO_ENGINE)]
        return _card_of(folder, described, {**parity, "not_proven": caveats}, own_metadata(folder), mask_token)
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / REPORT} is not the report of an export ({error!r}). Export it again.") from error


def _card_of(
    folder: Path, described: Manifest, parity: Mapping[str, Any], metadata: Mapping[str, Any], mask_token: str | None
) -> str:
    config = read_json_object(folder / "config.json", error=BundleError, advice="Export the bundle again.")
    text = card(described, parity, metadata, model_type=str(config.get("model_type")))
    return text.replace(MASK, mask_token or MASK)


def own_metadata(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint's own card states, of the fields that hold for a bundle; {} without a readable card."""
    try:
        found = metadata_load(checkpoint / CARD) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # no card, or one that people wrote by hand
        return {}
    return {name: found[name] for name in _CARRIED_OVER if found.get(name)}


def card(
    described: Manifest, parity: Mapping[str, Any], metadata: Mapping[str, Any], *, model_type: str = "gte"
) -> str:
    """Return the text of README.md: the metadata of the hub, and what the bundle is, for people.

    Args:
        described: the manifest of the bundle.
        parity: the comparison, as in `ParityReport.to_json`.
        metadata: what the checkpoint's own card states; see `own_metadata`.
        model_type: that of config.json.
    """
    spec, source = described.spec, described.source
    tags = ["gte-deploy", *(("onnx",) if described.graphs else ()), *_tags(described)]
    data = ModelCardData(
        library_name="gte-deploy",
        pipeline_tag=_pipeline(described),
        tags=tags,
        # Only the hub's ids, not the names of folders.
        base_model=source["name"] if source["name"].count("/") == 1 else None,
        base_model_relation="quantized" if described.precision.startswith(("int", "fp8")) else None,
        **metadata,
    )
    sections = [
        f"# {source['name'].rpartition('/')[2]}: {spec.task}, {described.precision}",
        _introduction(described),
        _missed(described),
        "## Use",
        first_steps(described),
        PLACEHOLDER,
        *(f"{use.title}:\n\n```{use.language}\n{use.text}\n```" for use in uses(described, model_type)),
        "## Agreement with PyTorch",
        _agreement(parity),
        "## Limits",
        _limits(described, parity),
        "## Source and licence",
        _source(described, metadata),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"))


def _pipeline(described: Manifest) -> str:
    if described.spec.task == "classify" and described.spec.num_labels == 1:
        return "text-ranking"
    return _PIPELINES.get(described.spec.task, _OTHER_PIPELINE)


def _tags(described: Manifest) -> list[str]:
    tags = [engine for engine in ("openvino", "tensorrt") if engine in described.graphs]
    if described.plan is not None and "tensorrt" not in tags:
        tags.append("tensorrt")
    return [*tags, *(("sentence-transformers",) if described.spec.task == "embed" else ())]


def _introduction(described: Manifest) -> str:
    spec, source = described.spec, described.source
    revision = f" at revision `{source['revision']}`" if "revision" in source else ""
    version = described.versions.get("gte-deploy", __version__)
    engines = " and ".join([*described.graphs, *(("a TensorRT engine",) if described.plan else ())])
    return (
        f"A bundle of `{source['name']}`{revision} for {spec.task}, in {described.precision}, for {engines}. "
        f"gte-export of gte-deploy {version} wrote it and compared its answers with PyTorch's. It holds no code "
        "and no pickles; `manifest.json` lists the size and sha256 of every file."
    )


def _missed(described: Manifest) -> str:
    if not described.missed_bounds:
        return ""
    listed = "\n".join(f"- {line}" for line in described.missed_bounds)
    return f"**This bundle misses its bounds**: it is less accurate than it should be.\n\n{listed}"


def _agreement(parity: Mapping[str, Any]) -> str:
    header = "| engine | batches | largest difference | relative | lowest cosine | mean cosine | verdict |"
    rows = [header, "|---|---|---|---|---|---|---|", *map(_row, parity["engines"])]
    facts = [f"- {Check.from_json(check).line}" for check in parity["checks"]]
    return "\n".join([*rows, "", *facts, "- `report.html` has every batch, the bounds and the machine."])


def _row(engine: Mapping[str, Any]) -> str:
    # Older reports have no title.
    name = engine.get("title") or f"{engine['engine']} {engine['compute']}{' (emulated)' if engine['emulated'] else ''}"
    optional = engine.get("optional", False)  # older reports do not have it
    verdict = "passed" if engine["passed"] else "missed, and not needed" if optional else "**missed**"
    largest, relative, least, mean = (
        math.nan if engine[key] is None else engine[key] for key in ("max_abs", "max_rel", "cosine_min", "cosine_mean")
    )
    return (
        f"| {name} | {len(engine['cases'])} | {largest:.1e} | {relative:.1e} | {least:.7f} | {mean:.7f} | {verdict} |"
    )


def _limits(described: Manifest, parity: Mapping[str, Any]) -> str:
    spec = described.spec
    lines = [
        f"At most {spec.max_length:,} tokens a text. A longer text is refused, or cut on request.",
        "The bundle answers as its checkpoint does; it shares its languages, subjects and biases.",
    ]
    if described.target != "cpu":
        lines.append(f"The graph for ONNX Runtime is for {described.target}.")
    if described.plan is not None:
        lines += [*described.plan.describe(), *described.plan.caveats]
    if spec.prompts:
        prompts = ", ".join(f"`{name}`: {json.dumps(text, ensure_ascii=False)}" for name, text in spec.prompts.items())
        lines.append(f"Prompts: {prompts}; by default {spec.default_prompt_name or 'none'}.")
    return "\n".join(f"- {_lines(line)}" for line in dict.fromkeys([*lines, *parity["not_proven"]]))


def _lines(text: str) -> str:
    """Return a sentence of several lines as a point of a list; lines that do not begin like a sentence are commands."""
    first, *others = text.split("\n")
    return "\n\n".join([first, *(f"  `{line}`" if line[:1].islower() else f"  {line}" for line in others)])


def _source(described: Manifest, metadata: Mapping[str, Any]) -> str:
    source = described.source
    name = f"[{source['name']}](https://huggingface.co/{source['name']})" if "/" in source["name"] else source["name"]
    lines = [f"- Checkpoint: {name}"]
    lines += [f"- Revision: `{source['revision']}`"] if "revision" in source else []
    lines += [f"- sha256 of its weights: `{source['sha256']}`"] if "sha256" in source else []
    licence = metadata.get("license_name") or metadata.get("license")
    link = f" ({metadata['license_link']})" if "license_link" in metadata else ""
    return "\n".join(
        [*lines, f"- Licence: {licence}{link}" if licence else "- The checkpoint's card states no licence."]
    )
