"""gte-train: from text to an exported model, its exit codes, and its messages."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from factories import write_tokenizer
from gte_deploy.core.exit_codes import BROKEN_PIPE, EXISTS, FAILURE, INTERRUPTED, MISSING_DEPENDENCY, OK, USAGE
from gte_deploy.training import train as train_module
from gte_deploy.training.cli import main
from gte_deploy.training.log import RunLog


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(steps=(2, 2))))
    return path


def test_prepare_takes_the_built_in_tokenizer(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a first document\n\nand a second one")
    assert main(["prepare", str(tmp_path / "text.txt"), "--output", str(tmp_path / "data"), "--workers=1"]) == OK
    out, _ = capsys.readouterr()
    assert "2 documents, 7 tokens" in out and "vocabulary 30,522" in out


def test_prepare_run_export(recipe_file, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1} w{i + 2} w7" for i in range(5, 100)))
    data, output = str(tmp_path / "data"), str(tmp_path / "run")
    prepare = ["prepare", str(tmp_path / "text.txt"), "--output", data, "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*prepare, "--workers=1"]) == OK
    assert f"{data}: 95 documents, 380 tokens" in capsys.readouterr().out

    command = ["run", str(recipe_file), "--data", data, "--output", output, "--set", "stages.1.steps=3"]
    assert main([*command, "--device=cpu", "--peak-tflops=0.1"]) == OK
    out, err = capsys.readouterr()
    assert out == f"{output}/model\n"
    assert "mlm-32 2/2  loss 5." in err and "mlm-64 3/3" in err and "% of peak" in err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["stages"][1]["steps"] == 3

    for layout, model_type in (("native", "gte"), ("original", "new")):
        assert main(["export", output, str(tmp_path / layout), "--layout", layout]) == OK
        assert json.loads((tmp_path / layout / "config.json").read_text())["model_type"] == model_type
        assert (tmp_path / layout / "tokenizer.json").is_file()
    assert main(["export", output, str(tmp_path / "half"), "--dtype", "float16"]) == OK
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    first = f"{output}/checkpoints/00-mlm-32-00000002"
    assert main(["export", first, str(tmp_path / "first")]) == OK
    models = [AutoModelForMaskedLM.from_pretrained(tmp_path / name) for name in ("native", "first")]
    weights = [model.lm_head.dense.weight for model in models]
    assert not torch.equal(*weights)


def test_a_run_refuses_an_altered_corpus_unless_told_not_to_look(make_recipe, corpus_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(steps=(1,))))
    data, output = shutil.copytree(corpus_folder, tmp_path / "data"), tmp_path / "run"
    tokens = bytearray((data / "shard-00000.tokens").read_bytes())
    tokens[200] ^= 1
    (data / "shard-00000.tokens").write_bytes(tokens)
    command = ["run", str(recipe), "--data", str(data), "--output", str(output), "--device=cpu"]
    assert main(command) == USAGE
    assert "shard-00000.tokens does not match its sha256" in capsys.readouterr().err
    assert not list((output / "checkpoints").glob("0*"))
    assert main([*command, "--no-verify"]) == OK
    assert not (output / "chunks").exists()  # the table of the chunks goes at the end


def test_prepare_of_an_existing_corpus_is_refused(corpus_folder, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("w5")
    tokenizer = str(corpus_folder / "tokenizer")
    command = ["prepare", str(tmp_path / "a.txt"), "--output", str(corpus_folder), "--tokenizer", tokenizer]
    assert main(command) == EXISTS
    assert "exists already" in capsys.readouterr().err


def test_a_missing_field_is_answered_with_the_option_that_names_it(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "a text"}\n')
    assert main(["prepare", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "data")]) == USAGE
    said = capsys.readouterr().err
    assert "it has body" in said and "--text-column NAME" in said and "--skip-bad" in said


def test_a_stopped_run_has_its_own_exit_code(recipe_file, corpus_folder, tmp_path, monkeypatch, capsys):
    import signal

    original = RunLog.write

    def write(self, records):
        original(self, records)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "write", write)
    monkeypatch.setattr(train_module, "plot_run", lambda folder: None)
    command = ["run", str(recipe_file), "--data", str(corpus_folder), "--output", str(tmp_path / "o")]
    assert main(command) == INTERRUPTED == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--set", "stages.0.stepz=1"], FAILURE, "unknown key 'stages.0.stepz'; did you mean 'steps'?"),
        (["--set", "model=nothing"], FAILURE, "no folder 'nothing'"),
        (["--data", "/nowhere"], USAGE, "/nowhere"),
        (["--tokenizer", "/nowhere"], FAILURE, "/nowhere/tokenizer.json is missing"),
    ],
)
def test_mistakes_are_told_in_one_line(recipe_file, corpus_folder, tmp_path, capsys, changes, code, message):
    command = ["run", str(recipe_file), "--data", str(corpus_folder), "--output", str(tmp_path / "out"), *changes]
    assert main(command) == code
    err = capsys.readouterr().err
    assert err.startswith("gte-train: ") and message in err and "Traceback" not in err


def test_unknown_recipe_and_checkpoint(corpus_folder, tmp_path, capsys):
    common = ["--data", str(corpus_folder), "--output", str(tmp_path / "out")]
    assert main(["run", "gte-en-mlm-bass", *common]) == FAILURE
    assert "nor a shipped recipe (domain-adaptation, gte-en-mlm-base, " in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "x")]) == FAILURE
    assert "is neither a training checkpoint nor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peak-tflops", "many"], "the peak is 'many'; expected a positive number of TFLOP/s"),
        (["--peak-tflops", "0"], "the peak is '0'; expected a positive number of TFLOP/s"),
        (["--avg-tokens", "9", "--data", "corpus"], "give one of them"),
        (["--gpus", "0"], "expected at least one"),
    ],
)
def test_impossible_estimates_are_wrong_usage(capsys, options, message):
    assert main(["estimate", "gte-en-mlm-tiny", *options]) == USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-len", "--max-length"])
def test_two_spellings_of_the_longest_input(flag, tiny_mlm, corpus_folder, capsys):
    assert main(["glue", str(tiny_mlm), "--output", "nowhere", flag, "3"]) == USAGE
    assert "--max-length 3, --batch-size 32" in capsys.readouterr().err
    assert main(["extrapolate", str(tiny_mlm), "--data", str(corpus_folder), flag, "4096"]) == USAGE
    assert "tokens, not 4096" in capsys.readouterr().err


def test_wrong_usage_and_help(capsys):
    for arguments, code in ((["fly"], 2), ([], 2), (["--help"], 0), (["run", "--help"], 0), (["prepare", "-h"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert "130 stopped by SIGTERM, SIGHUP or SIGINT" in capsys.readouterr().out.replace("\n", " ")


def test_help_does_not_wait_for_torch():
    code = """if True:
        import sys
        from gte_deploy.training.cli import main
        for command in ([], ["prepare"], ["estimate"], ["run"], ["export"], ["evaluate"], ["glue"], ["extrapolate"]):
            try:
                main([*command, "--help"])
            except SystemExit as stop:
                assert stop.code == 0
            heavy = {"numpy", "torch", "transformers", "datasets", "matplotlib", "pyarrow"} & set(sys.modules)
            assert not heavy, (command, heavy)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("prepare", "estimate", "run", "export", "evaluate", "glue", "extrapolate"):
        assert f"usage: gte-train {command} " in done.stdout


