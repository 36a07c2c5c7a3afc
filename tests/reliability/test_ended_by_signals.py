"""SIGTERM and SIGHUP end a command as Ctrl-C does: no unfinished folder stays, and the exit code names the signal."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.core import exit_codes
from gte_deploy.core.termination import Terminated, signals_raise

# A command that fills a staging folder until it is ended, or ends a worker that it has forked.
COMMAND = """
import os, signal, sys, time
from pathlib import Path
from gte_deploy.core.command_line import run_command
from gte_deploy.exporters.bundle.writer import staging

target = Path(sys.argv[1])

def export():
    with staging(target, force=False) as folder:
        (folder / "weights").write_bytes(b"half")
        if "kill-the-worker" not in sys.argv:
            print("ready", flush=True)
            time.sleep(60)
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), folder.is_dir(), flush=True)

sys.exit(run_command("gte-export", export, {}, interrupted="interrupted; nothing was written"))
"""


def start(target, *more, before=None):
    command = [sys.executable, "-c", COMMAND, str(target), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_is_ended_leaves_nothing(number, tmp_path):
    process = start(tmp_path / "bundle")
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 2, "the staging folder and its lock"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert err == f"gte-export: error: interrupted{by}; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_real_exports_that_are_ended_at_random_moments_leave_nothing(number, tmp_path):
    """From the first imports to the last rename. A process that ends after that has written all, and says so.

    Before it takes signals and after the work, a signal ends a process as if there were no handler.
    """
    rng = random.Random(number)
    words = ["-m", "gte_deploy.exporters.cli", "-o", "bundle", "--max-length", "64"]
    begun = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True)
    whole = time.monotonic() - begun
    shutil.rmtree(tmp_path / "bundle")
    codes = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, whole))
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        codes.append(process.returncode)
        assert codes[-1] in (exit_codes.OK, 128 + number, -number), err
        if (tmp_path / "bundle").exists():
            assert codes[-1] != 128 + number or b"bundle is written" in err, err
            open_bundle(tmp_path / "bundle")
            shutil.rmtree(tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == [], err
    assert 128 + number in codes


# A signal while an export says where its bundle is.
TOO_LATE = """
import os, signal, sys
from gte_deploy.exporters import cli

def text(result):
    os.kill(os.getpid(), int(sys.argv[1]))
    return "the bundle"

cli._result_text = text
sys.exit(cli.main(["-o", "bundle", "--max-length", "16", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_work_is_told_what_was_written(number, tmp_path):
    for options in ([], ["--force"]):
        command = [sys.executable, "-c", TOO_LATE, str(int(number)), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        by = "" if number == signal.SIGINT else f" by {number.name}"
        assert done.returncode == 128 + number
        assert done.stderr.endswith(f"error: interrupted{by}; {tmp_path / 'bundle'} is written\n"), done.stderr
        open_bundle(tmp_path / "bundle")


def test_a_worker_ends_without_the_work_of_its_parent(tmp_path):
    process = start(tmp_path / "bundle", "kill-the-worker")
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("-15 True\n", "", exit_codes.OK)


def test_after_nohup_sighup_is_ignored(tmp_path):
    process = start(tmp_path / "bundle", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM


def test_the_handlers_of_the_caller_come_back():
    def own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGHUP, own)
    try:
        with pytest.raises(Terminated) as caught, signals_raise():
            assert signal.getsignal(signal.SIGHUP) is own, "a handler of the caller is left as it is"
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.exit_code == 143 and isinstance(caught.value, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
