"""No command and no call talks to anyone, forks, or writes elsewhere than into the cache and where it was told to.

Each script runs in a process of its own, whose audit hook writes down what Python does. What native code does is seen
by strace, where there is one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factories import add_sparse_modules
from runtime_models import make_word_checkpoint

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parents[2]
# Libraries that are asked for by name; `ctypes.util` and Matplotlib start these, and wait for them.
HELPERS = ("/sbin/ldconfig", "fc-list")
AUDIT = """
    import os, sys

    log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # a forked child writes there, too
    NETWORK = ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto", "socket.bind")
    PROCESSES = ("os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")

    def hook(event, arguments):
        if event in NETWORK or event in PROCESSES or event in CHANGES:
            os.write(log, f"{event}\\t{arguments[0]}\\n".encode())
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            os.write(log, f"open\\t{arguments[0]}\\n".encode())

    sys.addaudithook(hook)
"""
# `Path.home` asks the password database where HOME is not set.
NO_PASSWD_ENTRY = """
    import pwd

    def unknown(*key):
        raise KeyError(f"no entry for {key}")

    pwd.getpwuid = pwd.getpwnam = unknown
"""
COMMANDS = """
    import importlib, json, sys

    commands = json.loads(sys.argv[1])
    for module, arguments in commands:
        print("$", module, *arguments, flush=True)
        code = importlib.import_module(module).main(arguments)
        print("exit code", code, flush=True)
