"""Runs the blocks of the documents as a reader would: `console` in bash, `python` in Python, page by page.

The blocks of a page run from top to bottom in one empty folder, which has links to the folders of a checkout. Lines of
a `console` block that begin with `$ ` are commands, a `\\` continues them, and other lines are what the command before
shows. A page can `cd` and can set variables of Python, not of the shell. Comments tell what a reader need not see:

    <!-- needs: my-bundle my-model=my-bundle --> a model of THINGS (tests/test_pages.py) lies in the folder, once under
                                                 its name and once under another; `hub` is a stand-in of the hub
    <!-- shell                                   commands that run here, unseen: a set-up, or a check of what came
    echo "a text" > texts.txt -->
    <!-- python                                  the same in Python, in the namespace of the page's blocks
    assert summary.rows == 2 -->

Before a block, seen or unseen, and only for that block:

    <!-- not run: needs a GPU -->                the test says so by name; nothing else may stay unrun
    <!-- not run (gte-export owner/): needs the hub -->        only the commands that begin with these words
    <!-- run by: tests/serving/test_process.py -->             a test with the name of the page in it runs the block
    <!-- run: slow -->                           only `make test-slow` runs it, with all blocks before and after it
    <!-- run: in executorch -->                  only `make test-consumers` runs it, in that one of its environments
    <!-- background (gte-deploy serve): port 8080 -->    these commands end when the next of them begins, or the page
                                                 ends; their port is a free one, wherever the page says 8080
    <!-- output: numbers vary -->                of the output, numbers with a point or an exponent may be any

The output of a command in the background begins with what is shown; `curl` fails where the status is an error and the
page shows no answer.

`pip install` is not run: its extras must be those of pyproject.toml. A block in another language needs one of the first
two marks, unless it is plain text, JSON or a diff, or generated.

Output that is shown must be what the command prints on stdout and stderr, with these freedoms: white space counts as
one space; `…` and `...` stand for any text, also of several lines in a line of their own; a number in scientific
notation, or with a unit of time, size or rate, may be any number; another number with a point may differ by two in its
last digit.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from markdown_it import MarkdownIt

from environments import REQUIREMENTS

ROOT = Path(__file__).resolve().parents[2]
INERT = ("", "text", "diff", "json")
RUN = ("console", "python")
CHECKOUT = ("benchmarks", "docs", "examples", "tests", "tools", "pyproject.toml", "Makefile")
"""What the folder of a page has of the checkout."""
SECONDS = 550
GENERATED = "<!-- Written by "
_FILLED = re.compile(r"<!-- (?:generated: .*|file: \S+) -->")
_MARK = re.compile(r"<!-- (not run|run by|run|background|output)(?: \((.+)\))?(?:: (.+?))? -->", re.DOTALL)
_PORT = re.compile(r"port (\d+)")
_HIDDEN = re.compile(r"<!-- ?(needs:|shell\b|python\b)(.*)-->", re.DOTALL)


class Wrong(AssertionError):
    """A block that fails, shows what is not so, or has a mark that says nothing."""


@dataclass(frozen=True)
class Command:
    """A command of a `console` block, its line in the page, and what the page shows of its output."""

    line: int
    text: str
    shown: tuple[str, ...]

    def begins(self, words: str) -> bool:
        return self.text == words or self.text.startswith(words)


@dataclass(frozen=True)
class Block:
    """A block of a page: what it is in, its first line, its text, and its marks as (mark, words, value)."""

    kind: str
    line: int
    text: str
    marks: tuple[tuple[str, str, str], ...] = ()
    filled: bool = False

    def commands(self) -> list[Command]:
        found: list[Command] = []
        lines = iter(enumerate(self.text.splitlines(), self.line + 1))
        for number, line in lines:
            if line.startswith("$ "):
                text = line[2:]
                while text.endswith("\\"):
                    text += "\n" + next(lines)[1]
                found.append(Command(number, text, ()))
            elif not found and self.unrun() is not None:
                return []
            elif not found:
                raise Wrong(f"line {number}: output before the first command, or a command without $")
            else:
                last = found.pop()
                found.append(Command(last.line, last.text, (*last.shown, line)))
        return found

    def marked(self, mark: str) -> list[tuple[str, str]]:
        return [(words, value) for name, words, value in self.marks if name == mark]

    @property
    def run(self) -> str:
        """Where it runs: "" in every run of the tests, "slow", or "in ENVIRONMENT"."""
        return next((value for _, value in self.marked("run")), "")

    def unrun(self, command: Command | None = None) -> str | None:
        """Return why the block, or a command of it, does not run here."""
        for words, value in [*self.marked("not run"), *self.marked("run by")]:
            if not words or (command is not None and command.begins(words)):
                return value
        return None


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page, also the hidden ones, in their order.

    Raises:
        Wrong: a comment of this module's form that no block follows, or that has another form.
    """
    found: list[Block] = []
    marks: list[tuple[str, str, str]] = []
    filled = False
    for token in MarkdownIt().parse(text):
        line = (token.map or [0])[0] + 1
        if token.type == "fence":
            kind = token.info.split(" ")[0]
            found.append(Block(kind, line, token.content, tuple(marks), filled))
            marks, filled = [], False
        elif token.type == "html_block" and (hidden := _HIDDEN.match(token.content)):
            kind = hidden[1].strip(":")
            found.append(Block(kind, line, hidden[2].strip() + "\n", () if kind == "needs" else tuple(marks)))
            marks = marks if kind == "needs" else []
        elif token.type == "html_block":
            filled = bool(_FILLED.match(token.content))
            for mark in _MARK.finditer(token.content):
                marks.append((mark[1], mark[2] or "", " ".join((mark[3] or "").split())))
        elif marks:
            raise Wrong(f"line {line}: a mark stands right before its block: {marks}")
    if marks:
        raise Wrong(f"a mark without a block: {marks}")
    return found


