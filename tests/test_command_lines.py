"""What gte-deploy, gte-export and gte-train have in common: errors, exit codes, JSON, and that refusals are quick."""

import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import gte_deploy
from gte_deploy import cli as deploy_cli
from gte_deploy.core import exit_codes
from gte_deploy.core.command_line import with_flags
from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option
from gte_deploy.exporters import cli as export_cli
from gte_deploy.exporters import export as export_module
from gte_deploy.exporters.options import make_request
from gte_deploy.models import builtin_bundle
from gte_deploy.training import cli as train_cli

MAINS = {"gte-deploy": deploy_cli.main, "gte-export": export_cli.main, "gte-train": train_cli.main}
MODULES = {
    "gte-deploy": "gte_deploy.cli",
    "gte-export": "gte_deploy.exporters.cli",
    "gte-train": "gte_deploy.training.cli",
}
SLOW = (
    *(
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "pyarrow",
        "datasets",
        "huggingface_hub",
    ),
    *("matplotlib", "safetensors", "scipy", "sentence_transformers"),
)
# Runs commands one after the other in one process; prints the exit code of each, what is loaded after it, and what it
# printed.
COMMANDS = """
import contextlib, importlib, io, json, sys
for program, arguments in json.loads(sys.argv[1]):
    main, out, err = importlib.import_module(program).main, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    slow = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
    print(json.dumps([arguments, code, slow, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders that commands refuse: of an unknown architecture, without a model, and with something in them."""
    folder = tmp_path_factory.mktemp("places")
    for name, config in (("foreign", {"model_type": "llama", "hidden_size": 8}), ("empty", None), ("full", None)):
        (folder / name).mkdir()
        if config is not None:
            (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "full" / "thesis.tex").write_text("mine")
    (folder / "texts.txt").write_text("a text")
    return folder


