"""The measurement of bfloat16: it runs for real wherever OpenVINO does, once, and only where the CPU has bfloat16."""

import json

import pytest

pytest.importorskip("openvino")

from gte_deploy.backends import bf16_speed as speed
from gte_deploy.backends.bf16_speed import Bf16Speed, bf16_speed
from gte_deploy.core import cpus


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    """`cpu(flags, native)`: the CPU's flags, and whether OpenVINO computes in bfloat16 on it; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speed._measured.cache_clear()

    def make(flags, native=True):
        (tmp_path / "cpuinfo").write_text(f"model name : Test\n{flags}\n")
        monkeypatch.setattr(cpus, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: native)

    yield make
    speed._measured.cache_clear()


@pytest.fixture
def not_measured(monkeypatch):
    """Nothing may be measured."""

    def refuse(*arguments, **options):
        raise AssertionError("a product was timed")

    monkeypatch.setattr(speed, "Product", refuse)


def test_two_products_are_timed_once(cpu, monkeypatch, tmp_path):
    """On a CPU without bfloat16, OpenVINO runs both precisions in fp32: the ratio is near 1."""
    cpu("flags : avx512_bf16")
    assert bf16_speed(measure=False) is None
    found = bf16_speed()
    assert 0.02 < found.layers < 50 and 0.02 < found.attention < 50
    monkeypatch.setattr(speed, "Product", None)
    assert bf16_speed() == found, "this process has measured"
    speed._measured.cache_clear()
    assert bf16_speed() == found == bf16_speed(measure=False), "the cache has it"
    (file,) = (tmp_path / "gte-deploy/bf16-speed").iterdir()
    file.write_text(json.dumps({"key": {}, "speed": {"layers": 1, "attention": 1}}))
    assert bf16_speed(measure=False) is None, "it is another machine's"
    for damaged in ("", "[]", '{"key": 1}', "[" * 5000):
        file.write_text(damaged)
        assert bf16_speed(measure=False) is None


@pytest.mark.parametrize(
    ("flags", "native"), [("flags : avx2 avx512f", True), ("flags : avx512_bf16", False), ("", False)]
)
def test_a_cpu_without_bfloat16_is_not_measured(cpu, not_measured, flags, native):
    cpu(flags, native)
    assert bf16_speed() is None


def test_the_best_of_several_times_counts(cpu, monkeypatch):
    cpu("Features : asimd bf16")
    times = {"fp32": iter([9.0, 2.0, 7.0, 3.0, 8.0] * 4), "bf16": iter([5.0, 4.0, 1.0, 6.0, 9.0] * 4)}

    class Timed:
        def __init__(self, x, y, precision, *, is_attention):
            self.seconds = lambda: next(times[precision])

    monkeypatch.setattr(speed, "Product", Timed)
    assert bf16_speed() == Bf16Speed(2.0, 2.0)


def test_without_a_cache_folder_it_is_measured_in_each_process(cpu, monkeypatch, tmp_path):
    cpu("flags : amx_bf16")
    (tmp_path / "gte-deploy").write_text("a file where the folder should be")

    class Timed:
        def __init__(self, x, y, precision, *, is_attention):
            self.seconds = lambda: 1.0

    monkeypatch.setattr(speed, "Product", Timed)
    assert bf16_speed() == Bf16Speed(1.0, 1.0) and bf16_speed(measure=False) is None