def check_marks(page: str, found: list[Block]) -> None:
    """Raise Wrong if a block has neither a way to run nor a reason, or if a mark is wrong."""
    for block in found:
        where = f"{page}:{block.line}"
        commands = block.commands() if block.kind == "console" and block.text else []
        for mark, words, value in block.marks:
            if words and not any(command.begins(words) for command in commands):
                raise Wrong(f"{where}: no command begins with {words!r}")
            if mark == "not run" and not value:
                raise Wrong(f"{where}: why is it not run?")
            if mark == "background" and value and not _PORT.fullmatch(value):
                raise Wrong(f"{where}: {mark}: {value} is no mark")
            ways = {"run": ("slow", *(f"in {name}" for name in REQUIREMENTS)), "output": ("numbers vary",)}
            if mark in ways and value not in ways[mark]:
                raise Wrong(f"{where}: {mark}: {value} is no mark")
            if mark == "run by":
                name = page.rpartition("/")[2] if page.startswith("docs/") else page
                test = ROOT / value
                if not test.is_file() or name not in test.read_text(encoding="utf-8"):
                    raise Wrong(f"{where}: {value} is no file that names {name}")
        known = block.kind in (*RUN, *INERT, "shell", "needs")
        if not known and not block.filled and block.unrun() is None:
            raise Wrong(f"{where}: nothing runs this block of {block.kind}, and no mark says why")


def not_run(page: str, found: list[Block]) -> dict[str, list[str]]:
    """Return reason -> the blocks and commands of a page that nothing runs."""
    reasons: dict[str, list[str]] = {}
    for block in found:
        for words, reason in block.marked("not run"):
            commands = block.commands() if block.kind == "console" else []
            named = [each.text.split("  #")[0].strip() for each in commands if not words or each.begins(words)]
            reasons.setdefault(reason, []).extend(named or [f"the block of line {block.line}"])
    return reasons


def runs(found: list[Block]) -> set[str]:
    """Return where something of a page runs: see `Block.run`."""
    ours = [block for block in found if block.kind in RUN and not (block.filled or block.unrun())]
    whole = [block for block in ours if block.kind == "python" or any(not block.unrun(one) for one in block.commands())]
    return {block.run for block in whole}


Thing = Path | Mapping[str, str]
"""What a page needs: a folder or file that it finds under a name, or variables of the environment."""


def run_page(page: Path, folder: Path, thing: Callable[[str], Thing], *, way: str = "", python: str = "") -> None:
    """Run the blocks of a page in an empty folder.

    Args:
        page: The file.
        folder: Where its commands run. It gets links to CHECKOUT.
        thing: Gives what a name after `needs:` stands for.
        way: Run the blocks with this value of `Block.run` as well.
        python: The interpreter of these; by default, that of this process.

    Raises:
        Wrong: a block failed, or showed something else.
    """
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    with _Reader(page.relative_to(ROOT).as_posix(), folder) as reader:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.kind == "needs":
                for word in block.text.split():
                    name, _, source = word.partition("=")
                    if not (folder / name).exists():
                        reader.take(name, thing(source or name))
            elif block.filled or block.unrun() is not None or block.run not in ("", way):
                continue
            elif block.kind == "python":
                reader.python(block)
            elif block.kind == "shell":
                reader.command(Command(block.line, block.text, ()))
            elif block.kind == "console":
                reader.use(python if block.run else "")
                for command in block.commands():
                    if block.unrun(command) is None:
                        vary = bool(block.marked("output"))
                        staying = [value for words, value in block.marked("background") if command.begins(words)]
                        if staying:
                            reader.stay(command, vary, port=staying[0].removeprefix("port "))
                        else:
                            reader.command(command, vary=vary)
                reader.use("")


