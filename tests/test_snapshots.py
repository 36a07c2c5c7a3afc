"""What users and their programs see, frozen: a change shows up as a diff of a file under tests/__snapshots__.

Look at the difference, and accept it with `pytest tests/test_snapshots.py --snapshot-update`. The help texts are frozen
in docs/command-line.md, which tests/test_docs.py holds against the commands.
"""

import argparse
import dataclasses
import json
from typing import Any

import pytest
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from factories import make_checkpoint
from gte_deploy import cli
from gte_deploy.core.options import flags_of, options_of
from gte_deploy.exporters import cli as export_cli
from gte_deploy.exporters.options import ExportOptions
from gte_deploy.exporters.targets import target_classes
from gte_deploy.exporters.triton.options import TritonOptions
from gte_deploy.training import cli as train_cli


class Text(SingleFileSnapshotExtension):
    """One readable file a snapshot."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


@pytest.fixture
def frozen(snapshot):
    return snapshot.use_extension(Text)


def options_in(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """`command flag values default`, one line an option, of a parser and its commands."""
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                lines += options_in(inner, f"{command} {name}")
        elif action.help != argparse.SUPPRESS:
            names = ", ".join(action.option_strings) or action.metavar or action.dest
            values = ",".join(map(str, action.choices)) if action.choices else ""
            default = "" if action.default in (None, False, argparse.SUPPRESS) else f"= {action.default}"
            lines.append(" ".join(filter(None, (command, names, values, default))))
    return lines


def test_the_options_of_the_commands(frozen):
    """An option that appears or vanishes is a decision, never an accident."""
    lines = options_in(cli._parser(), "gte-deploy") + options_in(train_cli.build_parser(), "gte-train")
    for command in ("onnx", "trt", "triton", "adopt", "check", "verify-published"):
        lines += options_in(export_cli._parser(command, command), f"gte-export {command}")
    assert "\n".join(lines) + "\n" == frozen


def test_the_options_of_the_python_api(frozen):
    """So is one that changes its name in Python, or its default."""
    kinds = {
        "gte-deploy": [kind for command in cli._COMMANDS.values() for kind in command.options],
        "gte-train": [kind for command in train_cli._COMMANDS.values() for kind in command.options],
        "gte-export": [ExportOptions, *(kind.Options for kind in target_classes()), TritonOptions],
    }
    lines = [
        f"{command} {kind.__name__}.{name} ({flags_of(name, described)[0]}) "
        + ("is required" if default is dataclasses.MISSING else f"= {default!r}")
        for command in kinds
        for kind in dict.fromkeys(kinds[command])
        for name, (default, described) in options_of(kind).items()
    ]
    assert "\n".join(lines) + "\n" == frozen


def shape_of(value: Any) -> Any:
    """The same with every value replaced by its type; lists by what their first item is like."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    for module in ("torch", "transformers", "onnx", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    from gte_deploy.exporters.export import export

    folder = tmp_path_factory.mktemp("snapshots")
    return export(make_checkpoint(folder / "embed", task="embed", layers=1), folder / "bundle", max_length=16).path


@pytest.mark.parametrize("name", ["report.json", "manifest.json"])
def test_the_fields_of_a_bundles_files(bundle, frozen, name):
    """What programs read of a bundle: the names of the fields and their types."""
    data = json.loads((bundle / name).read_text())
    for key in ("versions", "timings_s"):  # named after what is installed, and after the steps
        data.pop(key, None)
    data.get("parity", {}).pop("not_proven", None)  # empty on a CPU with bfloat16
    assert json.dumps(shape_of(data), indent=1) + "\n" == frozen


def test_the_configurations_for_triton(bundle, tmp_path, frozen):
    pytest.importorskip("tritonclient.grpc")
    from gte_deploy.exporters.triton.repository import export_repository

    path = export_repository(bundle, tmp_path / "repository", threads=2, tokenizers=2).path
    files = sorted(path.rglob("*.pbtxt"))
    assert files
    assert "".join(f"# {file.relative_to(path)}\n{file.read_text()}\n" for file in files) == frozen


REFUSED = (
    "one --model two",
    "--target sm86",
    "--padding keep",
    "--precision fp16",
    "--precision int8 --target cuda",
    "--target cuda --precision bf16 --padding remove",
    "--profile 1x1:1x8:1x16",
    "--engine other",
    "--calibration texts.txt",
    "--target openvino --activations dynamic --precision int8",
    "trt --precision fp8 --calibrator entropy",
    "trt --target cuda",
    "trt --profile 1x8",
    "trt --workspace many",
    "trt --profile 1x1:1x8:1x16 --lengths lengths.txt",
    "triton --engine a --max-batch-size 0",
    "triton --target openvino",
    "triton --engine a model",
)


def test_the_errors_of_the_command_line(frozen, capsys):
    """The words a user reads when a command is refused, with its exit code."""
    lines = []
    for line in REFUSED:
        try:
            code: Any = export_cli.main(line.split())
        except SystemExit as error:
            code = error.code
        message = capsys.readouterr().err.strip().splitlines()[-1]
        lines.append(f"gte-export {line}\n  {code}: {message}")
    assert "\n".join(lines) + "\n" == frozen
