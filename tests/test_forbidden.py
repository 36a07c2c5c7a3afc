"""No file of the repository unpickles, runs remote code or text, or gives a text to a shell; ruff finds most of these.

What ruff has no rule for is searched here: arguments by their names, and functions that load pickles or code. Where
something of this is needed, pyproject.toml or EXCEPTIONS names the file.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
RUFF = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
RULES = sorted(rule for rule in RUFF["select"] if re.fullmatch(r"S\d+", rule))
FOLDERS = ("gte_deploy", "exporters", "models", "training", "optimum", "tools", "benchmarks", "examples", "tests")

FOUND_BY_RUFF = {
    "import pickle; pickle.load(file)": "S301",
    "import pickle; pickle.loads(data)": "S301",
    "import pickle; pickle.Unpickler(file)": "S301",
    "from pickle import loads as read; read(data)": "S301",
    "import dill; dill.load(file)": "S301",
    "import shelve; shelve.open(name)": "S301",
    "import pandas; pandas.read_pickle(name)": "S301",
    "import marshal; marshal.loads(data)": "S302",
    "eval(text)": "S307",
    "exec(text)": "S102",
    "import os; os.system(text)": "S605",
    "import os; os.popen(text)": "S605",
    "import subprocess; subprocess.run(text, shell=True)": "S602",
    "import subprocess; subprocess.getoutput(text)": "S605",
    "run_it(text, shell=True)": "S604",
    "import yaml; yaml.load(text)": "S506",
    "import yaml; yaml.load(text, Loader=yaml.UnsafeLoader)": "S506",
    "import tempfile; tempfile.mktemp()": "S306",
    "import tarfile; tarfile.open(name).extractall()": "S202",
    "import requests; requests.get(url, verify=False)": "S501",
    "import logging.config; logging.config.listen()": "S612",
    "import jinja2; jinja2.Environment()": "S701",
}
FOUND_HERE = {
    "AutoModel.from_pretrained(name, trust_remote_code=True)": "trust_remote_code",
    "AutoModel.from_pretrained(name, trust_remote_code=asked)": "trust_remote_code",
    "AutoModel.from_pretrained(name, **{'trust_remote_code': True})": "trust_remote_code",
    "options = dict(trust_remote_code=True)": "trust_remote_code",
    "options['trust_remote_code'] = True": "trust_remote_code",
    "Options().trust_remote_code = True": "trust_remote_code",
    "torch.load(name)": "torch.load",
    "import torch as t; t.load(name, map_location=place)": "torch.load",
    "torch.load(name, weights_only=False)": "weights_only",
    "read(name, weights_only=asked)": "weights_only",
    "numpy.load(name, allow_pickle=True)": "allow_pickle",
    "options = {'allow_pickle': True}": "allow_pickle",
    "compile(text, name, 'exec')": "compile",
    "builtins.exec(text)": "exec",
    "joblib.load(name)": "joblib.load",
    "import joblib as j; j.load(name)": "joblib.load",
    "from cloudpickle import loads; loads(data)": "cloudpickle.loads",
    "torch.hub.load(name, model)": "torch.hub.load",
    "torch.jit.load(name)": "torch.jit.load",
    "yaml.unsafe_load(text)": "yaml.unsafe_load",
    "yaml.full_load(text)": "yaml.full_load",
    "options.register_custom_ops_library(name)": "register_custom_ops_library",
    "await asyncio.create_subprocess_shell(text)": "create_subprocess_shell",
}
ALLOWED = (
    "AutoModel.from_pretrained(name, trust_remote_code=False)",
    "torch.load(name, weights_only=True)",
    "numpy.load(name, allow_pickle=False)",
    "options = {'trust_remote_code': False}",
    "options.pop('trust_remote_code')",
    "re.compile(text)",
    "torch.compile(model)",
    "model.eval()",
    "json.load(file)",
    "yaml.safe_load(text)",
)
# Keyword -> the one value that it may have.
ARGUMENTS = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False}
FUNCTIONS = {
    *("joblib.load", "cloudpickle.load", "cloudpickle.loads", "torch.hub.load", "torch.jit.load"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("builtins.eval", "builtins.exec", "builtins.compile"),
}
METHODS = {"register_custom_ops_library", "create_subprocess_shell"}
# Their blocks are signatures of functions, and no programs.
SIGNATURES = {ROOT / "docs" / "python-api.md"}
# They run the cells of a notebook and the blocks of documents; and a checkpoint asks for remote code in its own files.
EXCEPTIONS = {
    "tools/notebook.py": {"compile"},
    "tests/consumers/scripts/bulk_files.py": {"compile"},
    "tests/integrations/test_page.py": {"compile"},
    "tests/triton/test_page.py": {"compile"},
    "tests/models/test_modules.py": {"trust_remote_code"},
}


def forbidden(source: str) -> Iterator[str]:
    """Yield the forbidden forms in a Python source that ruff does not find."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        for name, value in settings(node):
            if name in ARGUMENTS and not (isinstance(value, ast.Constant) and value.value is ARGUMENTS[name]):
                yield name
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            first, dot, rest = called.partition(".")
            called = names.get(first, first) + dot + rest
            if called == "torch.load" and all(each.arg != "weights_only" for each in node.keywords):
                yield called
            elif called == "compile" or called in FUNCTIONS:
                yield called.removeprefix("builtins.")
            elif (method := called.rpartition(".")[2]) in METHODS:
                yield method


