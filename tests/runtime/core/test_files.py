"""A file is whole or not there, has the mode that its owner wants, and replaces nothing but a file."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from gte_deploy.core import files
from gte_deploy.core.files import (
    follow_links,
    is_special,
    keep_mode,
    sha256_file,
    sync_file,
    sync_tree,
    umask,
    write_bytes,
    write_text,
    write_with,
)
from null_device import make_null_device

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes, owners, devices and pipes of POSIX")
AS_ROOT = pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="needs root: makes a file of another user")


@pytest.fixture
def with_umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@POSIX
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_new_files_and_folders_have_the_modes_that_the_umask_leaves(tmp_path, with_umask, mask):
    with_umask(mask)
    assert umask() == mask
    write_text(tmp_path / "a.txt", "π")
    assert (tmp_path / "a.txt").read_text("utf-8") == "π"
    assert mode_of(tmp_path / "a.txt") == 0o666 & ~mask
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)  # as tempfile and libraries do
    (folder / "weights").touch(mode=0o600)
    sync_tree(folder)
    assert mode_of(folder) == 0o777 & ~mask and mode_of(folder / "weights") == 0o666 & ~mask
    (folder / "weights").chmod(0o600)
    sync_file(folder / "weights")
    assert mode_of(folder / "weights") == 0o666 & ~mask


@POSIX
def test_a_system_that_does_not_tell_the_umask_is_asked_by_setting_it(monkeypatch, with_umask):
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"Name:\tno such line\n")
    with_umask(0o026)
    assert umask() == 0o026 and umask() == 0o026


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.bin"
    path.touch()
    path.chmod(mode)

    def write(aside):
        assert mode_of(aside) & ~mode & 0o077 == 0, "what will be private is private while it is written"
        aside.chmod(0o606)  # as a library that sets a mode of its own
        aside.write_bytes(b"new")

    write_with(path, write)
    assert path.read_bytes() == b"new" and mode_of(path) == mode


@POSIX
@AS_ROOT
def test_a_replaced_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a.bin"
    path.touch(mode=0o600)
    os.chown(path, 65534, 65533)
    write_bytes(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (65534, 65533, 0o600)


@POSIX
def test_a_group_that_cannot_be_kept_gets_what_everybody_has(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.touch()
    path.chmod(0o664)
    found = path.stat()
    other = os.stat_result((found.st_mode, 0, 0, 1, found.st_uid, found.st_gid + 1, 0, 0, 0, 0))

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    assert files._adopt_owner(path, other) == 0o644


@POSIX
def test_a_replaced_folder_keeps_its_mode(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    old.chmod(0o750)
    keep_mode(new, tmp_path / "missing")
    assert mode_of(new) != 0o750
    keep_mode(new, old)
    assert mode_of(new) == 0o750


@POSIX
def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "there" / "file")
    for text in ("new", "again"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "there" / "file").read_text() == text
    assert (tmp_path / "link").readlink() == Path("second") and (tmp_path / "second").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]
    assert follow_links(tmp_path / "link") == (tmp_path / "there" / "file").resolve()


@POSIX
def test_links_in_a_circle_and_folders_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        write_text(tmp_path / "a", "x")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@POSIX
def test_a_pipe_gets_the_bytes_and_stays(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert is_special(pipe)
    write_bytes(pipe, b"x" * 200_000)
    reader.join(10)
    assert got == [b"x" * 200_000] and pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@POSIX
def test_a_device_stays(tmp_path):
    device = make_null_device(tmp_path / "null")
    (tmp_path / "link").symlink_to(device)
    for path in (device, tmp_path / "link"):
        assert is_special(path)
        write_text(path, "gone")
    assert device.is_char_device() and (tmp_path / "link").is_symlink()


@POSIX
def test_an_open_file_is_written_where_it_stands(tmp_path):
    with (tmp_path / "log").open("ab") as opened:
        opened.write(b"before ")
        opened.flush()
        for path in (Path(f"/dev/fd/{opened.fileno()}"), Path(f"/proc/self/fd/{opened.fileno()}")):
            assert is_special(path)
            write_text(path, "now ")
        opened.write(b"after")
    assert (tmp_path / "log").read_bytes() == b"before now now after"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_mounted_file_which_cannot_be_renamed_over_is_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"something longer")
    inode = path.stat().st_ino

    def busy(self, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "replace", busy)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [path]


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
