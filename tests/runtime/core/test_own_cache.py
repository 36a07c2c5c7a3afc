"""The cache is trusted only if nobody but this user or root can have written it."""

import dataclasses
import json
import logging
import os
import stat

import pytest

from gte_deploy import loading
from gte_deploy.backends import bf16_speed, picks
from gte_deploy.backends.picks import Pick
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.own_cache import own_cache_folder, read_own
from gte_deploy.core.quiet import keep_caches_in_ours
from gte_deploy.models import builtin_bundle

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system does not tell whose files they are")

CHECKSUM = "c" * 64
PICK = Pick("openvino", "bf16", {}, "2026-11-23T10:00:00+00:00", {})
NOBODY = 65534
AS_ROOT = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="needs root: another user's files")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def world_writable(path, elsewhere):
    path.chmod(0o777)


def writable_by_the_group(path, elsewhere):
    path.chmod(path.stat().st_mode | stat.S_IWGRP)


def of_another_user(path, elsewhere):
    if os.geteuid() != 0:
        pytest.skip("needs root: another user's files")
    os.chown(path, NOBODY, NOBODY)


def link_elsewhere(path, elsewhere):
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


SPOILED = [world_writable, writable_by_the_group, of_another_user, link_elsewhere]


def test_what_it_makes_is_for_this_user_alone():
    old = os.umask(0o002)
    try:
        folder = own_cache_folder("a", "b")
    finally:
        os.umask(old)
    for each in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700, each


def test_a_cache_on_another_disk_is_a_link_and_taken(home, tmp_path):
    (tmp_path / "disk").mkdir(mode=0o700)
    home.mkdir()
    (home / "gte-deploy").symlink_to(tmp_path / "disk")
    assert own_cache_folder("a") == home / "gte-deploy" / "a"


@pytest.mark.parametrize(
    ("place", "spoil"),
    [
        *((place, spoil) for place in ("file", "folder") for spoil in SPOILED),
        *(("cache", spoil) for spoil in SPOILED if spoil is not link_elsewhere),
    ],
)
def test_a_pick_that_others_can_have_written_is_ignored_with_a_warning(place, spoil, tmp_path, caplog):
    file = picks.save(CHECKSUM, PICK)
    spoil({"file": file, "folder": file.parent, "cache": file.parent.parent}[place], tmp_path / "elsewhere")
    assert picks.lookup(CHECKSUM) is None
    assert "ignoring a recorded pick" in caplog.text
    if place != "file":
        with pytest.raises(PermissionError, match="Remove it"):
            picks.save(CHECKSUM, PICK)


@AS_ROOT
def test_what_root_has_written_is_taken_by_every_user(monkeypatch):
    picks.save(CHECKSUM, PICK)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert picks.lookup(CHECKSUM) == PICK


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_speed_that_others_can_have_written_is_measured_again(spoil, tmp_path, monkeypatch):
    own_cache_folder("bf16-speed")
    file = bf16_speed._file()
    file.write_text(json.dumps({"key": bf16_speed._key(), "speed": {"layers": 9, "attention": 9}}))
    assert bf16_speed._recorded() == bf16_speed.Bf16Speed(9, 9)
    spoil(file.parent, tmp_path / "elsewhere")
    assert bf16_speed._recorded() is None


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_compiled_engines_of_others_are_never_loaded(spoil, place, tmp_path, caplog):
    manifest = dataclasses.replace(read_manifest(builtin_bundle()), source={"name": place})
    folder = loading._compiled_folder(manifest)
    (folder / "engine").write_bytes(b"machine code")
    assert loading._compiled_folder(manifest) == folder and not caplog.records
    spoil({"file": folder / "engine", "folder": folder}[place], tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        other = loading._compiled_folder(manifest)
    assert other is not None and not other.is_relative_to(tmp_path) and not any(other.iterdir())
    assert stat.S_IMODE(other.stat().st_mode) == 0o700 and other.stat().st_uid == os.geteuid()
    assert "compiles the graph for itself" in caplog.text


@pytest.mark.parametrize("spoil", [world_writable, of_another_user])
def test_the_caches_of_libraries_are_not_those_of_another_user(spoil, home, tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that the patch removes at the end what is set here
        monkeypatch.delenv(name)
    spoil(own_cache_folder(), tmp_path / "elsewhere")
    keep_caches_in_ours()
    assert not os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(home))


def test_only_files_are_read_and_not_too_large_ones(tmp_path):
    folder = own_cache_folder("a")
    (folder / "small").write_bytes(b"1234")
    assert read_own(folder / "small", max_bytes=4) == b"1234"
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_own(folder / "small", max_bytes=3)
    os.mkfifo(folder / "pipe", 0o600)
    with pytest.raises(OSError, match="not a file"):
        read_own(folder / "pipe", max_bytes=4)
    (folder / "link").symlink_to("small")
    with pytest.raises(OSError, match="symbolic links"):
        read_own(folder / "link", max_bytes=4)
    with pytest.raises(FileNotFoundError):
        read_own(folder / "missing", max_bytes=4)