def same(shown: list[str], printed: str, *, vary: bool = False) -> bool:
    """Return whether a command printed what a page shows; the module's docstring has the freedoms."""
    pattern = "".join(rf"(?:{_line(each, vary)})\n" if each.strip() not in _ANY else r"(?:.*\n)*?" for each in shown)
    lines = (" ".join(line.split()) for line in printed.rstrip().splitlines())
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


_ANY = ("…", "...")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(…|\.\.\.)|(?<![\w.])({_DIGITS}(?:\.\d+)?(?:e[+-]?\d+)?)(?= ?(?:([a-zµ%/]+)\b)?)", re.IGNORECASE
)
_UNITS = (
    "µs",
    "ms",
    "s",
    "min",
    "h",
    "b",
    "kb",
    "mb",
    "gb",
    "tb",
    "kib",
    "mib",
    "gib",
    "texts/s",
    "tokens/s",
    "rows/s",
)


def _line(shown: str, vary: bool) -> str:
    """Return a regular expression for what may stand in place of a line."""
    result, end, text = "", 0, " ".join(shown.split())
    for match in _NUMBER.finditer(text):
        result += re.escape(text[end : match.start()])
        end = match.end()
        if match[1]:
            result += ".*"
            continue
        number, unit = match[2], (match[3] or "").lower()
        scientific, decimal = "e" in number.lower(), "." in number
        if scientific or (decimal and vary) or unit in _UNITS:
            result += rf"{_DIGITS}(?:\.\d+)?(?:e[+-]?\d+)?"
        elif decimal:
            result += _near(number)
        else:
            result += re.escape(number)
    return result + re.escape(text[end:])


def _near(number: str) -> str:
    """Return a regular expression for the numbers that differ by at most two in the last digit."""
    places = len(number.partition(".")[2])
    middle = round(float(number.replace(",", "")) * 10**places)
    form = f"{{:{',' if ',' in number else ''}.{places}f}}"
    return f"(?:{'|'.join(re.escape(form.format(each / 10**places)) for each in range(middle - 2, middle + 3))})"


def _pip(command: str) -> bool:
    return re.match(r"(python3? -m )?pip install\b", command) is not None


def _check_pip(where: str, command: str) -> None:
    """Raise Wrong if an extra is not one of the project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in shlex.split(command, comments=True):
        if match := re.fullmatch(rf"(?:\.|{project['name']})\[(.+)\]", word):
            unknown = set(match[1].split(",")) - set(project["optional-dependencies"])
            if unknown:
                raise Wrong(f"{where}: there is no extra {', '.join(sorted(unknown))}")


# Executes blocks in one namespace. Its replies go to a pipe of their own, since the blocks have stdout.
_DRIVER = """
import json, linecache, os, sys, traceback
replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
sys.path.insert(0, os.getcwd())
space = {"__name__": "__main__"}
for request in sys.stdin:
    name, first, code = json.loads(request)
    try:
        exec(compile("\\n" * first + code, name, "exec"), space)
        failed = ""
    except BaseException:
        failed = traceback.format_exc()
    sys.stdout.flush()
    replies.write(json.dumps(failed) + "\\n")