"""
USE = {
    "onnx": "import gte_deploy; gte_deploy.load(sys.argv[1], backend='onnx').encode('the king')",
    "openvino": "import gte_deploy; gte_deploy.load(sys.argv[1], backend='openvino').encode('the king')",
    "torch": "import gte_deploy; gte_deploy.load(sys.argv[1], backend='torch').encode('the king')",
}


class Place:
    """A home, a folder for temporary files and one for results; and what a script did there."""

    def __init__(self, folder: Path, *, home: bool = True) -> None:
        self.out, self.tmp, self._home, self._log = (folder / name for name in ("out", "tmp", "home", "log"))
        for path in (self.out, self.tmp, self._home):
            path.mkdir(parents=True)
        # Variables of a CI would turn telemetry off, and those of conftest.py, too.
        kept = ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment |= {"TMPDIR": str(self.tmp), "PYTHONDONTWRITEBYTECODE": "1"}
        if home:
            self.environment["HOME"] = str(self._home)

    def run(self, script: str, *arguments: Any, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, sys.executable, "-c", script, *map(str, arguments)],
            env=self.environment,
            cwd=self.out,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def audited(self, script: str, *arguments: Any, prelude: str = "") -> subprocess.CompletedProcess[str]:
        whole = "\n".join(map(textwrap.dedent, (AUDIT, prelude, script)))
        return self.run(whole, self._log, *arguments)

    def events(self) -> list[str]:
        """What was done and may not be."""
        allowed = (self.out, self.tmp, self._home / ".cache", Path("/dev"))
        found = []
        for line in self._log.read_text().splitlines():
            event, _, what = line.partition("\t")
            if event == "subprocess.Popen" and what in HELPERS or event == "open" and what.isdecimal():
                continue
            is_network_or_process = event.startswith(("socket.", "subprocess.")) or event in (
                *("os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn", "os.spawn"),
            )
            path = Path(what)
            if is_network_or_process or (
                path.is_absolute() and not path.is_dir() and not any(path.is_relative_to(top) for top in allowed)
            ):
                found.append(line)
        return found

    def left(self) -> list[str]:
        """Files outside the cache, and all that is left of temporary ones."""
        cache = self._home / ".cache" / "gte-deploy"
        files = [path for path in self._home.rglob("*") if path.is_file() and not path.is_relative_to(cache)]
        return sorted(map(str, (*files, *self.tmp.iterdir())))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path], word_checkpoints: dict[str, Path]) -> Path:
    return bundle_of(word_checkpoints["embed"])


@pytest.fixture(scope="module")
def checkpoints(
    word_checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """One for each task."""
    folder = tmp_path_factory.mktemp("tasks")
    sparse = make_word_checkpoint(folder / "sparse")
    tagger = make_word_checkpoint(folder / "tagger", task="token-classify", num_labels=3)
    return {**word_checkpoints, "sparse": add_sparse_modules(sparse), "token-classify": tagger}


@pytest.fixture
def read_only(bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "read-only" / "bundle"
    shutil.copytree(bundle, folder)
    for path in (*folder.rglob("*"), folder, folder.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def deploy_commands(bundle: Path, checkpoints: dict[str, Path]) -> list[Any]:
    mlm, embed, reranker = (str(checkpoints[task]) for task in ("fill-mask", "embed", "classify"))
    commands = [
        ["encode", "-m", str(bundle), "the king"],
        ["encode", "-m", str(bundle), "--backend", "onnx", "the king"],
        ["info", str(bundle)],
        ["verify", str(bundle)],
        ["encode", "-m", embed, "-o", "embeddings.npy", "the king"],
        ["verify", str(bundle), "--checkpoint", embed],
        ["encode-sparse", "-m", str(checkpoints["sparse"]), "the king"],
        ["classify-tokens", "-m", str(checkpoints["token-classify"]), "the king"],
        ["fill-mask", "-m", mlm, "the [MASK]"],
        ["rank", "-m", reranker, "-q", "the king", "the queen", "a man"],
        ["info", embed],
        ["fill-mask", "Paris is the [MASK] of France."],
        ["info"],
    ]
    if has_openvino():
        commands.insert(2, ["encode", "-m", str(bundle), "--backend", "openvino", "the king"])
    return [["gte_deploy.cli", arguments] for arguments in commands]


def has_openvino() -> bool:
    import importlib.util

    return importlib.util.find_spec("openvino") is not None


def assert_done(done: subprocess.CompletedProcess[str], commands: list[Any]) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit code 0") == len(commands), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("home", [True, False], ids=["home", "no home, unknown user"])
def test_gte_deploy(home: bool, tmp_path: Path, read_only: Path, checkpoints: dict[str, Path]) -> None:
    place = Place(tmp_path / "place", home=home)
    commands = deploy_commands(read_only, checkpoints)
    done = place.audited(COMMANDS, json.dumps(commands), prelude="" if home else NO_PASSWD_ENTRY)
    assert_done(done, commands)
    assert place.events() == []
    assert place.left() == []
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize(
    "home", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["home", "no home, unknown user"]
)
def test_gte_export(home: bool, tmp_path: Path, word_checkpoints: dict[str, Path]) -> None:
    pytest.importorskip("onnxscript")
    place = Place(tmp_path / "place", home=home)
    arguments = [
        [str(word_checkpoints["embed"]), "bundle", "--max-len", "16", "--quiet"],
        ["bundle", "repository", "--format", "triton", "--quiet"],
    ]
    commands = [["gte_deploy.exporters.cli", command] for command in arguments]
    done = place.audited(COMMANDS, json.dumps(commands), prelude="" if home else NO_PASSWD_ENTRY)
    assert_done(done, commands)
    assert place.events() == []
    assert place.left() == []


def test_gte_train(tmp_path: Path, word_checkpoints: dict[str, Path]) -> None:
    pytest.importorskip("yaml")
    place, mlm = Place(tmp_path / "place", home=False), str(word_checkpoints["fill-mask"])
    (place.out / "text.txt").write_text(("the king walked to the city. " * 9 + "\n\n") * 30)
    stage = {
        "name": "mlm-32",
        "max_length": 32,
        "rope_theta": 10000,
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
    }
    (place.out / "recipe.yaml").write_text(
        json.dumps({"name": "quiet", "model": mlm, "stages": [stage]})
    )  # JSON is YAML
    (place.out / "glue" / "CoLA").mkdir(parents=True)
    for split in ("train", "dev"):
        (place.out / "glue" / "CoLA" / f"{split}.tsv").write_text("x\t1\t\tthe king\nx\t0\t\tking the\n" * 8)
    arguments = [
        ["prepare", "text.txt", "-o", "corpus", "--workers=1", "--tokenizer", mlm],
        ["estimate", "recipe.yaml", "--data", "corpus"],
        ["run", "recipe.yaml", "--data", "corpus", "-o", "run", "--device=cpu", "--tokenizer", mlm],
        ["export", "run", "exported", "--layout", "original"],
        ["extrapolate", "exported", "--data", "corpus", "-o", "curve", "--max-length", "32", "--device=cpu"],
        ["glue", "exported", "-o", "scores", "--data", "glue", "--tasks", "cola", "--epochs", "1", "--device=cpu"],
    ]
    commands = [["gte_deploy.training.cli", command] for command in arguments]
    done = place.audited(COMMANDS, json.dumps(commands), prelude=NO_PASSWD_ENTRY)
    assert_done(done, commands)
    assert place.events() == []
    assert place.left() == []


def test_bench_without_a_home(tmp_path: Path, read_only: Path) -> None:
    place = Place(tmp_path / "place", home=False)
    arguments = ["bench", str(read_only), "--repeats", "1", "--shapes", "1x8", "--backend", "onnx"]
    done = place.run("import sys; from gte_deploy.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)
    assert done.returncode == 0, done.stderr
    assert place.left() == []


@pytest.mark.parametrize("backend", USE)
def test_what_native_code_does(
    backend: str, place: Place, bundle: Path, word_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    log = tmp_path / "strace"
    before = (strace, "-f", "-qq", "--seccomp-bpf", "-o", str(log), "-e", "trace=network,process,openat,mkdir,unlink")
    path = word_checkpoints["embed"] if backend == "torch" else bundle
    done = place.run("import sys; " + USE[backend], path, before=before)
    if "ptrace" in done.stderr.lower():
        pytest.skip("strace is not permitted to trace here")
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert any("model" in line for line in lines)  # that it traces at all
    assert [line for line in lines if re.search(r"connect\(|sendto\(|sa_family=AF_INET", line)] == []
    starts = [line for line in lines if re.search(r"\b(v?fork|clone3?)\(", line) and "CLONE_THREAD" not in line]
    assert len(starts) <= 1 + sum(any(helper in line for helper in HELPERS) for line in lines if "execve" in line)
    assert backend == "torch" or starts == []
    allowed = (str(place.tmp), str(place.environment["HOME"]) + "/.cache", "/dev/", "/proc/self/")
    writes = [line for line in lines if re.search(r"O_WRONLY|O_RDWR|O_CREAT|mkdir\(|unlink\(", line)]
    failed = re.compile(r" = -1 E")
    names = [match[1] for line in writes if not failed.search(line) and (match := re.search(r'"([^"]*)"', line))]
    assert [name for name in names if not name.startswith(allowed)] == []
    assert place.left() == []


@pytest.mark.parametrize("backend", ["auto", "onnx", "openvino"])
def test_a_container_with_an_unknown_user(backend: str, tmp_path: Path, bundle: Path) -> None:
    """What the simulated one may miss: the kernel's own checks of a user who may write nowhere."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("needs root and setpriv to become another user")
    if backend == "openvino":
        pytest.importorskip("openvino")
    place = Place(tmp_path / "place", home=False)
    # Reads all, as in an image; writes nothing. Without the right to read, Python itself may be out of reach.
    rights = (
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    )
    before = (setpriv, "--reuid=54321", "--regid=54321", "--clear-groups", *rights)
    probe = place.run("", before=before)
    if probe.returncode != 0:
        pytest.skip(f"setpriv is not permitted here: {probe.stderr.strip()[-100:]}")
    script = "import sys; from gte_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    done = place.run(script, "encode", "-m", bundle, "--backend", backend, "the king", before=before)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)) == 32
    assert place.left() == []


