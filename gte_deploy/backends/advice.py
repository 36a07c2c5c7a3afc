"""Says what would run a bundle faster on this machine, for `gte-deploy info` and `Model.info`."""

import importlib.util

from gte_deploy.backends import picks
from gte_deploy.backends.bf16_speed import bf16_speed
from gte_deploy.backends.choice import LEAST_BF16_SPEEDUP, int8_unit, is_for_gpus, may_run_in_bf16, speedup
from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.install import install_command
from gte_deploy.core.spec import Engine


def faster_here(manifest: Manifest, *, measure: bool = True) -> list[str]:
    """One sentence for each thing that would be faster on this machine than the bundle as `load` runs it by default.

    Args:
        manifest: the bundle's.
        measure: whether to measure bfloat16 if it has not been measured on this machine, which imports OpenVINO.
    """
    if is_for_gpus(manifest) or "executorch" in manifest.graphs:
        return []
    lines: list[str] = []
    unit, has_openvino = int8_unit(), importlib.util.find_spec("openvino") is not None
    if unit is not None and manifest.precision in ("fp32", "bf16"):
        lines.append(f"This CPU has {unit}, so int8 is faster, and a little less exact: export with --precision int8.")
    if unit is not None and manifest.precision == "int8" and not has_openvino:
        lines.append(f"OpenVINO is faster in int8 on a CPU with {unit}: {install_command('openvino')}")
    lines += _of_bf16(manifest, measure=measure) if has_openvino else []
    engines: list[Engine] = [engine for engine in manifest.graphs if importlib.util.find_spec(engine) is not None]
    if len(engines) > 1 and picks.lookup(manifest.to_json()["checksum"]) is None:
        lines.append(
            "gte-deploy bench BUNDLE --pick measures the engines on this machine and records the fastest for load; "
            "--precision-may-change lets it record bf16."
        )
    return lines


def _of_bf16(manifest: Manifest, *, measure: bool) -> list[str]:
    speed = bf16_speed(measure=measure)
    if speed is None or may_run_in_bf16(manifest) or manifest.precision not in ("fp32", "int8"):
        return []
    ratio, part = speedup(manifest, speed)
    if ratio < LEAST_BF16_SPEEDUP:
        return []
    measured = f"This CPU computes {part} in bf16 {ratio:.1f} times as fast as in fp32"
    if manifest.precision == "int8":
        return [f"{measured}: export the bundle again on this CPU, which verifies bf16 for what is not int8."]
    graph = manifest.graphs.get("openvino")  # none if the export ran without OpenVINO
    at_load = "; or load(…, precision='bf16')" if graph is not None and "bf16" in graph.computes else ""
    return [f"{measured}: export with --precision bf16{at_load}."]