"""


@dataclass
class _Reader:
    """Who tries the commands of a page."""

    page: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    at: Path = field(init=False)
    staying: subprocess.Popen[bytes] | None = None
    ports: dict[str, str] = field(default_factory=dict)
    """A port of the page -> the port that a command in the background listens on in its place."""
    interpreter: subprocess.Popen[str] | None = None
    replies: IO[str] | None = None

    def __enter__(self) -> _Reader:
        self.at = self.folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "120",
            "HOME": str(self.folder),
        }
        self.use("")
        return self

    def take(self, name: str, thing: Thing) -> None:
        if isinstance(thing, Path):
            (self.folder / name).symlink_to(thing)
        else:
            self.environment.update(thing)

    def use(self, python: str) -> None:
        """Let commands run with this interpreter, which has the packages of this project but not the project."""
        first = [Path(sys.executable).parent]
        if python:
            tools = self.folder / ".tools"
            tools.mkdir(exist_ok=True)
            for name, module in (("gte-deploy", "gte_deploy.cli"), ("gte-export", "gte_deploy.exporters.cli")):
                code = f"import sys; from {module} import main; sys.exit(main())"
                (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(python)} -c {shlex.quote(code)} "$@"\n')
                (tools / name).chmod(0o755)
            first = [tools, Path(python).parent]
        self.environment["PATH"] = os.pathsep.join([*map(str, first), os.environ["PATH"]])

    def __exit__(self, *error: object) -> None:
        self.end_staying()
        if self.interpreter is not None and self.interpreter.stdin is not None and self.replies is not None:
            self.interpreter.stdin.close()
            self.interpreter.wait(timeout=60)
            self.replies.close()

    def here(self, text: str) -> str:
        """Return a text of the page with the ports of this run."""
        for port, listening in self.ports.items():
            text = re.sub(rf":{port}\b", f":{listening}", text)
        return text

    def command(self, command: Command, *, vary: bool = False) -> None:
        where = f"{self.page}:{command.line}"
        if _pip(command.text):
            _check_pip(where, command.text)
            return
        command = Command(command.line, self.here(command.text), tuple(map(self.here, command.shown)))
        judged = [] if any(line.strip() not in _ANY for line in command.shown) else ["fail"]
        (self.folder / ".curlrc").write_text("\n".join(["no-progress-meter", *judged, ""]), encoding="utf-8")
        place = self.folder / ".place"
        script = f"{command.text}\n__code=$?; pwd > {shlex.quote(str(place))}; exit $__code\n"
        with subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.at,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise Wrong(f"{where}: not finished after {SECONDS} s:\n$ {command.text}") from None
        if process.returncode:
            raise Wrong(f"{where}: exit code {process.returncode}\n$ {command.text}\n{printed[-6000:]}")
        self.at = Path(place.read_text(encoding="utf-8").strip())
        self.compare(where, command, printed, vary)

    def stay(self, command: Command, vary: bool, *, port: str = "") -> None:
        """Start a command and wait until it has printed what is shown; more may follow."""
        self.end_staying()
        where = f"{self.page}:{command.line}"
        text, wanted = command.text, [*(command.shown or ["…"]), "…"]
        if port:
            rest = re.sub(rf" --port {port}\b", "", text.partition("  #")[0])
            text, wanted = f"{rest} --port 0", [re.sub(rf":{port}\b", ":…", line) for line in wanted]
        log = self.folder / ".staying.log"
        with log.open("wb") as output:
            self.staying = subprocess.Popen(
                ["bash", "-c", f"exec {text}"],
                cwd=self.at,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + SECONDS / 2
        while not (printed := log.read_text(errors="replace")).strip() or not same(wanted, printed, vary=vary):
            if self.staying.poll() is not None or time.monotonic() > deadline:
                self.compare(where, Command(command.line, text, tuple(wanted)), printed, vary)
                raise Wrong(f"{where}: ended with {self.staying.poll()}\n$ {text}\n{printed[-6000:]}")
            time.sleep(0.1)
        if port:
            listening = re.search(r":(\d+)\b", printed)
            if listening is None:
                raise Wrong(f"{where}: it does not print the port that stands for {port}\n$ {text}\n{printed[-6000:]}")
            self.ports[port] = listening[1]

    def end_staying(self) -> None:
        if self.staying is not None:
            self.staying.send_signal(signal.SIGINT)
            try:
                self.staying.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.staying.kill()
                self.staying.wait()
            self.staying = None

    def compare(self, where: str, command: Command, printed: str, vary: bool) -> None:
        if command.shown and not same(list(command.shown), printed, vary=vary):
            lines = ([line[:300] for line in printed.rstrip().splitlines()], list(command.shown))
            difference = "\n".join(difflib.unified_diff(*reversed(lines), "shown", "printed", lineterm="", n=100))
            raise Wrong(f"{where}: the page shows something else\n$ {command.text}\n{difference}")

    def python(self, block: Block) -> None:
        output = self.folder / ".python.log"
        if self.interpreter is None:
            reading, writing = os.pipe()
            with output.open("w") as file:
                self.interpreter = subprocess.Popen(
                    [sys.executable, "-c", _DRIVER, str(writing)],
                    cwd=self.at,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    pass_fds=[writing],
                )
            os.close(writing)
            self.replies = os.fdopen(reading)
        assert self.interpreter.stdin is not None and self.replies is not None
        self.interpreter.stdin.write(json.dumps([self.page, block.line, self.here(block.text)]) + "\n")
        self.interpreter.stdin.flush()
        reply = self.replies.readline()
        failed = json.loads(reply) if reply else f"Python ended with {self.interpreter.wait(timeout=60)}"
        if failed:
            raise Wrong(f"{self.page}:{block.line}: {failed}\n{output.read_text(errors='replace')[-4000:]}")
