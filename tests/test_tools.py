"""The project's own tools, and that pre-commit runs what `make lint` runs."""

import ast
import importlib
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from loading import load_file

ROOT = Path(__file__).resolve().parents[1]


def load_tool(name: str) -> ModuleType:
    return load_file(ROOT / "tools" / f"{name}.py", name)


def test_pre_commit_runs_the_commands_of_make_lint():
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    # The tools of .venv, over the whole tree: what one run says does not depend on which files were staged.
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and hook["pass_filenames"] is False, hook["id"]


@pytest.fixture
def tree(tmp_path):
    """`tree({name: bytes})` tracks these files, and gives check_files.py for their folder."""

    def make(files: dict[str, bytes]) -> ModuleType:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
        module = load_tool("check_files")
        module.ROOT = tmp_path
        return module

    return make


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("a.md", b"a line", "does not end with one newline"),
        ("a.md", b"a line\n\n", "does not end with one newline"),
        ("a.md", b"one \ntwo\n", "line 1 ends with white space"),
        ("a.py", b"one\r\n", "line 1 ends with white space"),
        ("a.py", b"one\n<<<<<<< ours\n", "line 2 is a conflict marker"),
        ("a.json", b"{", "cannot be parsed"),
        ("a.toml", b"a =\n", "cannot be parsed"),
        ("a.yaml", b"a: [\n", "cannot be parsed"),
        ("a.md", b"\xff\n", "neither binary nor UTF-8"),
    ],
)
def test_a_fault_is_named(tree, capsys, name, data, fault):
    assert tree({name: data}).main() == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"{name}: ") and fault in printed


def test_a_large_file_is_named(tree, capsys):
    assert tree({"a.bin": bytes((1 << 20) + 1)}).main() == 1
    assert capsys.readouterr().err.startswith("a.bin: 1,048,577 bytes are more than 1,048,576")


def test_a_broken_link_is_named(tree, tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    assert tree({}).main() == 1
    assert capsys.readouterr().err == "link: the link leads nowhere\n"


def test_what_is_in_order_passes(tree, capsys):
    files = {
        "a.md": b"one\n",
        "empty": b"",
        "a.yaml": b"a: 1\n---\nb: 2\n",
        "a.bin": b"\0\xff",
        "data.txt": b"one \n\n",
    }
    assert tree(files).main() == 0
    assert capsys.readouterr().err == ""


def test_without_git_nothing_is_checked_and_that_is_said(tree, tmp_path, capsys):
    module = tree({"a.md": b"a line"})
    module.ROOT = tmp_path / "elsewhere"
    assert module.main() == 0
    assert "no file was checked" in capsys.readouterr().err


def test_the_repository_is_in_order(capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: there is no list of tracked files")
    assert load_tool("check_files").main() == 0, capsys.readouterr().err


# --- generate_docs.py -----------------------------------------------------------------------------------------------


@pytest.fixture
def generator(monkeypatch) -> ModuleType:
    monkeypatch.setenv("COLUMNS", "100")  # the generator sets it for its own process, and so for this one
    return load_tool("generate_docs")


@pytest.fixture
def stale_page(generator, monkeypatch, tmp_path) -> Path:
    page = tmp_path / "page.md"
    page.write_text("one\nold\n")
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "pages", lambda: iter([(page, "one\nnew\n")]))
    return page


def test_a_stale_page_is_shown_as_a_diff_and_left_alone(generator, stale_page, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate_docs.py", "--check"])
    assert generator.main() == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["-old", "+new"]
    assert stale_page.read_text() == "one\nold\n"


def test_a_stale_page_is_written(generator, stale_page, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate_docs.py"])
    assert generator.main() == 0
    assert capsys.readouterr().out == "wrote page.md\n"
    assert stale_page.read_text() == "one\nnew\n"


@pytest.mark.parametrize("command", ["gte-deploy", "gte-train"])
def test_the_page_of_commands_has_every_sub_command(generator, capsys, command):
    # What argparse itself says of a command that there is not.
    module, _, main = generator.SCRIPTS[command].partition(":")
    with pytest.raises(SystemExit):
        getattr(importlib.import_module(module), main)(["no-such-command"])
    names = re.findall(r"[\w-]+", capsys.readouterr().err.partition("choose from")[2].partition(")")[0])
    assert names
    page = generator.commands_page()
    assert [name for name in names if f"### {command} {name}\n" not in page] == []
    for name in names:
        assert f"$ {command} {name} --help\nusage: {command} {name} " in page


def test_a_block_in_any_page_is_filled(generator):
    start = "before\n<!-- generated: gte-deploy info --help -->\n"
    text = generator.filled(f"{start}old\n<!-- end -->\nafter\n")
    assert text.startswith(f"{start}```text\n$ gte-deploy info --help\nusage: gte-deploy info ")
    assert text.endswith("```\n<!-- end -->\nafter\n") and "\nold\n" not in text
    assert generator.filled(text) == text


def test_the_api_page_has_every_public_name(generator):
    import gte_deploy

    page = generator.api_page()
    for name in gte_deploy.__all__:
        written = f"| `{name}` |" if name.endswith("Error") else f"## gte_deploy.{name}\n"
        assert written in page or name == "__version__", name
    for method in (name for name in dir(gte_deploy.Model) if not name.startswith("_") and name != "after_fork"):
        assert f"### model.{method}\n" in page, method


def test_a_docstring_becomes_markdown(generator):
    source = '''def f(a, b):
    """Do it.

    Args:
        a: the first,
            on two lines.
        b, c: the others.

    Raises:
        KeyError, ValueError: never.
    """'''
    (node,) = ast.parse(source).body
    assert generator.prose(node) == (
        "Do it.\n\n**Arguments**\n\n- `a`: the first,\n  on two lines.\n- `b`, `c`: the others.\n\n"
        "**Raises**\n\n- `KeyError`, `ValueError`: never."
    )
