"""The command that installs an extra of this package. It works from where the user is: the package is on no index."""

import importlib.util
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

_DISTRIBUTION = "gte-deploy"
_PACKAGE = Path(__file__).resolve().parents[1]


def install_command(extra: str, *others: str) -> str:
    """Return the command that adds an extra to the installed package.

    Args:
        extra: the extra, or several with commas.
        others: requirements of further packages.
    """
    return " ".join([_pip(), *(_quoted(one) for one in (*_requirements(extra), *others))])


def _requirements(extra: str) -> list[str]:
    """Return the arguments of pip for the place that the package came from."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file():
        # Without --editable, pip would put a copy in the place of the checkout.
        return ["--editable", _with_extra(checkout, extra)]
    # These load much that a program which misses nothing does not need.
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        found = distribution(_DISTRIBUTION)
    except PackageNotFoundError:
        return [f"{_DISTRIBUTION}[{extra}]"]
    # Where pip, uv and others note what was installed from elsewhere than an index (PEP 610).
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    url = urlsplit(origin.get("url", ""))
    if url.scheme == "file":
        path = Path(url2pathname(url.path))
        return [_with_extra(path, extra)] if path.exists() else _packages_of(extra, found.requires or [])
    if "vcs_info" in origin:
        return [f"{_DISTRIBUTION}[{extra}] @ {origin['vcs_info']['vcs']}+{origin['url']}"]
    return [f"{_DISTRIBUTION}[{extra}]" + (f" @ {origin['url']}" if origin else "")]


def _packages_of(extra: str, requires: list[str]) -> list[str]:
    """Return the packages of an extra by name. The file that the package was installed from is gone."""
    # A line of the metadata: onnxruntime>=1.23; python_version >= "3.11" and extra == "cpu"
    split = [line.partition(";") for line in requires]
    chosen = [
        (name.strip(), marker)
        for name, _, marker in split
        if any(f'extra == "{one}"' in marker.replace("'", '"') for one in extra.split(","))
    ]
    found: list[str] = []
    for name, marker in chosen:
        if name.startswith(f"{_DISTRIBUTION}["):  # an extra may consist of others
            found += _packages_of(name.partition("[")[2].partition("]")[0], requires)
            continue
        versions = " and ".join(part for part in marker.split(" and ") if "extra ==" not in part).strip(" ()")
        found.append(f"{name}; {versions}" if versions else name)
    return found


def _with_extra(path: Path, extra: str) -> str:
    here = path.is_dir() and path == Path.cwd()
    return f"{'.' if here else path}[{extra}]"


def _pip() -> str:
    """Return pip of this Python, or uv where it has none."""
    beside = Path(sys.executable).parent
    found = shutil.which("pip")
    if found is not None and Path(found).parent == beside:
        return "pip install"
    if importlib.util.find_spec("pip") is not None:
        return f"{_quoted(sys.executable)} -m pip install"
    return f"uv pip install --python {_quoted(sys.executable)}"


def _quoted(word: str) -> str:
    """Quote an argument for the usual shell of this system. The shells of Windows know only double quotes."""
    if word.startswith("--"):
        return word
    return f'"{word}"' if os.name == "nt" else shlex.quote(word)