def ended(commands, cwd, slow=SLOW):
    """Run commands in a process of their own; return arguments, exit codes and slow modules, and what they print."""
    asked = json.dumps([(MODULES[program], arguments) for program, arguments in commands])
    command = [sys.executable, "-c", COMMANDS, asked, json.dumps(slow)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    return [each[:3] for each in found], [each[3:] for each in found]


HELP = [
    *(("gte-deploy", [*words, "--help"]) for words in ([], ["encode"], ["serve"], ["bench"], ["push"])),
    *(("gte-export", [*words, "--help"]) for words in ([], ["trt"], ["triton"], ["adopt"], ["convert"], ["check"])),
    *(("gte-export", ["verify-published", flag]) for flag in ("--help", "--list")),
    *(("gte-train", [*words, "--help"]) for words in ([], ["estimate"], ["run"], ["glue"], ["prepare"])),
]
BUNDLE = str(builtin_bundle())
ENCODERS = ("fill-mask", "encode-sparse", "encode-hybrid", "encode-multi-vector", "predict", "classify-tokens")
KINDS = ("embed", "rerank", "sparse")
REFUSED = [
    ("gte-deploy", ["encode", "-m", "nowhere", "a"], exit_codes.FAILURE),
    ("gte-deploy", ["encode", "-m", "foreign", "a"], exit_codes.FAILURE),
    ("gte-deploy", ["encode", "-m", "empty", "a"], exit_codes.FAILURE),
    ("gte-deploy", ["encode", "--input", "nowhere.txt"], exit_codes.USAGE),
    ("gte-deploy", ["info", "foreign"], exit_codes.FAILURE),
    ("gte-deploy", ["verify", "nowhere"], exit_codes.FAILURE),
    ("gte-deploy", ["verify", BUNDLE, "--checkpoint", BUNDLE], exit_codes.FAILURE),
    ("gte-deploy", ["verify", BUNDLE, "--key", "nowhere.pem"], exit_codes.USAGE),
    ("gte-deploy", ["sign", BUNDLE, "--key", "texts.txt"], exit_codes.USAGE),
    ("gte-deploy", ["encode", "-m", BUNDLE, "--trusted-key", "texts.txt", "a"], exit_codes.USAGE),
    ("gte-deploy", ["bench", "empty"], exit_codes.FAILURE),
    ("gte-deploy", ["encode", "--pooling", "max", "a"], exit_codes.USAGE),
    *(("gte-deploy", [command, "-m", "nowhere", "a"], exit_codes.FAILURE) for command in ENCODERS),
    ("gte-deploy", ["rank", "-m", "nowhere", "-q", "a", "b"], exit_codes.FAILURE),
    ("gte-deploy", ["serve", "nowhere"], exit_codes.FAILURE),
    ("gte-deploy", ["serve", "foreign"], exit_codes.FAILURE),
    ("gte-deploy", ["push", "empty", "a/b"], exit_codes.FAILURE),
    ("gte-deploy", ["compare", BUNDLE, "empty"], exit_codes.FAILURE),
    ("gte-deploy", ["completion", "tcsh"], exit_codes.USAGE),
    ("gte-export", ["nowhere", "out"], exit_codes.FAILURE),
    ("gte-export", ["foreign", "out"], exit_codes.FAILURE),
    ("gte-export", [BUNDLE, "out"], exit_codes.FAILURE),
    ("gte-export", ["-o", "full"], exit_codes.EXISTS),
    ("gte-export", ["-o", "full", "--force"], exit_codes.EXISTS),
    ("gte-export", ["-o", "texts.txt"], exit_codes.EXISTS),
    ("gte-export", ["--task", "sing"], exit_codes.USAGE),
    ("gte-export", ["--opset", "9"], exit_codes.USAGE),
    *(("gte-export", [command, "-o", "full"], exit_codes.EXISTS) for command in ("onnx", "trt", "triton")),
    ("gte-export", ["executorch", "foreign", "out"], exit_codes.FAILURE),
    ("gte-export", ["check", "empty"], exit_codes.USAGE),
    ("gte-export", ["verify-published", "nowhere"], exit_codes.USAGE),
    ("gte-export", ["convert", "gte-en-mlm-tiny", "full", "--layout", "native"], exit_codes.EXISTS),
    ("gte-export", ["convert", BUNDLE, "out", "--layout", "native"], exit_codes.FAILURE),
    ("gte-export", ["adopt", "nowhere.plan", "empty"], exit_codes.FAILURE),
    ("gte-train", ["estimate", "nowhere.yaml"], exit_codes.FAILURE),
    ("gte-train", ["estimate", "gte-en-mlm-tiny", "--data", "empty"], exit_codes.USAGE),
    ("gte-train", ["estimate", "gte-en-mlm-tiny", "--gpus", "0"], exit_codes.USAGE),
    ("gte-train", ["prepare", "nowhere.txt", "-o", "out"], exit_codes.USAGE),
    ("gte-train", ["prepare", "texts.txt", "-o", "full"], exit_codes.EXISTS),
    ("gte-train", ["prepare", "texts.txt", "-o", "full", "--force"], exit_codes.EXISTS),
    ("gte-train", ["run", "gte-en-mlm-tiny", "--data", "empty", "-o", "out"], exit_codes.USAGE),
    ("gte-train", ["export", "empty", "out"], exit_codes.FAILURE),
    ("gte-train", ["glue", "foreign", "-o", "out"], exit_codes.FAILURE),
    ("gte-train", ["xtreme", "foreign", "--data", "empty", "-o", "out"], exit_codes.FAILURE),
    ("gte-train", ["evaluate", "foreign", "--data", "empty"], exit_codes.FAILURE),
    *(("gte-train", [kind, "--data", "nowhere.csv", "-o", "out"], exit_codes.USAGE) for kind in KINDS),
    ("gte-train", ["retrieval", "foreign", "--data", "empty"], exit_codes.FAILURE),
    ("gte-train", ["needles", "foreign", "--data", "empty"], exit_codes.FAILURE),
    ("gte-train", ["mteb", "foreign", "--tasks", "NFCorpus", "--batch-size", "0"], exit_codes.USAGE),
    ("gte-train", ["extrapolate", BUNDLE, "--data", "empty"], exit_codes.FAILURE),
]


@pytest.mark.parametrize("program", MAINS)
def test_help_and_refusals_wait_for_no_slow_library(program, places):
    asked = [each for each in HELP if each[0] == program]
    helped, _ = ended(asked, places, slow=("numpy", *SLOW))
    assert helped == [[words, 0, []] for _, words in asked]
    refused = [(words, code) for name, words, code in REFUSED if name == program]
    found, _ = ended([(program, words) for words, _ in refused], places)
    assert found == [[words, code, []] for words, code in refused]
    assert sorted(path.name for path in places.iterdir()) == ["empty", "foreign", "full", "texts.txt"]
    assert (places / "full" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("program", MAINS)
def test_every_refusal_is_one_line_with_quiet_and_one_object_with_json(program, places):
    refused = [(words, code) for name, words, code in REFUSED if name == program]
    found, printed = ended([(program, [*words, "--json", "--quiet"]) for words, _ in refused], places)
    for (words, code), (_, ends, _), (out, err) in zip(refused, found, printed, strict=True):
        error = json.loads(out)["error"]
        assert (ends, error["exit_code"]) == (code, code), words
        first, *more = err.splitlines()
        assert first.startswith(program) and error["message"] in first, words
        assert more in ([], [error["advice"]]), words


def options_of_commands():
    """The flags of every command: (program, command) -> flag -> its help."""
    deploy, train = deploy_cli._parser(), train_cli.build_parser()
    parsers = {("gte-export", name): export_cli._parser(name, name or "onnx") for name in (None, *export_cli._COMMANDS)}
    for program, parser in (("gte-deploy", deploy), ("gte-train", train)):
        (commands,) = (action for action in parser._actions if action.dest == "command")
        parsers |= {(program, name): inner for name, inner in commands.choices.items()}
    return {
        place: {flag: action.help for action in parser._actions for flag in action.option_strings}
        for place, parser in parsers.items()
    }


def test_every_command_is_asked_in_the_same_words():
    tables = options_of_commands()
    assert len(tables) > 25
    for place, flags in tables.items():
        assert {"--json", "--quiet", "--progress", "--help"} <= flags.keys(), place
        assert not {"--overwrite", "--replace", "--exist-ok", "--silent", "--no-progress"} & flags.keys(), place
    commands = {command for _, command in tables}
    refused = {(name, words[0] if words[0] in commands else None) for name, words, _ in REFUSED}
    assert refused >= tables.keys(), "a command without a refusal in the table"


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("gte-export", ["clip", "out"], "lists CLIPModel; expected a Transformer among them"),
        ("gte-export", ["weights", "out"], "it has no config.json, only model.safetensors. Give the folder that"),
        ("gte-export", ["empty", "out"], "it has no config.json, and is empty."),
        ("gte-export", ["texts.txt", "out"], "texts.txt is a file; a checkpoint or bundle is a folder"),
        ("gte-export", ["foreign", "out"], "`optimum-cli export onnx --model CHECKPOINT OUTPUT`"),
        ("gte-export", [BUNDLE, "out"], f"`gte-deploy serve {BUNDLE}`"),
        ("gte-export", ["check", "empty"], "Write one with: gte-export triton MODEL"),
        ("gte-export", ["--opset", "9"], "--opset must be an integer from 20 to 23, not 9"),
        ("gte-deploy", ["verify", "foreign"], "it has no manifest.json. Make a bundle of it with: gte-export foreign"),
        ("gte-deploy", ["rank", "-q", "a", "b"], "use `gte-deploy fill-mask`, or give another --model"),
        ("gte-deploy", ["classify-tokens", "a"], "use `gte-deploy fill-mask`, or give another --model"),
        ("gte-deploy", ["encode", "-i", "t.jsonl", "-o", "v.npy"], "has no column 'text'; it has body. Name the column "
         "of the texts, as in --text-column body."),
        ("gte-deploy", ["encode", "-i", "t.jsonl", "-o", "v.npy", "--text-column", "bdy"], "has no column 'bdy'"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_came_and_the_next_step(program, arguments, said, tmp_path, monkeypatch, capsys):
    for name, content in (
        ("clip/modules.json", json.dumps([{"idx": 0, "path": "", "type": "sentence_transformers.models.CLIPModel"}])),
        ("weights/model.safetensors", ""),
        ("foreign/config.json", json.dumps({"model_type": "gpt2"})),
        ("texts.txt", "a"),
        ("t.jsonl", json.dumps({"body": "a text"}) + "\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert MAINS[program](arguments) in (exit_codes.FAILURE, exit_codes.USAGE)
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


def test_names_that_people_type_are_explained_to_callers_in_python():
    for call, said in (
        (lambda: gte_deploy.load(task="Rerank"), "'Rerank' is 'classify' here"),
        (lambda: make_request(task="token_classification"), "'token_classification' is 'token-classify' here"),
        (lambda: make_request(target="cuda", precision="half"), "'half' is 'fp16' here"),
        (lambda: make_request(precision="half"), "expected one of fp32, bf16, int8, int8-weight, int4-weight$"),
    ):
        with pytest.raises(InputError, match=said):
            call()


class Asked(Exception):
    """What a command gave to the model."""


@pytest.mark.parametrize(
    "words",
    [["fill-mask"], ["encode"], ["encode-sparse"], ["encode-hybrid"], ["encode-multi-vector"], ["predict"],
     ["rank", "-q", "q"], ["classify-tokens"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_commands_of_many_texts_show_a_bar_on_a_terminal(words, monkeypatch):
    class Model:
        task = "multi-vector" if words == ["encode-multi-vector"] else "any"
        spec = SimpleNamespace(task=task, activation=None, num_labels=1)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __getattr__(self, method):
            def answer(*texts, show_progress_bar, **options):
                raise Asked(show_progress_bar)

            return answer

    monkeypatch.setattr(deploy_cli, "_load", lambda *given, **options: Model())

    def shown(*flags, terminal):
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal, write=len, flush=lambda: None))
        with pytest.raises(Asked) as asked:
            deploy_cli.main([*words, *flags])
        return asked.value.args[0]

    assert shown("a", "b", terminal=True) and shown("a", "--progress", terminal=False)
    assert not shown("a", terminal=True), "one text is no wait that needs a bar"
    assert not shown("a", "b", terminal=False) and not shown("a", "b", "--quiet", terminal=True)


@pytest.mark.parametrize(
    ("program", "arguments", "kind", "code"),
    [
        ("gte-deploy", ["encode", "-m", "nowhere", "a"], "CheckpointError", exit_codes.FAILURE),
        ("gte-deploy", ["encode", "--max-length", "0", "a"], "InputError", exit_codes.USAGE),
        ("gte-deploy", ["encode", "--poling", "a"], "UsageError", exit_codes.USAGE),
        ("gte-export", ["nowhere", "out"], "CheckpointError", exit_codes.FAILURE),
        ("gte-export", ["-o", "full"], "OutputExistsError", exit_codes.EXISTS),
        ("gte-export", ["check", "nowhere"], "FileNotFoundError", exit_codes.FAILURE),
        ("gte-export", ["--precision", "int9"], "UsageError", exit_codes.USAGE),
        ("gte-train", ["estimate", "nowhere.yaml"], "ConfigError", exit_codes.FAILURE),
        ("gte-train", ["prepare", "texts.txt", "-o", "full"], "OutputExistsError", exit_codes.EXISTS),
        ("gte-train", ["fly"], "UsageError", exit_codes.USAGE),
    ],
)
def test_errors_are_json_where_that_is_asked_for(program, arguments, kind, code, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    try:
        assert MAINS[program]([*arguments, "--json"]) == code
    except SystemExit as stop:
        assert stop.code == code
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    error = json.loads(line)["error"]
    assert error.keys() == {"type", "message", "advice", "exit_code"}
    assert (error["type"], error["exit_code"]) == (kind, code)
    assert f"error: {error['message']}\n" in err and "Traceback" not in err
    assert error["advice"] is None or error["advice"] in (error["message"], err) or error["advice"] in err


@pytest.mark.parametrize(
    ("program", "arguments", "suggested"),
    [
        ("gte-deploy", ["encde"], "encode"),
        ("gte-deploy", ["encode", "--max-lenght", "9", "a"], "--max-length"),
        ("gte-deploy", ["encode", "--pooling", "meen", "a"], "mean"),
        ("gte-export", ["--precison", "int8"], "--precision"),
        ("gte-export", ["--precision", "int8-weights"], "int8-weight"),
        ("gte-train", ["extrpolate"], "extrapolate"),
        ("gte-train", ["estimate", "gte-en-mlm-tiny", "--gpu", "h10"], "h100"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(program, arguments, suggested, capsys):
    with pytest.raises(SystemExit) as stop:
        MAINS[program](arguments)
    assert stop.value.code == exit_codes.USAGE
    err = capsys.readouterr().err
    assert f"did you mean {suggested}?" in err and len(err.splitlines()) == 2, "no wall of options"


def test_a_near_miss_of_a_model_is_answered_with_the_preset(capsys):
    assert export_cli.main(["gte-en-mlm-tinny", "out"]) == exit_codes.FAILURE
    assert "did you mean gte-en-mlm-tiny?" in capsys.readouterr().err


def test_messages_name_flags():
    @dataclasses.dataclass(frozen=True)
    class Options:
        max_length: int = option(1, "", flags=("--max-len", "--max-length"))
        backend: str = option("auto", "")
        target: str = option("cpu", "")
        compute_precision: str = option("auto", "", argument="precision")

    for message, expected in (
        ("max_length must be 3", "--max-length must be 3"),
        ("Load it with backend='onnx'.", "Load it with --backend onnx."),
        ("leave out max_length", "leave out --max-length"),
        ("target is 'x'; expected y", "--target is 'x'; expected y"),
        ("the target is on that line", "the target is on that line"),
        ("/tmp/max_length.txt and 'max_length'", "/tmp/max_length.txt and 'max_length'"),
        ("use truncation=True", "use truncation=True"),
        (
            "precision 'bf16' is for a GPU. Leave precision out.",
            "--compute-precision 'bf16' is for a GPU. Leave --compute-precision out.",
        ),
    ):
        assert with_flags(message, [Options]) == expected
    assert (
        with_flags("max_length is 3 in backend='onnx'", [Options], words=False) == "max_length is 3 in --backend onnx"
    )


def test_progress_is_for_terminals_and_for_who_asks(tmp_path):
    """stderr of a real process: a pipe, a pipe with --progress, a terminal, and a terminal with --quiet."""
    (tmp_path / "t.txt").write_text("a\nb\n")
    code = "import sys; from gte_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    encode = ["encode", "-i", "t.txt", "-o", "v.npy"]

    def stderr_of(*flags, terminal, words=encode):
        command = [sys.executable, "-c", code, *words]
        if not terminal:
            done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stderr
        ours, theirs = pty.openpty()
        done = subprocess.run([*command, *flags], stdout=subprocess.DEVNULL, stderr=theirs, cwd=tmp_path, timeout=120)
        os.close(theirs)
        assert done.returncode == 0
        try:
            return os.read(ours, 1 << 16).decode()
        except OSError:  # nothing was written, and no writer is left
            return ""
        finally:
            os.close(ours)

    assert "rows/s" not in stderr_of(terminal=False)
    assert "rows/s" in stderr_of("--progress", terminal=False)
    assert "rows/s" in stderr_of(terminal=True)
    assert stderr_of("--quiet", terminal=True) == stderr_of("--quiet", terminal=False) == ""
    verify = ["verify", BUNDLE]
    assert "compare the files" in stderr_of(terminal=True, words=verify)
    assert stderr_of("--quiet", terminal=True, words=verify) == stderr_of(terminal=False, words=verify) == ""


ASK = """
eval "$(gte-deploy completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder for PATH with the three programs, as pip installs them."""
    folder = tmp_path_factory.mktemp("bin")
    for program, module in MODULES.items():
        file = folder / program
        file.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        file.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["gte-deploy", "encode-"], ["encode-sparse", "encode-hybrid", "encode-multi-vector"]),
        (["gte-deploy", "encode", "--pool"], ["--pooling"]),
        (["gte-deploy", "encode", "--normalize", "--pooling", ""], ["mean", "cls"]),
        (["gte-deploy", "encode", "-m", ""], [""]),  # nothing of its own: the shell completes names of files
        (["gte-deploy", "completion", ""], ["bash", "zsh", "fish"]),
        (["gte-export", "con"], ["convert"]),
        (["gte-export", "--target", ""], ["cpu", "cuda", "openvino"]),
        (["gte-export", "trt", "model", "--precision", "fp"], ["fp16", "fp8"]),
        (["gte-export", "--format", "triton", "--eng"], ["--engine"]),
        (["gte-train", "glue", "--tasks", "cola", "m"], ["mnli", "mrpc"]),
    ],
)
def test_bash_completes(line, expected, scripts):
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", *line], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_scripts(shell, scripts, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert deploy_cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    ask = {
        # The completion system of zsh needs a terminal; the function is run with what it would set.
        "zsh": f"compdef() {{}}\ncompadd() {{ print -l -- $found }}\n{script}\n"
        "words=(gte-deploy encode --pooling ''); CURRENT=4; _gte_deploy_complete",
        "fish": f"{script}\ncomplete -C 'gte-deploy encode --pooling '",
    }[shell]
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", ask], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["mean", "cls"] or {"mean", "cls"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--task", "rerank"], {"task": "classify"}),
        (["--task", "embedding"], {"task": "embed"}),
        (["--task", "Token_Classify"], {"task": "token-classify"}),
        (["--precision", "FLOAT32"], {"precision": "fp32"}),
        (["--target", "gpu"], {"target": "cuda"}),
        (["--format", "trt", "--target", "orin"], {"compute_capabilities": ("8.7",)}),
        (["--format", "trt", "--target", "rtx4090,RTX 5090,Jetson-AGX-Orin,A100-80GB"],
         {"compute_capabilities": ("8.9", "12.0", "8.7", "8.0")}),
        (["--format", "trt", "--target", "8.6,sm120"], {"compute_capabilities": ("8.6", "12.0")}),
    ],
)  # fmt: skip
def test_names_that_people_type(typed, meant, monkeypatch):
    given = []
    monkeypatch.setattr(export_module, "export", lambda *places, **options: given.append(options))
    monkeypatch.setattr(export_cli, "_result_text", str)
    assert export_cli.main(["model", "out", *typed]) == 0
    assert given[0].items() >= meant.items()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--target", "orin"], "`gte-export trt MODEL --target orin`"),
        (["--target", "opnvino"], "did you mean openvino?"),
        (["trt", "--target", "rtx409"], "did you mean rtx4090?"),
    ],
)
def test_a_target_that_is_not_there_is_answered_with_what_is(typed, said, capsys):
    assert export_cli.main(typed) == exit_codes.USAGE
    assert said in capsys.readouterr().err
