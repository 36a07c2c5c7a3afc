"""Writes the bill of materials (SBOM) of a wheel: every package that pip installs with it, in CycloneDX JSON.

    .venv/bin/python tools/sbom.py dist/gte_deploy-0.1.0-py3-none-any.whl --extras cpu,serve

It installs the wheel and these extras in an environment of its own, which is removed again; cyclonedx-py lists what is
there, and checks the list against the schema of CycloneDX. The file lies beside the wheel: NAME.cdx.json.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import parse_wheel_filename

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_DYNAMIC = 'dynamic = ["version"]'
_EXTRAS = "cpu,serve"


def write_sbom(wheel: Path, extras: str = _EXTRAS) -> Path:
    """Write the SBOM of a wheel with its extras, separated by commas; return the file.

    Raises:
        subprocess.CalledProcessError: pip cannot install the wheel, or the list does not match the schema.
    """
    version = parse_wheel_filename(wheel.name)[1]
    output = wheel.with_name(f"{wheel.stem}.cdx.json")
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        venv.create(environment, with_pip=False)
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, f"{wheel.resolve()}[{extras}]"], check=True)
        project = Path(folder, "pyproject.toml")
        text = _PROJECT.read_text(encoding="utf-8")
        project.write_text(text.replace(_DYNAMIC, f'version = "{version}"'), encoding="utf-8")
        listing = [sys.executable, "-m", "cyclonedx_py", "environment", "--validate", "--output-reproducible"]
        listing += ["--pyproject", str(project), "--mc-type", "library", "--output-format", "JSON"]
        subprocess.run([*listing, "--output-file", str(output), str(python)], check=True)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Write the SBOM of a wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    parser.add_argument("--extras", default=_EXTRAS, metavar="NAMES", help=f"with commas (default: {_EXTRAS})")
    options = parser.parse_args(argv)
    print(write_sbom(options.wheel, options.extras))
    return 0


if __name__ == "__main__":
    sys.exit(main())
