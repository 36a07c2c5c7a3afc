"""`gte-export`: what it prints where, its exit codes, and that asking for help is quick."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from factories import make_checkpoint
from gte_deploy import __version__
from gte_deploy.bundle import upload
from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.bundle.upload import Pushed
from gte_deploy.core.errors import InputError
from gte_deploy.core.exit_codes import BROKEN_PIPE, EXISTS, FAILURE, MISSING_DEPENDENCY, OK, USAGE
from gte_deploy.exporters import cli, export
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.targets.tensorrt.profiles import parse_profile
from gte_deploy.exporters.triton.repository import export_repository


@pytest.mark.parametrize(
    "arguments",
    [["--format", "coreml"], ["--task", "sing"], ["--max-len", "many"], ["--pooling", "max"], ["a", "b", "c"]],
)
def test_wrong_usage_is_told_by_argparse(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == USAGE
    assert "`gte-export --help` lists what it takes" in capsys.readouterr().err


def test_a_model_given_twice_is_refused(capsys):
    assert main(["one", "--model", "two"]) == USAGE
    assert "give one of them" in capsys.readouterr().err


def test_positions_and_options_mean_the_same(monkeypatch):
    calls = []
    monkeypatch.setattr(export, "export", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(cli, "_result_text", str)
    for line in ("model out", "-m model -o out", "model --output out", "onnx model out"):
        assert main([*line.split(), "--quiet"]) == OK
    common = {"format": "onnx", "force": False, "progress": None}
    assert calls == [(("model", "out"), common)] * 4
    assert main(["--quiet"]) == OK
    assert calls[-1] == ((None, None), common), "what is not given is left to the function's own defaults"


def test_a_push_is_checked_before_the_export_and_made_after_it(monkeypatch, capsys):
    done = []

    def push(path, repository, *, private):
        done.append(("push", path, repository, private))
        return Pushed("owner/name", "4f2a", "https://hub/owner/name/commit/4f2a")

    monkeypatch.setattr(export, "export", lambda *args, **options: done.append("export") or SimpleNamespace(path="out"))
    monkeypatch.setattr(upload, "push_to_hub", push)
    monkeypatch.setattr(cli, "_result_text", lambda result: "the table")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    words = ["model", "out", "--quiet", "--push-to-hub"]
    assert main([*words, "owner/name"]) == USAGE, "without a token"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    assert main([*words, "name"]) == main([*words, "owner//name"]) == main(["model", "--private"]) == USAGE
    assert not done
    capsys.readouterr()
    assert main([*words, "owner/name@dev", "--private"]) == OK
    assert done == ["export", ("push", "out", "owner/name@dev", True)]
    assert capsys.readouterr().out.splitlines() == [
        "the table",
        "pushed to https://hub/owner/name/commit/4f2a",
        "load it with gte_deploy.load('owner/name@4f2a')",
    ]


@pytest.mark.parametrize("form", [["trt"], ["--format", "trt"], ["--format=trt"]])
def test_a_command_and_the_flat_form_mean_the_same(form, monkeypatch):
    calls = []
    monkeypatch.setattr(export, "export", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(cli, "_result_text", str)
    given = "model out --precision int8 --target sm86,sm120 --profile 1x1:1x8:2x16 --profile 1x17:2x32:2x64 --quiet"
    given += " --workspace 512 --calibrator percentile --max-length 64 --keep-onnx --force"
    assert main([*form, *given.split()]) == OK
    assert calls == [
        (
            ("model", "out"),
            {
                "format": "trt",
                "precision": "int8",
                "compute_capabilities": ("8.6", "12.0"),
                "profiles": (parse_profile("1x1:1x8:2x16"), parse_profile("1x17:2x32:2x64")),
                "workspace": 512 << 20,
                "calibrator": "percentile",
                "max_length": 64,
                "keep_onnx": True,
                "force": True,
                "progress": None,
            },
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "shown", "not_shown"),
    [
        ([], ["--reduce-range", "--target {cpu,cuda,openvino}", "gte-export trt "], ["--profile", "--engine"]),
        (["--format", "trt"], ["--profile", "--precision {fp16,bf16,int8,fp8}"], ["--reduce-range", "--engine"]),
        (["trt"], ["--profile", "--target GPUS"], ["--reduce-range", "--engine", "--format {"]),
        (["triton"], ["--engine", "--reduce-range", "--opset"], ["--profile", "--openvino-ir", "--logits"]),
        (["executorch"], ["--program-batch"], ["--opset", "--logits", "--openvino-ir"]),
        (["check"], ["DIR"], ["--profile", "--precision"]),
    ],
)
def test_help_shows_what_concerns_the_format(arguments, shown, not_shown, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    out = capsys.readouterr().out
    assert all(text in out for text in shown) and not any(text in out for text in not_shown)


@pytest.mark.parametrize(
    ("words", "flag", "options"),
    [
        ("--format triton --openvino-ir model", "--openvino-ir model", {"openvino_ir": "model"}),
        ("--format triton --logits all", "--logits all", {"logits": "all"}),
        ("--format executorch --logits all", "--logits all", {"logits": "all"}),
        ("--format executorch --opset 19", "--opset 19", {"opset": 19}),
    ],
)
def test_what_a_format_cannot_take_is_refused_before_anything_is_read(words, flag, options, tmp_path, capsys):
    format = words.split()[1]
    assert main(["/nowhere", str(tmp_path / "out"), *words.split()]) == USAGE
    assert f"{flag} is not for --format {format}; leave it out" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"{next(iter(options))} is .* not for format {format}"):
        if format == "triton":
            export_repository(tmp_path, tmp_path / "out", **options)
        else:
            export.export("/nowhere", tmp_path / "out", format=format, **options)


@pytest.mark.parametrize("tokens", ["-1", "0", "7", "8193"])
def test_lengths_that_the_checkpoint_does_not_have(tokens, tiny_mlm, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main([str(tiny_mlm), str(tmp_path / "out"), "--max-len", tokens]) == USAGE
    assert "expected 8 to 8,192" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out"), "--json"]) == FAILURE
    out, err = capsys.readouterr()
    assert "nowhere" in err and json.loads(out)["error"]["exit_code"] == FAILURE
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_no_bundle(tiny_mlm, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main([str(tiny_mlm), str(tmp_path / "out"), "--force", "--quiet"]) == EXISTS
    out, err = capsys.readouterr()
    assert out == "" and "not a bundle" in err and "Traceback" not in err


def test_a_target_that_cannot_be_made(tiny_mlm, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(tiny_mlm), str(tmp_path / "file" / "out")]) == FAILURE
    assert "gte-export: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "command"),
    [("torch", ()), ("onnx", ()), ("onnxscript", ()), ("torch", ("convert", "--layout", "native"))],
)
def test_a_missing_library_names_the_extra(module, command, tiny_mlm, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    assert main([*command, str(tiny_mlm), str(tmp_path / "out")]) == MISSING_DEPENDENCY
    err = capsys.readouterr().err
    assert f"'{module}' is not installed" in err and "[export]" in err


def test_help_needs_no_heavy_library():
    code = (
        "import sys; from gte_deploy.exporters.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "exit codes:" in done.stdout


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "from gte_deploy.exporters import cli, export\n"
        "export.export, cli._result_text = (lambda *args, **options: None), (lambda result: 'table')\n"
        "raise SystemExit(cli.main(['--quiet']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


@pytest.fixture
def tiny(trace_once, tmp_path):
    return make_checkpoint(tmp_path / "tiny", layers=1)


def test_the_table_on_stdout_and_the_progress_on_stderr(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny), "--max-len", "16", "--progress"]) == OK
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["length", "batch", "padding", "logits"]
    assert [line for line in lines if line.startswith("onnxruntime fp32: parity passed, ")]
    assert lines[-1].startswith("bundle tiny-onnx-fp32 (")
    assert open_bundle(tmp_path / "tiny-onnx-fp32").spec.max_length == 16
    assert all(line.startswith("gte-export: ") for line in err.splitlines()), "nothing of the libraries' own talk"
    assert "gte-export: parity 1/" in err


def test_json_is_one_object_and_quiet_is_quiet(tiny, tmp_path, capsys):
    assert main(["-m", str(tiny), "-o", str(tmp_path / "out"), "--max-len", "16", "--json", "--quiet"]) == OK
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["path"] == str(tmp_path / "out") and result["task"] == "fill-mask"
    assert result["parity"]["passed"] is True and result["parity"]["engines"][0]["cases"]
    assert result["files"] == {name: e.size for name, e in open_bundle(tmp_path / "out").files.items()}


@pytest.mark.parametrize(
    ("options", "shown"),
    [([], ["warning: few"]), (["--progress"], ["read the texts", "warning: few"]), (["--quiet"], [])],
)
def test_a_warning_is_shown_also_without_a_terminal(options, shown, monkeypatch, capsys):
    def told(*arguments, progress, **rest):
        for line in ("read the texts", "warning: few") if progress else ():
            progress(line)

    monkeypatch.setattr(export, "export", told)
    monkeypatch.setattr(cli, "_result_text", lambda result: "table")
    assert main(options) == OK
    assert capsys.readouterr().err.splitlines() == [f"gte-export: {line}" for line in shown]


@pytest.mark.parametrize("module", ["gte_deploy", "gte_deploy.exporters.cli", "gte_deploy.training.cli"])
def test_a_command_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"gte-deploy {__version__}"


def test_a_failed_proof_is_a_failed_command(tiny, tmp_path, monkeypatch, capsys):
    from gte_deploy.exporters.verification import bounds

    monkeypatch.setitem(bounds.TOLERANCES, "fp32", bounds.Tolerance(cosine_min=1.5))
    assert main([str(tiny), str(tmp_path / "out"), "--max-len", "16", "--json"]) == FAILURE
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["parity"]["passed"] is False
    assert result["parity"]["engines"][0]["cases"][0]["outputs"]["logits"]["max_abs"] >= 0
    assert "differs from PyTorch" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"], "no bundle and nothing temporary is left"