def test_a_full_disk_leaves_no_checkpoint_that_looks_whole(recipe_file, corpus_folder, tmp_path):
    """A write that fails (here: a limit on the size of files) ends with an error and not with half a checkpoint."""
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from gte_deploy.training.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["run", str(recipe_file), "--data", str(corpus_folder), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", limit, *command, "--no-tensorboard"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == FAILURE, done.stderr
    assert "safetensors cannot be written: " in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "out")


def test_a_reader_that_goes_away_is_no_error():
    code = "from gte_deploy.training.cli import main; raise SystemExit(main(['glue', '--list-systems']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


def test_without_torch_the_message_names_the_extra(recipe_file, corpus_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gte_deploy.training.train")
    monkeypatch.setitem(sys.modules, "torch", None)
    command = ["run", str(recipe_file), "--data", str(corpus_folder), "--output", str(tmp_path / "out")]
    assert main(command) == MISSING_DEPENDENCY
    assert "[train]'" in capsys.readouterr().err


def test_a_command_leaves_the_log_of_the_process_as_it_was(tmp_path):
    log = logging.getLogger("gte_deploy")
    before = (list(log.handlers), log.level)
    assert main(["estimate", str(tmp_path / "no-recipe.yaml")]) != 0
    assert (log.handlers, log.level) == before
