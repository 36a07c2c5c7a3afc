"""The images of examples/, without a Docker engine: linted, read, and their steps done in a clean folder."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "examples" / "server"
DOCKERFILE = SERVER / "Dockerfile"
DOCKERFILES = sorted(path for path in (ROOT / "examples").rglob("Dockerfile*") if path.suffix != ".dockerignore")
COMPOSE = yaml.safe_load((SERVER / "compose.yaml").read_text(encoding="utf-8"))
USER = 10001

Step = tuple[str, str]
"""An instruction of a Dockerfile and its value."""


def steps(path: Path) -> list[Step]:
    return [(each["instruction"], each["value"]) for each in DockerfileParser(str(path)).structure]


def last_stage(path: Path) -> list[Step]:
    found = steps(path)
    start = max(number for number, (instruction, _) in enumerate(found) if instruction == "FROM")
    return found[start:]


def program(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def hadolint(path: Path) -> list[dict[str, Any]]:
    command = [program("hadolint"), "--format", "json", path]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_hadolint_finds_nothing(path: Path) -> None:
    assert hadolint(path) == []


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text(encoding="utf-8").replace("-slim-bookworm", "").replace(":${PYTHON}", ""))
    assert "DL3006" in {each["code"] for each in hadolint(broken)}


def test_image_runs_without_rights() -> None:
    stage = dict(last_stage(DOCKERFILE))
    assert stage["USER"] == f"{USER}:{USER}", "Kubernetes can only check a number against runAsNonRoot"
    assert json.loads(stage["ENTRYPOINT"]) == ["gte-deploy", "serve"]
    assert {instruction for instruction, _ in steps(DOCKERFILE)}.isdisjoint({"ADD", "VOLUME"})
    # Nothing that is only needed to install comes along.
    assert [value for instruction, value in last_stage(DOCKERFILE) if instruction == "COPY"] == [
        "--from=build /opt/gte /opt/gte"
    ]


def test_ports_agree() -> None:
    stage = dict(last_stage(DOCKERFILE))
    command = json.loads(stage["CMD"])
    port = command[command.index("--port") + 1]
    assert stage["EXPOSE"] == port
    assert f"http://127.0.0.1:{port}/health" in stage["HEALTHCHECK"]
    for service in COMPOSE["services"].values():
        assert service["command"] == command
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"], "a port of compose is open to the network by default"


def test_every_service_of_compose_is_locked_up() -> None:
    assert COMPOSE["services"].keys() == {"gte", "gte-gpu"}
    for service in COMPOSE["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        (volume,) = service["volumes"]
        assert volume["target"] == json.loads(dict(last_stage(DOCKERFILE))["CMD"])[0]
        assert volume["read_only"]
        assert (SERVER / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILE


@pytest.mark.parametrize(("old", "new", "code"), [("", "", 0), ("read_only: true", "read_only: 7", 1)])
def test_compose_file_is_as_its_specification_says(old: str, new: str, code: int, tmp_path: Path) -> None:
    """The schema of compose-spec comes with check-jsonschema. A wrong file shows that it is used."""
    file = tmp_path / "compose.yaml"
    file.write_text((SERVER / "compose.yaml").read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr


def test_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = program("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    command = [docker, "compose", "--file", SERVER / "compose.yaml", "--profile", "gpu", "config", "--quiet"]
    subprocess.run(command, check=True, env={**os.environ, "BUNDLE": str(tmp_path)}, timeout=60)


def in_context(path: Path) -> bool:
    """Whether a path of the checkout is sent to the builder: as the lines of .dockerignore say, the last one wins."""
    found = True
    for line in (SERVER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, sent = line.removeprefix("!"), line.startswith("!")
        parents = [str(path), *map(str, path.parents)][:-1]
        if any(fnmatch.fnmatch(each, pattern.removeprefix("**/")) for each in parents) or (
            pattern.startswith("**/") and any(fnmatch.fnmatch(part, pattern[3:]) for part in path.parts)
        ):
            found = sent
    return found


def test_context_has_what_is_copied_and_no_more() -> None:
    copied = {
        source
        for instruction, value in steps(DOCKERFILE)
        if instruction == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    }
    assert {path.name for path in ROOT.iterdir() if in_context(Path(path.name))} == copied
    assert not in_context(Path("models/__pycache__/reading.pyc"))


def test_the_whole_package_is_copied(tmp_path: Path) -> None:
    """A folder of pyproject.toml that the image lacks would be missed at the first import only."""
    included = re.search(r"^include = (.*)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert included is not None
    links = {path.resolve() for path in (ROOT / "gte_deploy").iterdir() if path.is_symlink()}
    folders = {ROOT / name.rstrip("*") for name in json.loads(included[1])} | links
    assert all(in_context(path.relative_to(ROOT)) for path in folders)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stands for /: the steps of the first stage are done there, by the same commands."""
    root = tmp_path_factory.mktemp("image")
    arguments: dict[str, str] = {}
    folder = root
    for instruction, value in steps(DOCKERFILE):
        if instruction == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = default
        elif instruction == "WORKDIR":
            folder = root / value.strip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY" and not value.startswith("--from"):
            *sources, target = value.split()
            for source in sources:
                copy_into(ROOT / source, folder / target)
        elif instruction == "RUN":
            command = value.replace("/opt/gte", str(root / "opt" / "gte"))
            environment = {**os.environ, **arguments, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            environment.pop("PYTHONPATH", None)
            subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, check=True, timeout=900)
        elif instruction == "COPY":
            break  # the second stage copies /opt/gte and adds nothing
    return root


