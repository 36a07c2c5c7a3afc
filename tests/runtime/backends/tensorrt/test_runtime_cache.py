"""The kernels that TensorRT-RTX compiles: kept for the next process, and read only from this user's own files."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import stat
import subprocess
import sys
import types

import numpy as np
import pytest

from gte_deploy.backends.tensorrt import backend as tensorrt_backend
from gte_deploy.backends.tensorrt import cuda as gpu_runtime
from gte_deploy.backends.tensorrt import runtime_cache
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.runtime_cache import RuntimeCache, cache_file
from gte_deploy.bundle.manifest import FileEntry
from gte_deploy.core import own_cache
from tensorrt_doubles import (
    SPEC,
    STRATEGIES,
    HostConfig,
    HostEngine,
    HostRuntime,
    assert_right,
    backend_over,
    engine_of,
    plan_of,
    random_batch,
)

ABOUT = ("0" * 64, "1.7.1.116", "8.9")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def rtx_backend(environment="driver 1"):
    backend = backend_over(HostRuntime(), plan_of("tensorrt-rtx"), runtime_cache=RuntimeCache(cache_file(*ABOUT)))
    engine_of(backend).environment = environment
    return backend


def run(backend, *shapes):
    rng = np.random.default_rng(0)
    for rows, length in shapes:
        assert_right(backend, random_batch(rng, rows, length, 1))


def test_the_file_names_plan_version_and_gpu_and_its_folder_is_the_users_alone(home):
    file = cache_file(*ABOUT)
    assert file == home / "gte-deploy" / "tensorrt-rtx" / f"{'0' * 64}-1.7.1.116-8.9.cache"
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_later_process_compiles_only_what_is_new():
    first = rtx_backend()
    run(first, (1, 8), (2, 20), (1, 8))
    compiled = engine_of(first).compiled
    first.close()
    assert compiled == [(1, 8), (2, 24)]
    assert stat.S_IMODE(cache_file(*ABOUT).stat().st_mode) == 0o600
    second = rtx_backend()
    run(second, (1, 8), (2, 20), (3, 8))
    assert engine_of(second).compiled == [(3, 8)]
    second.close()
    third = rtx_backend()
    run(third, (1, 8), (2, 20), (3, 8))
    assert engine_of(third).compiled == []


def test_contexts_of_all_profiles_and_slots_share_the_kernels():
    backend = rtx_backend()
    rng = np.random.default_rng(0)
    backend.warm_up([random_batch(rng, 1, 8, 1), random_batch(rng, 1, 40, 1)], ("logits",))
    assert backend.counts()["contexts"] == 2 * 2 and engine_of(backend).compiled == [(1, 8), (1, 40)]
    assert cache_file(*ABOUT).exists(), "warming up saves"


@pytest.mark.parametrize("content", [b"", b"\x00garbage", b'["driver 0", [[1, 8]]]'])
def test_a_damaged_or_foreign_cache_is_replaced(content, caplog):
    cache_file(*ABOUT).write_bytes(content)
    backend = rtx_backend()
    run(backend, (1, 8))
    assert engine_of(backend).compiled == [(1, 8)] and "the kernels are compiled again" in caplog.text
    backend.close()
    again = rtx_backend()
    run(again, (1, 8))
    assert engine_of(again).compiled == []


def test_a_cache_that_others_may_write_is_not_read(caplog):
    cache_file(*ABOUT).write_bytes(b'["driver 1", [[1, 8]]]')
    cache_file(*ABOUT).chmod(0o666)
    backend = rtx_backend()
    run(backend, (1, 8))
    assert engine_of(backend).compiled == [(1, 8)] and "no other user may write to it" in caplog.text
    backend.close()
    assert stat.S_IMODE(cache_file(*ABOUT).stat().st_mode) == 0o600, "a file of this user alone replaces it"


def test_links_are_not_followed(home, caplog):
    target = home / "elsewhere"
    target.write_bytes(b'["driver 1", [[1, 8]]]')
    cache_file(*ABOUT).symlink_to(target)
    backend = rtx_backend()
    run(backend, (1, 8))
    assert engine_of(backend).compiled == [(1, 8)] and "are not used" in caplog.text
    backend.close()
    assert target.read_bytes() == b'["driver 1", [[1, 8]]]' and not cache_file(*ABOUT).is_symlink()


def test_a_folder_that_others_may_write_is_not_used(home, caplog):
    folder = cache_file(*ABOUT).parent
    folder.chmod(0o777)
    assert cache_file(*ABOUT) is None and "compiles its kernels in every process" in caplog.text
    folder.chmod(0o700)
    os.rename(folder, home / "other")
    folder.symlink_to(home / "other")
    assert cache_file(*ABOUT) is None


def test_a_disk_that_cannot_be_written_is_no_error(caplog):
    """The limit of file sizes refuses a write to every user, root included."""
    file = cache_file(*ABOUT)
    backend = rtx_backend()
    run(backend, (1, 8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        backend.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(file.parent.iterdir()) and "were not kept" in caplog.text


def test_a_folder_that_vanished_is_no_error(home, caplog):
    backend = rtx_backend()
    run(backend, (1, 8))
    cache_file(*ABOUT).parent.rmdir()
    backend.close()
    assert "were not kept" in caplog.text and not list(home.rglob("*.tmp"))


def test_without_a_home_folder_there_is_no_file(monkeypatch, caplog):
    monkeypatch.setattr(own_cache, "cache_folder", lambda: (_ for _ in ()).throw(OSError("no home folder")))
    assert cache_file(*ABOUT) is None and "no home folder" in caplog.text
    backend = rtx_backend()
    run(backend, (1, 8))
    backend.close()


def test_the_file_is_written_while_the_model_is_in_use_if_there_are_new_kernels(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger=runtime_cache.__name__)
    now = [0.0]
    monkeypatch.setattr(runtime_cache.time, "monotonic", lambda: now[0])
    backend = rtx_backend()
    run(backend, (1, 8))
    assert not cache_file(*ABOUT).exists()
    now[0] = 61
    run(backend, (1, 8))
    assert b"[1, 8]" in cache_file(*ABOUT).read_bytes()
    for now[0] in (100, 180, 182, 500, 10_000):
        run(backend, (1, 8))
    assert caplog.text.count("bytes of compiled kernels") == 1, "nothing was new"


def test_kernels_are_saved_at_the_end_of_a_model_that_nobody_closed():
    backend = rtx_backend()
    run(backend, (1, 8))
    del backend
    gc.collect()
    assert cache_file(*ABOUT).exists()


def test_kernels_are_saved_at_the_end_of_a_process_that_closes_nothing(home):
    script = (
        "from test_runtime_cache import rtx_backend, run; backend = rtx_backend(); run(backend, (1, 8)); print('done')"
    )
    folders = [os.path.dirname(__file__), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "done\n" and found.stderr == ""
    assert cache_file(*ABOUT).exists()


def test_a_forked_process_writes_nothing():
    """CUDA does not survive a fork; the child must not touch what it inherited, not even when it ends."""
    backend = rtx_backend()
    run(backend, (1, 8))
    child = os.fork()
    if not child:
        backend._kernels.save()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and not cache_file(*ABOUT).exists()
    backend.close()
    assert cache_file(*ABOUT).exists()


def test_an_engine_of_tensorrt_rtx_has_a_file_and_one_of_tensorrt_has_none(monkeypatch, tmp_path):
    runtime = HostRuntime()
    monkeypatch.setattr(gpu_runtime, "gpu_capability", lambda index: "8.9")
    for variant in ("tensorrt-rtx", "tensorrt"):
        plan = plan_of(variant)
        parts = STRATEGIES, Cuda(0, runtime=runtime), HostEngine(plan, runtime)
        monkeypatch.setattr(tensorrt_backend, "open_plan", lambda *arguments, parts=parts: parts)
        manifest = types.SimpleNamespace(
            plan=plan, files={plan.path: FileEntry(8, "f" * 64)}, spec=SPEC, precision="fp16"
        )
        with contextlib.closing(tensorrt_backend.open_tensorrt_backend(tmp_path, manifest)) as backend:
            run(backend, (1, 8))
    (file,) = (tmp_path / "gte-deploy").rglob("*.*")
    assert file.name == f"{'f' * 64}-10.9.0.34-8.9.cache"


def test_a_refused_cache_is_logged_and_no_error(caplog):
    class Refusing(HostConfig):
        def set_runtime_cache(self, cache):
            return False

    RuntimeCache(None).attach(Refusing("driver 1"))
    assert "refuses its runtime cache" in caplog.text


def test_tensorrt_rtx_has_what_is_asked_of_it():
    trt = pytest.importorskip("tensorrt_rtx")
    for kind, names in (
        (trt.IRuntimeConfig, "create_runtime_cache set_runtime_cache"),
        (trt.IRuntimeCache, "serialize deserialize"),
    ):
        for name in names.split():
            assert hasattr(kind, name), name
