"""A file is whole or not there, and other users can read it."""

import os
import stat

import pytest

from gte_deploy.core.files import sha256_file, write_bytes, write_text, write_with


@pytest.fixture(autouse=True)
def strict_umask():
    old = os.umask(0o077)
    yield
    os.umask(old)


def test_written_files_are_readable_by_others(tmp_path):
    write_text(tmp_path / "a.txt", "π")
    assert (tmp_path / "a.txt").read_text("utf-8") == "π"
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fail(aside):
        aside.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_with(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(tmp_path):
    write_bytes(tmp_path / "empty", b"")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