def settings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names that a node gives a value, as a keyword, a key or an attribute, with the value."""
    if isinstance(node, ast.keyword) and node.arg is not None:
        yield node.arg, node.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Attribute):
                yield target.attr, node.value
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                yield str(target.slice.value), node.value


def dotted(node: ast.expr) -> str:
    """Return the name of what is called, with its modules or objects; of other expressions only the attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def sources() -> Iterator[tuple[str, str]]:
    """Yield every Python file of the repository, and every block of Python in its documents, with a name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        file = ROOT / name
        if name.endswith(".py") and file.is_file():
            yield name, file.read_text(encoding="utf-8")
        elif name.endswith(".md") and file.is_file() and file not in SIGNATURES:
            for block in MarkdownIt().parse(file.read_text(encoding="utf-8")):
                if block.type == "fence" and block.info.split()[:1] == ["python"]:
                    yield name, textwrap.dedent(block.content)


def ruff(*arguments: str, source: str | None = None) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("folder", FOLDERS)
def test_ruff_finds_each_form_in_each_folder(folder):
    lines = list(FOUND_BY_RUFF)
    found = ruff("--stdin-filename", f"{folder}/new_module.py", "-", source="\n".join(lines) + "\n")
    assert FOUND_BY_RUFF.items() - {(lines[each["location"]["row"] - 1], each["code"]) for each in found} == set()
    assert set(FOUND_BY_RUFF.values()) == set(RULES), "a rule without an example, or an example without its rule"


def test_what_ruff_does_not_find_is_found_here():
    for line, form in FOUND_HERE.items():
        assert list(forbidden(line)) == [form], line
    for line in ALLOWED:
        assert list(forbidden(line)) == [], line


def test_no_file_and_no_document_has_a_forbidden_form():
    names, found = set(), {}
    for name, source in sources():
        names.add(name)
        if forms := set(forbidden(source)):
            found[name] = forms
    assert found == EXCEPTIONS, "forbidden forms, or exceptions that nobody needs any more"
    assert {name.split("/")[0] for name in names} >= {*FOLDERS, "docs", "README.md"}


def test_files_that_ruff_leaves_out_are_tests_and_need_it():
    left_out = {(file, rule) for file, rules in RUFF["per-file-ignores"].items() for rule in rules if rule in RULES}
    found = ruff("--isolated", "--ignore-noqa", "--select", ",".join(RULES), ".")
    assert {(Path(str(each["filename"])).relative_to(ROOT).as_posix(), each["code"]) for each in found} == left_out
    assert all(file.startswith(("tests/", "tools/notebook.py")) for file, _ in left_out)
