"""Asks OSV, by pip-audit, for known vulnerabilities of every package in this environment.

    .venv/bin/python tools/audit.py

Exit code 0: every package was looked up, and none has a known vulnerability. 1: some have; they are printed. 2: some
could not be looked up, so nobody knows. pip-audit itself says "No known vulnerabilities found" then.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

_OWN = "gte-deploy"
_TIMEOUT_S = 30
_SHOWN = 5
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2


def installed() -> list[str]:
    """Return a requirement, ==, for every installed package but this project, without the tags of local builds."""
    found = {(each.metadata["Name"], Version(each.version).public) for each in importlib.metadata.distributions()}
    return sorted(f"{name}=={version}" for name, version in found if name != _OWN)


def findings(report: Any) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print for a report of pip-audit in JSON."""
    packages = report["dependencies"]
    lines = [
        f"{package['name']} {package['version']}: {found['id']} ({', '.join(found['aliases']) or 'no other name'}), "
        f"fixed in {', '.join(found['fix_versions']) or 'no version'}: {found['description'][:200]}"
        for package in packages
        for found in package.get("vulns", [])
    ]
    skipped = [package for package in packages if "skip_reason" in package]
    looked_up = f"{len(packages) - len(skipped)} of {len(packages)} packages were looked up"
    if skipped:
        lines += [f"{package['name']}: {package['skip_reason']}" for package in skipped[:_SHOWN]]
        lines.append(f"{looked_up}; of the others nobody knows. Run it again where the data of OSV can be reached.")
    elif not lines:
        lines.append(f"{looked_up}; none has a known vulnerability")
    return (VULNERABLE if any(package.get("vulns") for package in packages) else UNKNOWN if skipped else CLEAN), lines


def main(argv: Sequence[str] | None = None) -> int:
    """Look up every installed package; return one of the exit codes above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv-url", metavar="URL", help="a mirror of OSV (default: OSV itself)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        requirements, cache = Path(folder, "requirements.txt"), Path(folder, "cache")
        requirements.write_text("\n".join(installed()), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--format",
            "json",
            "--progress-spinner",
            "off",
            "--aliases",
            "on",
        ]
        command += ["--desc", "on", "--no-deps", "--disable-pip", "--requirement", str(requirements)]
        command += ["--vulnerability-service", "osv", "--timeout", str(_TIMEOUT_S), "--cache-dir", str(cache)]
        command += [] if options.osv_url is None else ["--osv-url", options.osv_url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        code, lines = findings(json.loads(done.stdout))
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:] or [f"pip-audit ended with {done.returncode}"]
        code, lines = UNKNOWN, [f"The data of vulnerabilities cannot be reached, so nothing was looked up: {said[0]}"]
    print("\n".join(lines), file=sys.stdout if code == CLEAN else sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
