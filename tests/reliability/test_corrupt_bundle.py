"""A bundle that was altered anywhere is refused before any loader sees it."""

import dataclasses
import random
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from factories import make_checkpoint  # noqa: E402
from gte_deploy.bundle.manifest import MANIFEST_NAME, open_bundle, read_manifest  # noqa: E402
from gte_deploy.core.errors import BundleError  # noqa: E402
from gte_deploy.exporters.bundle.writer import seal  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.job import WEIGHTS_PATH  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two bundles of the same shapes and different weights."""
    folder = tmp_path_factory.mktemp("exported")
    first, second = folder / "first", folder / "second"
    manifest = export(make_checkpoint(folder / "checkpoint", layers=1), first, max_length=16).manifest
    shutil.copytree(first, second)
    weights = second / WEIGHTS_PATH
    weights.write_bytes((-np.fromfile(weights, np.float32)).tobytes())
    (second / MANIFEST_NAME).unlink()
    seal(second, dataclasses.replace(manifest, source={"name": "second"}))
    open_bundle(second)
    return first, second


@pytest.fixture
def bundle(exported, tmp_path):
    target = tmp_path / "bundle"
    shutil.copytree(exported[0], target)
    return target


def files_of(bundle):
    return sorted(read_manifest(bundle).files)


def refused(bundle):
    with pytest.raises(BundleError):
        open_bundle(bundle)
    return True


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def flip_each_file(bundle, flips, seed):
    rng = random.Random(seed)
    names = files_of(bundle)
    for number in range(flips):
        path = bundle / names[number % len(names)]
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        assert refused(bundle), f"{path.name}, bit {bit}"
        flip(path, bit)
    open_bundle(bundle)


def test_flipped_bits(bundle):
    flip_each_file(bundle, flips=100, seed=0)


@pytest.mark.slow
def test_a_thousand_flipped_bits(bundle):
    flip_each_file(bundle, flips=1000, seed=1)


def test_flipped_bits_of_the_manifest(bundle):
    path, rng = bundle / MANIFEST_NAME, random.Random(2)
    for _ in range(300):
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        assert refused(bundle), f"bit {bit}"
        flip(path, bit)
    open_bundle(bundle)


def test_truncation(bundle):
    rng = random.Random(3)
    for name in (*files_of(bundle), MANIFEST_NAME):
        path = bundle / name
        whole = path.read_bytes()
        end = len(whole.rstrip())  # the manifest without its last line break says all that it said
        for size in {0, 1, end - 1, *(rng.randrange(end) for _ in range(64))}:
            path.write_bytes(whole[:size])
            assert refused(bundle), f"{name} cut to {size}"
        path.write_bytes(whole)
    open_bundle(bundle)


def test_a_missing_file(bundle):
    for name in (*files_of(bundle), MANIFEST_NAME):
        (bundle / name).rename(bundle / "aside")
        assert refused(bundle), name
        (bundle / "aside").rename(bundle / name)
    open_bundle(bundle)


def test_the_weights_of_another_bundle_of_the_same_shapes(bundle, exported):
    whole = (bundle / WEIGHTS_PATH).read_bytes()
    shutil.copyfile(exported[1] / WEIGHTS_PATH, bundle / WEIGHTS_PATH)
    assert refused(bundle)
    (bundle / WEIGHTS_PATH).write_bytes(whole)
    shutil.copyfile(exported[1] / MANIFEST_NAME, bundle / MANIFEST_NAME)
    assert refused(bundle), "the manifest of another bundle"
