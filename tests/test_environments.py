"""The environments of other libraries: made once, and what could not be made keeps its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from environments import Unavailable, interpreter, make, requirements_of, versions


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    python = make("empty", ["pip"], folder=tmp_path)
    made = python.lstat().st_mtime_ns
    assert make("empty", ["pip"], folder=tmp_path) == python == interpreter("empty", folder=tmp_path)
    assert python.lstat().st_mtime_ns == made
    assert list(versions("empty", ["pip", "torch"], folder=tmp_path)) == ["pip"]
    make("empty", ["pip>=20"], folder=tmp_path)  # other requirements
    assert python.lstat().st_mtime_ns != made


def test_an_environment_that_pip_cannot_make_has_pips_reason(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"python tests/support/environments.py one"):
        interpreter("one", folder=tmp_path)
    for _ in range(2):  # nothing is kept that looks whole
        with pytest.raises(Unavailable, match="ERROR: .*(No such file|Invalid requirement|does not exist)"):
            make("one", ["./no-such-package"], folder=tmp_path)
    with pytest.raises(Unavailable, match="pip could not install it: ERROR"):
        interpreter("one", folder=tmp_path)
    assert versions("one", ["pip"], folder=tmp_path) == {}


def test_torch_has_the_version_of_this_environment() -> None:
    torch = pytest.importorskip("torch")
    (requirement,) = set(requirements_of("onnx")) - {"sentence-transformers[onnx]"}
    assert requirement == f"torch=={torch.__version__.partition('+')[0]}"
