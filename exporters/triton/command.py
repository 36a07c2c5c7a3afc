"""What `gte-export` has for Triton: its options, the export, and the check of a repository."""

import argparse
import json
from pathlib import Path
from typing import Any

from gte_deploy.exit_codes import FAILURE, OK
from gte_deploy.exporters.export import Progress
from gte_deploy.exporters.triton_repository import ACCELERATORS, RepositoryResult, export_repository

# Name of the option -> of the argument of `export_repository`.
_OPTIONS = {
    "engine": "engine",
    "accelerator": "accelerator",
    "max_batch_size": "max_batch_size",
    "max_queue_size": "max_queue_size",
    "queue_timeout": "queue_timeout_s",
    "threads": "threads",
    "response_cache": "response_cache",
    "model_version": "model_version",
}


def add_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options that only `--format triton` takes; where they are not given, they are not in the namespace."""
    add, suppress = group.add_argument, argparse.SUPPRESS
    add("--engine", metavar="BUNDLE", default=suppress, help="serve this bundle's TensorRT plan, in place of MODEL")
    add("--accelerator", choices=ACCELERATORS, default=suppress, help="of ONNX Runtime on a GPU (default: cuda)")
    add("--max-batch-size", type=int, metavar="ROWS", default=suppress, help="default: 32 on a GPU, 8 on a CPU")
    add("--max-queue-size", type=int, metavar="REQUESTS", default=suppress, help="refuse more (default: no limit)")
    add("--queue-timeout", type=float, metavar="SECONDS", default=suppress, help="in each queue (default: no limit)")
    add("--threads", type=int, default=suppress, help="of the encoder on a CPU (default: the CPUs here)")
    add("--response-cache", action="store_true", default=suppress, help="use the server's cache, where it has one")
    add("--model-version", type=int, default=suppress, help="of the version folders (default: 1)")
    add("--check-repository", type=Path, metavar="DIR", default=suppress, help="check a repository and do no more")


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_options` that were given."""
    return {name: getattr(arguments, name) for name in _OPTIONS if name in arguments}


def run(
    arguments: argparse.Namespace,
    model: str | None,
    output: str | None,
    progress: Progress | None,
    **export_options: Any,
) -> RepositoryResult:
    """Export as the command line says; `export_options` are those that differ from their defaults."""
    options = {_OPTIONS[name]: value for name, value in given_options(arguments).items()}
    return export_repository(model, output, force=arguments.force, progress=progress, **options, **export_options)


def check(arguments: argparse.Namespace) -> int:
    """`--check-repository`: print what is wrong, a line for each; the exit code."""
    from gte_deploy.exporters.triton.checks import check_repository

    problems = check_repository(arguments.check_repository)
    if arguments.json:
        print(json.dumps({"path": str(arguments.check_repository), "problems": problems}))
    else:
        print("\n".join(problems) or f"{arguments.check_repository}: no problem was found")
    return FAILURE if problems else OK


def result_json(result: RepositoryResult) -> dict[str, object]:
    """For `--json`."""
    return {
        "path": str(result.path),
        "ensembles": list(result.ensembles),
        "devices": list(result.devices),
        "checked": result.checked,
        "files": {name: entry.size for name, entry in result.files.items()},
    }


def result_text(result: RepositoryResult) -> str:
    """For people."""
    megabytes = sum(entry.size for entry in result.files.values()) / 1e6
    checks = "its configurations pass the checks" if result.checked else "its configurations were not checked"
    return (
        f"repository {result.path} ({megabytes:.1f} MB) for {' and '.join(name.upper() for name in result.devices)}; "
        f"{checks}\nask {', '.join(result.ensembles)}; how to start it: {result.path}/README.md"
    )