def test_a_network_is_not_needed(place: Place, bundle: Path) -> None:
    unshare = shutil.which("unshare")
    before = (unshare or "", "--net", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    if unshare is None or place.run("", before=before).returncode != 0:
        pytest.skip("no network namespaces can be made here")
    script = "; ".join(
        ["import sys", *(USE[name] for name in ("onnx", "openvino") if name == "onnx" or has_openvino())]
    )
    done = place.run(script, bundle, before=before)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("model", ["~/bundle", "~nosuchuser/bundle"])
def test_a_home_that_is_not_there_is_told_in_one_line(model: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "place", home=False)
    commands = [["gte_deploy.cli", ["encode", "-m", model, "a"]]]
    done = place.audited(COMMANDS, json.dumps(commands), prelude=NO_PASSWD_ENTRY)
    assert "exit code 1" in done.stdout
    assert done.stderr.count("\n") == 1
    assert model in done.stderr and "Give the whole path" in done.stderr


def test_a_pick_without_a_home_is_told_in_one_line(tmp_path: Path, read_only: Path) -> None:
    place = Place(tmp_path / "place", home=False)
    script = """
        import pathlib, sys
        from gte_deploy.backends import picks
        try:
            picks.save("0" * 64, picks.Pick("onnx", None, {}, "2026-01-01", {}))
        except OSError as error:
            print(error)
    """
    done = place.audited(script, prelude=NO_PASSWD_ENTRY)
    assert done.stdout == "this user has no home folder for a cache; set XDG_CACHE_HOME\n"


def test_what_the_user_has_set_stays(place: Place) -> None:
    theirs = {"MPLCONFIGDIR": "/a", "TORCHINDUCTOR_CACHE_DIR": "/b", "HF_HUB_DISABLE_TELEMETRY": "0"}
    place.environment |= theirs
    script = "import os, gte_deploy.exporters; print({name: os.environ[name] for name in %r})" % list(theirs)  # noqa: UP031
    assert place.run(script).stdout == f"{theirs}\n"


def test_openvino_is_whole_and_its_telemetry_package_can_be_imported(place: Place, bundle: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("openvino_telemetry")
    script = """
        import sys
        import gte_deploy
        gte_deploy.load(sys.argv[1], backend="openvino")
        assert "openvino_telemetry" not in sys.modules
        import openvino_telemetry
        assert callable(openvino_telemetry.Telemetry)
        import numpy as np, openvino
        x = openvino.opset13.parameter([1], dtype=np.float32)
        model = openvino.Model([openvino.opset13.relu(x)], [x])
        print(openvino.Core().compile_model(model, "CPU")(np.array([-1.0], np.float32))[0])
        openvino.convert_model(sys.argv[1] + "/onnx/model_openvino.onnx")
    """
    done = place.run(textwrap.dedent(script), bundle)
    assert (done.returncode, done.stdout) == (0, "[0.]\n"), done.stderr
    assert place.left() == []


def test_a_users_own_telemetry_package_stays_imported(place: Place, bundle: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("openvino_telemetry")
    script = """
        import sys, openvino_telemetry
        import gte_deploy
        gte_deploy.load(sys.argv[1], backend="openvino")
        assert sys.modules["openvino_telemetry"] is openvino_telemetry
    """
    done = place.run(textwrap.dedent(script), bundle)
    assert done.returncode == 0, done.stderr
    assert place.left() == []


def test_only_one_place_imports_openvino_and_nncf() -> None:
    importing = re.compile(r"^\s*(import|from) (openvino|nncf)\b", re.MULTILINE)
    folders = ("gte_deploy", "exporters", "models", "training", "benchmarks", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = sorted(str(file.relative_to(ROOT)) for file in files if importing.search(file.read_text(encoding="utf-8")))
    assert found == ["benchmarks/side_by_side/artefacts.py", "gte_deploy/core/quiet.py"]
    assert "with without_openvino_telemetry():\n        import nncf" in (ROOT / found[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize("home", ["", "/proc/nowhere", "/proc/1/root/private"])
def test_a_home_that_cannot_be_used_is_none(home: str, tmp_path: Path, bundle: Path) -> None:
    place = Place(tmp_path / "place", home=False)
    place.environment["HOME"] = home
    script = """
        import os, sys
        import gte_deploy
        from gte_deploy.core.quiet import keep_caches_in_ours
        gte_deploy.load(sys.argv[1]).encode("the king")
        if os.geteuid() or os.environ["HOME"].startswith("/proc"):
            keep_caches_in_ours()
            assert os.environ["MPLCONFIGDIR"].startswith(os.environ["TMPDIR"]), os.environ["MPLCONFIGDIR"]
    """
    done = place.run(textwrap.dedent(script), bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert place.left() == []
