"""Check the files that git tracks for faults that no linter finds; print each fault, and exit with 1 if there is one.

Source files and documents end with one newline, have no white space at line ends and no conflict markers; JSON, TOML
and YAML parse; symbolic links have a target; no file is larger than 1 MiB, except those that are listed here.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 1 << 20
LARGE = ("models/builtin/gte_en_mlm_tiny/model.safetensors", "models/builtin_embed/onnx/model.onnx_data")
# Files byte for byte as tests need them.
RAW = "tests/reliability/corpus/"
# Files written by hand. Other text is data, and keeps the form in which its library wrote it.
WRITTEN = {"", ".md", ".py", ".toml", ".yaml", ".yml"}
PARSERS: dict[str, Callable[[str], object]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": lambda text: list(yaml.safe_load_all(text)),
}


def faults(file: Path) -> Iterator[str]:
    """Yield the faults of a file, one line each."""
    if not file.exists():
        yield "the link leads nowhere" if file.is_symlink() else "git tracks it, and it is not there"
        return
    if file.is_dir():  # a link to a folder, whose files are checked under their own names
        return
    data = file.read_bytes()
    if len(data) > MAX_BYTES and file.relative_to(ROOT).as_posix() not in LARGE:
        yield f"{len(data):,} bytes are more than {MAX_BYTES:,}; if it belongs here, list it in tools/check_files.py"
    if b"\0" in data or file.relative_to(ROOT).as_posix().startswith(RAW):
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield f"it is neither binary nor UTF-8: {error}"
        return
    yield from style_faults(text) if file.suffix in WRITTEN else ()
    try:
        PARSERS.get(file.suffix, str)(text)
    except (ValueError, yaml.YAMLError) as error:
        yield f"it cannot be parsed: {error}"


def style_faults(text: str) -> Iterator[str]:
    """Yield the faults of a text: its white space, and the marks of an unfinished merge."""
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        yield "it does not end with one newline"
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip(" \t\r"):
            yield f"line {number} ends with white space"
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            yield f"line {number} is a conflict marker"


def main() -> int:
    """Check every tracked file."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        print("This is no git checkout, or git is missing: no file was checked.", file=sys.stderr)
        return 0
    # A checkout may belong to another user, as in containers; git only lists names here.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = [f"{name}: {fault}" for name in filter(None, names.split("\0")) for fault in faults(ROOT / name)]
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