def copy_into(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


@contextmanager
def served(root: Path, bundle: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """The image's command on its own disk, read-only, as its user, who has no rights and no home."""
    stage = last_stage(DOCKERFILE)
    values = dict(stage)
    command = [*json.loads(values["ENTRYPOINT"]), *json.loads(values["CMD"])]
    command = [str(bundle) if each == "/bundle" else each for each in command]
    command[command.index("--port") + 1] = str(port)
    (variables,) = (value for instruction, value in stage if instruction == "ENV")
    environment = dict(each.split("=", 1) for each in shlex.split(variables))
    environment["PATH"] = environment["PATH"].replace("/opt/gte", str(root / "opt" / "gte"))
    environment["PATH"] = environment["PATH"].replace("$PATH", "/usr/bin:/bin")
    locked = ["unshare", "--mount", "sh", "-ec", 'mount -o bind,ro "$0" "$0"; exec "$@"', root]
    # It may read all, as in an image: Python itself can lie in a folder of root.
    reads = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", *reads]
    probe = subprocess.run([*locked, *user, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no mount of our own or other user here: {probe.stderr.strip()[-100:]}")
    log = root.parent / "server.log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [*locked, *user, *command], env=environment, cwd="/", stdout=output, stderr=output, text=True
        )
    try:
        yield server
    finally:
        server.kill()
        server.wait()
        print(log.read_text(encoding="utf-8")[-4000:])


def asked(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or "null")


@pytest.mark.slow
def test_steps_of_the_image_in_a_clean_folder(image: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    installed = {path.name.partition("-")[0].lower() for path in (image / "opt").rglob("*.dist-info")}
    assert {"gte_deploy", "onnxruntime", "starlette", "uvicorn"} <= installed
    assert installed.isdisjoint({"torch", "transformers", "onnx", "pip", "setuptools"})

    bundle = tmp_path_factory.mktemp("mounted") / "bundle"
    from gte_deploy.exporters.export import export

    export(output=bundle)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with served(image, bundle, port) as server:
        deadline = time.monotonic() + 120
        while True:
            try:
                asked(f"{address}/ready")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline
                time.sleep(0.2)
        answers = asked(f"{address}/fill-mask", {"inputs": "The president of the united [MASK] of America."})
        assert answers[0]["token_str"] == "states"
        health = json.loads(dict(last_stage(DOCKERFILE))["HEALTHCHECK"].partition("CMD ")[2])
        program = health[2].replace(":8080/", f":{port}/")
        subprocess.run([image / "opt/gte/bin/python", "-c", program], check=True, timeout=30)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
