"""The audit of installed packages, asked of a stand-in for OSV; and the bill of materials of the wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import gte_deploy
from loading import load_file
from packages import ROOT, build, packaged_tree

FLAW = {
    "id": "PYSEC-2099-1",
    "schema_version": "1.6.0",
    "aliases": ["CVE-2099-1"],
    "summary": "arrays may be read beyond their end",
    "affected": [
        {
            "package": {"name": "numpy", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


@pytest.fixture
def osv() -> Iterator[tuple[str, dict[str, str], set[str]]]:
    """The URL of a stand-in for OSV, the versions that it was asked for, and the packages with a flaw."""
    asked: dict[str, str] = {}
    flawed: set[str] = set()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            asked[name] = query["version"]
            data = json.dumps({"vulns": [FLAW]} if name in flawed else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked, flawed
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "audit.py", "--osv-url", url],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        check=False,
    )


def test_every_installed_package_is_looked_up(osv):
    url, asked, _ = osv
    done = audit(url)
    assert done.returncode == 0, done.stderr
    assert "none has a known vulnerability" in done.stdout
    assert asked["numpy"] == importlib.metadata.version("numpy") and "gte-deploy" not in asked
    assert len(asked) > 50 and not any("+" in version for version in asked.values())


def test_a_known_vulnerability_fails_with_its_name(osv):
    url, _, flawed = osv
    flawed.add("numpy")
    done = audit(url)
    assert done.returncode == 1
    assert "numpy" in done.stderr and "PYSEC-2099-1 (CVE-2099-1), fixed in 99.0: arrays may be" in done.stderr


def test_data_that_cannot_be_reached_are_no_clean_bill(osv):
    """pip-audit ends with a traceback, or says that it found nothing."""
    done = audit("http://127.0.0.1:9/v1/query")
    assert done.returncode == 2 and done.stdout == ""
    assert "The data of vulnerabilities cannot be reached, so nothing was looked up" in done.stderr


def test_packages_that_were_skipped_are_no_clean_bill():
    tool = load_file(ROOT / "tools" / "audit.py", "audit")
    # As pip-audit 2.10.1 answers with code 0 where PyPI does not answer.
    reason = "Dependency not found on PyPI and could not be audited: urllib3 (2.0.7)"
    report = {
        "dependencies": [
            {"name": "numpy", "version": "1.26.0", "vulns": []},
            {"name": "urllib3", "skip_reason": reason},
        ],
        "fixes": [],
    }
    code, lines = tool.findings(report)
    assert code == tool.UNKNOWN and f"urllib3: {reason}" in lines and "1 of 2 packages were looked up" in lines[-1]
    del report["dependencies"][1]
    assert tool.findings(report) == (tool.CLEAN, ["1 of 1 packages were looked up; none has a known vulnerability"])


@pytest.mark.consumers
def test_the_bill_of_materials_lists_what_pip_installs(tmp_path):
    """By cyclonedx-py, and judged by the schema in cyclonedx-python-lib and by the metadata of the wheel."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    wheel = build("wheel", packaged_tree(tmp_path / "tree"), tmp_path / "dist")
    command = [sys.executable, ROOT / "tools" / "sbom.py", wheel, "--extras", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip().splitlines()[-1])
    text = file.read_text(encoding="utf-8")
    assert file == wheel.with_name(f"{wheel.stem}.cdx.json") and str(tmp_path) not in text
    sbom = json.loads(text)
    judge = JsonStrictValidator(SchemaVersion.from_version(sbom["specVersion"]))
    assert judge.validate_str(text) is None
    assert judge.validate_str(json.dumps({**sbom, "components": [{"name": "no type"}]})) is not None
    root = sbom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("gte-deploy", gte_deploy.__version__)
    components = {each["name"].lower().replace("_", "-"): each for each in sbom["components"]}
    assert {"numpy", "tokenizers", "huggingface-hub", "onnxruntime"} <= components.keys() and "torch" not in components
    assert components["numpy"]["purl"] == f"pkg:pypi/numpy@{components['numpy']['version']}"
    (needs,) = (each["dependsOn"] for each in sbom["dependencies"] if each["ref"] == root["bom-ref"])
    direct = {name.split("==")[0].lower().replace("_", "-") for name in needs}
    assert {"numpy", "tokenizers", "huggingface-hub", "onnxruntime"} <= direct <= components.keys()
